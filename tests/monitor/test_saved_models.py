"""A model that is copied, pickled or saved while it is watched: the result is as without the
watch.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import fork_server
from monitor.rig import adam, plain_step, small
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import jacdiag
from jacdiag.monitor.model_hooks import AttachedHook, ModelHook

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
)


class Net(nn.Module):
    """A model without code of jacdiag: it has to load where that is not installed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.head = nn.Linear(16, 32)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.head(x)
        return out


class Own(Net):
    """A class that copies itself, with all that is in its dict."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Own:
        new = Own.__new__(Own)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


class Reduced(Net):
    """A class whose state is not its dict."""

    def __reduce__(self) -> Any:
        return rebuild, (self.state_dict(),)


def rebuild(state: dict[str, Tensor]) -> Reduced:
    model = Reduced()
    model.load_state_dict(state)
    return model


def user_hook(module: nn.Module, args: Any) -> None:
    """A hook of the user."""


def user_forward_hook(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook of the user."""


IDS = torch.arange(8).view(2, 4)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Watches a model over one step, with hooks of the user on it before and after."""
    watches = []

    def begin(model: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        model.register_forward_pre_hook(user_hook)
        optimizer = adam(model)
        w = jacdiag.watch(
            model, optimizer, log_dir=tmp_path, every=None, stats_every=None, quiet=True
        )
        model.register_forward_hook(user_forward_hook)
        model(IDS).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        w.step(1.0)
        watches.append(w)
        return model

    yield begin
    for w in watches:
        w.close()


def through_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def through_pickle(protocol: int) -> Callable[[nn.Module], nn.Module]:
    def through(model: nn.Module) -> nn.Module:
        loaded: nn.Module = pickle.loads(pickle.dumps(model, protocol))
        return loaded

    return through


def through_library(name: str) -> Callable[[nn.Module], nn.Module]:
    def through(model: nn.Module) -> nn.Module:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
        library = importlib.import_module(name)
        loaded: nn.Module = library.loads(library.dumps(model))
        return loaded

    return through


def through_forking_pickler(model: nn.Module) -> nn.Module:
    """What multiprocessing does with an argument of a spawned process."""
    from multiprocessing.reduction import ForkingPickler

    loaded: nn.Module = pickle.loads(bytes(ForkingPickler.dumps(model)))
    return loaded


def averaged(model: nn.Module) -> nn.Module:
    module: nn.Module = AveragedModel(model).module
    return module


def inside_another_object(model: nn.Module) -> nn.Module:
    loaded: nn.Module = pickle.loads(pickle.dumps({"best": [model], "epoch": 3}))["best"][0]
    return loaded


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.save": through_torch,
    "pickle 2": through_pickle(2),
    "pickle 5": through_pickle(5),
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "AveragedModel": averaged,
    "inside another object": inside_another_object,
    "dill": through_library("dill"),
    "cloudpickle": through_library("cloudpickle"),
    "multiprocessing": through_forking_pickler,
}


def hooks_of(model: nn.Module) -> dict[str, list[Any]]:
    return {name: list(getattr(model, name).values()) for name in HOOKS}


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_holds_the_hooks_of_the_user_and_none_of_the_watch(way: str, watched: Any) -> None:
    plain = Net()
    plain.register_forward_pre_hook(user_hook)
    plain.register_forward_hook(user_forward_hook)
    expected = hooks_of(WAYS[way](plain))
    assert [len(hooks) for hooks in expected.values()] == [1, 0, 1, 0]

    model = watched(Net())
    before = hooks_of(model)
    result = WAYS[way](model)
    assert [[getattr(h, "__name__", h) for h in hooks] for hooks in hooks_of(result).values()] == [
        [getattr(h, "__name__", h) for h in hooks] for hooks in expected.values()
    ]
    assert torch.equal(result(IDS), model(IDS))
    assert vars(result).keys() == vars(plain).keys()
    assert hooks_of(model) == before and any(
        isinstance(h, ModelHook) for h in model._forward_pre_hooks.values()
    )


def test_a_saved_model_is_as_large_as_without_the_watch(watched: Any) -> None:
    model = watched(Net())
    assert b"jacdiag" not in pickle.dumps(model)
    plain = Net()
    plain.register_forward_pre_hook(user_hook)
    plain.register_forward_hook(user_forward_hook)
    plain.load_state_dict(model.state_dict())
    assert abs(len(pickle.dumps(plain)) - len(pickle.dumps(model))) < 64


@pytest.mark.parametrize("kind", [Own, Reduced])
def test_classes_that_copy_themselves(kind: type[Net], watched: Any) -> None:
    model = watched(kind())
    for result in (copy.deepcopy(model), through_torch(model)):
        assert not any(isinstance(h, ModelHook) for h in result._forward_pre_hooks.values())
        assert torch.equal(result(IDS), model(IDS))
        assert b"jacdiag" not in pickle.dumps(result)


def test_parts_of_a_watched_model_and_what_holds_it(watched: Any) -> None:
    model = watched(Net())
    for part in (
        model.blocks[0],
        model.blocks,
        nn.Sequential(model, nn.Identity()),
        nn.DataParallel(model),
    ):
        assert b"jacdiag" not in pickle.dumps(part)
        copied = copy.deepcopy(part)
        assert not any(
            isinstance(h, ModelHook)
            for m in copied.modules()
            for h in m._forward_pre_hooks.values()
        )


def test_the_class_is_as_before_when_the_last_watch_of_it_ends(watched: Any) -> None:
    import copyreg

    def own(model: Net) -> Any:
        return rebuild, (model.state_dict(),)

    first, second = Net(), Net()
    a = AttachedHook(first, ModelHook())
    b = AttachedHook(second, ModelHook())
    a.remove()
    assert b"jacdiag" not in pickle.dumps(second)
    b.remove()
    b.remove()
    assert Net not in copyreg.dispatch_table
    try:
        copyreg.pickle(Net, own)  # type: ignore[arg-type]
        model = watched(Net())
        assert isinstance(copy.deepcopy(model), Reduced)  # what the user registered is still asked
    finally:
        copyreg.dispatch_table.pop(Net, None)


def test_optimizers_that_are_saved(watched: Any) -> None:
    class Plain:
        """An optimizer of no torch class: its step is covered."""

        def __init__(self, parameters: list[nn.Parameter]) -> None:
            self.param_groups = [{"params": parameters, "lr": 0.1}]

        def step(self) -> None:
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    if p.grad is not None:
                        p -= 0.1 * p.grad

    globals()["Plain"] = Plain
    Plain.__qualname__ = "Plain"
    for build in (lambda p: Plain(p), lambda p: torch.optim.AdamW(p)):
        model = Net()
        optimizer: Any = build(list(model.parameters()))
        with jacdiag.watch(model, optimizer, every=None, stats_every=None, quiet=True) as w:
            model(IDS).sum().backward()
            optimizer.step()
            w.step(1.0)
            for result in (
                pickle.loads(pickle.dumps(optimizer)),
                copy.deepcopy(optimizer),
                through_torch(optimizer),
            ):
                assert b"jacdiag" not in pickle.dumps(result)
                before = [p.detach().clone() for p in result.param_groups[0]["params"]]
                for p in result.param_groups[0]["params"]:
                    p.grad = torch.ones_like(p)
                result.step()
                assert all(
                    not torch.equal(p, q)
                    for p, q in zip(before, result.param_groups[0]["params"], strict=True)
                )
            # the copies' steps are not those of the run
            assert w.count == 1 and w.observer.usage.stepped == 0


def test_a_watched_model_goes_to_a_spawned_process(tmp_path: Path) -> None:
    """The child has no jacdiag."""
    program = tmp_path / "spawn.py"
    program.write_text(
        f"""
import sys
import torch

class Net(torch.nn.Linear):
    pass

def child(model, out):
    sys.modules["jacdiag"] = None
    out.put(float(model(torch.ones(1, 4)).sum()))

if __name__ == "__main__":
    sys.path[:0] = {[str(Path(jacdiag.__file__).parent.parent)]!r}
    import jacdiag
    import torch.multiprocessing as mp
    torch.manual_seed(0)
    model = Net(4, 4)
    optimizer = torch.optim.SGD(model.parameters())
    with jacdiag.watch(model, optimizer, every=None, stats_every=None, quiet=True):
        context = mp.get_context("spawn")
        out = context.Queue()
        process = context.Process(target=child, args=(model, out))
        process.start()
        print("same", out.get(timeout=60) == float(model(torch.ones(1, 4)).sum()))
        process.join()
"""
    )
    process = fork_server().start([program])
    output, errors = process.communicate(timeout=120)
    assert "same True" in output, errors


def test_export_and_trace_see_no_watch(watched: Any) -> None:
    model = watched(Net())
    plain = Net()
    plain.load_state_dict(model.state_dict())
    graph, expected = torch.export.export(model, (IDS,)), torch.export.export(plain, (IDS,))
    assert [n.op for n in graph.graph.nodes] == [n.op for n in expected.graph.nodes]
    assert torch.equal(graph.module()(IDS), plain(IDS))
    traced = torch.jit.trace(model, (IDS,))
    assert str(traced.graph).count("aten::") == str(torch.jit.trace(plain, (IDS,)).graph).count(
        "aten::"
    )
    from torch.fx.experimental.proxy_tensor import make_fx

    made, wanted = make_fx(lambda ids: model(ids))(IDS), make_fx(lambda ids: plain(ids))(IDS)
    assert len(made.graph.nodes) == len(wanted.graph.nodes)


def test_a_training_goes_on_in_a_copy_without_the_watch(tmp_path: Path) -> None:
    """The watch of the original sees nothing of it."""
    model = small()
    optimizer = adam(model)
    with jacdiag.watch(
        model, optimizer, log_dir=tmp_path, every=None, stats_every=None, quiet=True
    ) as w:
        w.step(plain_step(model, optimizer, 1)[0])
        other = copy.deepcopy(model)
        plain_step(other, adam(other), 2)
        assert w.batches is not None and w.batches.seen == 1 and w.observer.usage.stepped == 0
