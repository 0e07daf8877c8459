"""The pretended device itself: its numbers are the CPU's, and each switch catches its fault."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accelerator.pretended import NAME, memory_in_use, pretended_device
from jacdiag.sources.gpt import GPT, build


def tiny() -> GPT:
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 32, "block_size": 8}
    return build("vanilla", **sizes, dropout=0.0)


def ids() -> Tensor:
    return torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(0))


# -- the same numbers ------------------------------------------------------------------------------
@pytest.mark.parametrize("threads", [False, True])
def test_training_on_the_device_gives_the_same_bits_as_on_the_cpu(threads: bool) -> None:
    def train(device: str, **options: Any) -> list[Tensor]:
        model = tiny().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
        for _ in range(3):
            _, loss = model(ids().to(device), ids().to(device))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().cpu() for p in model.parameters()]

    with pretended_device(threads=threads):
        for options in ({}, {"foreach": True}, {"fused": True}):
            pairs = zip(train("cpu", **options), train(NAME, **options), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.linalg.svdvals(x),
        lambda x: F.layer_norm(x, (4,)),
        lambda x: F.silu(x).sort(0).values,
        lambda x: F.conv1d(x.t()[None], x[:, :, None]),
        lambda x: x[x > 0],
        lambda x: (x.long() & 2**61 - 1) % 7 ^ 5,
        lambda x: x.sum() * 2.0 + torch.tensor(1.0, dtype=torch.float64),
        lambda x: x.double().to(torch.bfloat16).float(),
        lambda x: torch.func.jvp(torch.tanh, (x,), (x,))[1],
        lambda x: torch.func.vjp(lambda z: torch.tanh(z @ z.t()), x)[1](x @ x.t())[0],
        lambda x: torch.func.vmap(lambda row: row / row.norm())(x),
        lambda x: torch.add(x, x, out=x.new_empty(0)),
    ],
)
def test_operations_give_the_same_bits_as_on_the_cpu(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    with pretended_device():
        result = function(x.to(NAME))
        assert result.device == torch.device(NAME, 0)
        assert torch.equal(result.cpu(), function(x))


def test_tensors_are_plain_ones_with_memory_of_their_own() -> None:
    model = tiny()
    weight, twin = model.transformer["wte"].weight, copy.deepcopy(model)
    with pretended_device():
        x = torch.ones(3, 4).to(NAME)
        view = x[1:].t()
        assert type(x) is Tensor and x.is_pretended and not x.is_cpu  # type: ignore[attr-defined]
        assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
        assert view.data_ptr() == x.data_ptr() + 16 and view.untyped_storage().nbytes() == 48
        view.zero_()
        assert x.sum().item() == 4

        # A module keeps its parameters when it moves, and the ties among them, as on CUDA.
        model.to(NAME)
        assert model.transformer["wte"].weight is weight is model.lm_head.weight
        assert isinstance(weight, nn.Parameter) and weight.device.type == NAME
        weight.data = weight.data + 1
        twin_weight = twin.transformer["wte"].weight
        assert torch.equal(weight.cpu(), twin_weight + 1)
        with pytest.raises(TypeError, match=f"can't convert {NAME}:0 device type tensor to numpy"):
            x.numpy()


def test_files_give_back_the_device_or_another() -> None:
    file = io.BytesIO()
    with pretended_device():
        x = torch.arange(4.0, device=NAME)
        torch.save({"x": x}, file)
        for place, device in ((None, NAME), ("cpu", "cpu")):
            file.seek(0)
            loaded = torch.load(file, map_location=place)["x"]
            assert loaded.device.type == device and torch.equal(loaded.cpu(), x.cpu())
        assert torch.equal(copy.deepcopy(x).cpu(), x.cpu())


# -- what torch says of the device -----------------------------------------------------------------
def test_torch_knows_the_device_inside_the_block_only() -> None:
    with pretended_device(devices=2, memory=1000):
        module = torch.get_device_module(NAME)
        assert torch.accelerator.current_accelerator() == torch.device(NAME)
        assert torch.accelerator.is_available() and torch.accelerator.device_count() == 2
        assert module.is_available() and module.mem_get_info(1) == (1000, 1000)
        with torch.accelerator.device_index(1):
            assert torch.accelerator.current_device_index() == module.current_device() == 1
            assert torch.ones(2, device=NAME).device == torch.device(NAME, 1)
        assert torch.accelerator.current_device_index() == 0
        with pytest.raises(RuntimeError, match="invalid device ordinal 2, there are 2"):
            torch.ones(1, device=f"{NAME}:2")
        assert isinstance(torch.Generator(), torch.Generator)
    assert not torch.accelerator.is_available() and torch.accelerator.device_count() == 0


def test_autocast_and_the_scaler_work_as_on_cuda() -> None:
    with pretended_device():
        layer, x = nn.Linear(4, 4).to(NAME), torch.randn(3, 4).to(NAME)
        with torch.autocast(NAME, dtype=torch.bfloat16):
            assert torch.is_autocast_enabled(NAME)
            assert layer(x).dtype == torch.bfloat16
            assert torch.softmax(layer(x), -1).dtype == torch.float32
            with torch.autocast(NAME, enabled=False):
                assert layer(x).dtype == torch.float32
        assert layer(x).dtype == torch.float32

        # An infinite gradient takes the step back, and the scale is halved.
        scaler = torch.amp.GradScaler(NAME, init_scale=4.0)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        before = layer.weight.detach().cpu()
        scaler.scale(layer(x).sum() * float("inf")).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(layer.weight.detach().cpu(), before) and scaler.get_scale() == 2.0


def test_random_numbers_of_the_device_are_its_own() -> None:
    with pretended_device(devices=2):
        # One seed for all devices; draws of one move no other.
        torch.manual_seed(3)
        on_cpu = torch.randn(4)
        torch.manual_seed(3)
        state = torch.get_device_module(NAME).get_rng_state(0)
        draws = [torch.randn(4, device=f"{NAME}:{index}").cpu() for index in (0, 1)]
        assert torch.equal(draws[0], on_cpu) and torch.equal(draws[1], on_cpu)
        assert torch.equal(torch.randn(4), on_cpu)
        assert (F.dropout(torch.ones(64, device=NAME), 0.5) == 0).any().item()

        # A state that is put back.
        torch.get_device_module(NAME).set_rng_state(state, 0)
        assert torch.equal(torch.randn(4, device=NAME).cpu(), on_cpu)

        # A generator belongs to one kind of device.
        generator = torch.Generator(NAME).manual_seed(3)
        assert generator.device.type == NAME
        assert torch.equal(torch.randn(4, device=NAME, generator=generator).cpu(), on_cpu)
        with pytest.raises(RuntimeError, match=f"Expected a '{NAME}' device type for generator"):
            torch.randn(4, device=NAME, generator=torch.Generator())


# -- the switches ----------------------------------------------------------------------------------
def test_an_operation_on_two_devices_raises_as_on_cuda() -> None:
    with pretended_device(devices=2) as counts:
        first, second = torch.ones(2).to(f"{NAME}:0"), torch.ones(2).to(f"{NAME}:1")
        for other in (torch.ones(2), second):
            with pytest.raises(RuntimeError, match="found at least two devices"):
                first + other
            with pytest.raises(RuntimeError, match="found at least two devices"):
                torch.cat([first, other])
        assert counts.mixed == 4

        # A number of the CPU is allowed, and so are its indices, which are uploaded.
        assert (first * torch.tensor(2.0)).tolist() == [2.0, 2.0]
        counts.clear()
        assert first[torch.tensor([1])].shape == (1,) and counts.uploads == 1
        assert first.to(second.device).device == second.device
        assert counts.mixed == 0


def test_each_device_runs_its_own_backward_pass() -> None:
    with pretended_device(devices=2):
        model = tiny().to(f"{NAME}:1")
        with torch.inference_mode(False):
            model(ids().to(f"{NAME}:1"), ids().to(f"{NAME}:1"))[1].backward()
        assert {p.grad.device.index for p in model.parameters() if p.grad is not None} == {1}
        assert memory_in_use(0) == 0 < memory_in_use(1)


def test_a_backward_pass_can_run_on_a_thread_of_its_own() -> None:
    for threads in (False, True):
        with pretended_device(threads=threads):
            seen: list[int] = []
            x = torch.ones(2, device=NAME, requires_grad=True)
            y = x.exp()
            y.register_hook(lambda _: seen.append(threading.get_ident()))  # noqa: B023
            y.sum().backward()
            assert (seen[0] != threading.get_ident()) is threads


def test_a_device_without_float64_raises_for_it() -> None:
    with pretended_device(float64=False):
        x = torch.ones(2).to(NAME)
        for use in (
            lambda: x.double(),
            lambda: torch.ones(2, dtype=torch.float64).to(NAME),
            lambda: torch.zeros(2, dtype=torch.float64, device=NAME),
            lambda: torch.sum(x, 0, dtype=torch.float64),
        ):
            with pytest.raises(TypeError, match="Cannot convert a pretended Tensor to"):
                use()
        assert x.cpu().double().sum() == 2
    with pretended_device():
        assert torch.ones(2).to(NAME).double().dtype == torch.float64


def test_a_device_without_a_generator_draws_all_the_same() -> None:
    with pretended_device(generator=False):
        for use in (lambda: torch.Generator(NAME), torch.get_device_module(NAME).get_rng_state):
            with pytest.raises(NotImplementedError, match="no generator of its own"):
                use()
        torch.manual_seed(3)
        on_device = torch.randn(4, device=NAME).cpu()
        torch.manual_seed(3)
        assert torch.equal(torch.randn(4), on_device)


def test_memory_is_counted_and_has_an_end() -> None:
    with pretended_device(memory=4000):
        accelerator = torch.accelerator
        x = torch.zeros(500, device=NAME)
        view = x[100:].view(20, 20)
        assert accelerator.memory_allocated() == memory_in_use() == 2000
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 2004 bytes"):
            torch.zeros(501, device=NAME)
        y = x + 1
        assert memory_in_use() == 4000 and torch.get_device_module(NAME).mem_get_info() == (0, 4000)

        # Memory is free once nothing looks at it: a view holds it, and so does a graph.
        del x, y
        assert memory_in_use() == 2000 and accelerator.max_memory_allocated() == 4000
        accelerator.reset_peak_memory_stats()
        assert accelerator.max_memory_allocated() == 2000
        del view
        saved = torch.ones(10, device=NAME, requires_grad=True).exp().sum()
        assert memory_in_use() == 84  # the leaf, its exponential, and the sum
        del saved
        assert memory_in_use() == 0


# -- waits and copies ------------------------------------------------------------------------------
def test_every_wait_of_the_host_is_counted() -> None:
    mask = torch.tensor([True, False])
    with pretended_device() as counts:
        x = torch.ones(2).to(NAME)
        mask = mask.to(NAME)
        cases: list[tuple[str, Callable[[], object]]] = [
            ("uploads", lambda: torch.ones(2).to(NAME)),
            ("uploads", lambda: torch.tensor([1.0], device=NAME)),
            ("uploads", lambda: x.copy_(torch.zeros(2))),
            ("downloads", x.cpu),
            ("downloads", x.tolist),
            ("downloads", lambda: torch.zeros(2).copy_(x)),
            ("downloads", lambda: torch.zeros(2).copy_(x, non_blocking=True)),  # not pinned
            ("reads", lambda: x.sum().item()),
            ("reads", lambda: bool(x[0] > 0)),
            ("reads", x.nonzero),
            ("reads", lambda: x[mask]),
            ("reads", lambda: torch.equal(x, x)),
            ("synchronizations", torch.accelerator.synchronize),
        ]
        for kind, use in cases:
            counts.clear()
            use()
            assert counts.waits == getattr(counts, kind) == 1, kind

        # What waits for nothing: kernels, views, allocations and copies of pinned memory.
        counts.clear()
        pinned = torch.ones(2, pin_memory=True)
        assert pinned.is_pinned() and torch.ones(2).pin_memory().is_pinned()
        x.copy_(pinned, non_blocking=True)
        y = (x.view(1, 2) + torch.full((2,), 3.0, device=NAME)).to("cpu", non_blocking=True)
        assert counts.waits == 0 and y.is_pinned()
        assert (counts.operations, counts.free_uploads, counts.free_downloads) == (4, 1, 1)
        torch.ones(2).to(NAME, non_blocking=True)
        assert counts.waits == 0 and counts.staged_uploads == 1


def test_waits_are_placed_in_the_code_of_jacdiag() -> None:
    from jacdiag.measure.init_distribution import draw_of

    with pretended_device() as counts:
        weight = torch.randn(8, 8).to(NAME)
        counts.clear()
        draw_of(weight)
        assert counts.places.total() == counts.waits > 0
        assert all("measure/moments.py:" in place for place in counts.places)


def test_a_download_that_is_read_too_early_gives_no_value() -> None:
    with pretended_device() as counts:
        x = torch.tensor([1.0, 2.0]).to(NAME)
        numbers, integers = x.to("cpu", non_blocking=True), x.long().to("cpu", non_blocking=True)
        x.zero_()  # later than the copies, in the order of the device
        assert numbers.isnan().all() and integers.tolist() == [-1, -1]
        torch.accelerator.synchronize()
        assert numbers.tolist() == [1.0, 2.0] and integers.tolist() == [1, 2]

        # An event covers what was launched before it, and is reached some operations later.
        early = x.to("cpu", non_blocking=True)
        event = torch.Event()
        event.record()
        late = (x + 1).to("cpu", non_blocking=True)
        assert not event.query() and early.isnan().all()
        event.synchronize()
        assert early.tolist() == [0.0, 0.0] and late.isnan().all()
        event.record()
        for _ in range(10):
            x.add_(1)
        counts.clear()
        assert event.query() and late.tolist() == [1.0, 1.0] and counts.waits == 0


def test_a_stream_is_waited_for_by_itself() -> None:
    with pretended_device():
        x = torch.ones(1).to(NAME)
        side = torch.Stream(device=NAME)
        with side:
            there = x.to("cpu", non_blocking=True)
        here = x.to("cpu", non_blocking=True)
        side.synchronize()
        assert there.item() == 1 and here.isnan().all()
        torch.accelerator.current_stream().synchronize()
        assert here.item() == 1


def test_pinned_memory_that_is_overwritten_before_its_upload_is_a_fault() -> None:
    with pretended_device() as counts:
        pinned = torch.ones(2).pin_memory()
        pinned.to(NAME, non_blocking=True)
        torch.accelerator.synchronize()
        pinned.fill_(2)  # the upload is done
        pinned.to(NAME, non_blocking=True)
        pinned.fill_(3)
        with pytest.raises(RuntimeError, match="overwritten before its upload"):
            torch.accelerator.synchronize()
        assert counts.races == 1
    with pytest.raises(RuntimeError, match="overwritten before its upload"), pretended_device():
        pinned = torch.ones(2).pin_memory()
        pinned.to(NAME, non_blocking=True)
        pinned.fill_(3)
