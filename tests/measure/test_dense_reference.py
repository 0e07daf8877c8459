"""Every figure of an audit against dense float64 linear algebra on models whose maps are written
out by hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from menagerie import CORE, STYLES, Specimen, SublayerTruth, residual, stream
from menagerie.specimen import Context
from selection import every_third
from torch import Tensor, nn

import jacdiag
from jacdiag.records import Interval, Report, SublayerRecord

SPECIMENS = [
    s for s in CORE if s.groups() and all(e.body is not None for e in s.expected if not e.nested)
]
WRITTEN = [
    s for s in STYLES if s.groups() and all(e.body is not None for e in s.expected if not e.nested)
]
DTYPES = ("float64", "float32")
# Each in float64; every third in float32 too, and the rest of these in the long tests.
CASES = [
    pytest.param(
        specimen, dtype, marks=[pytest.mark.long] if dtype == "float32" and place % 3 else []
    )
    for place, specimen in enumerate(SPECIMENS)
    for dtype in DTYPES
]
cases = pytest.mark.parametrize(("specimen", "dtype"), CASES, ids=lambda v: str(v))


@cache
def report_of(name: str, dtype: str) -> Report:
    """The audit of a specimen, its intervals as narrow as the precision gives."""
    specimen = next(s for s in [*SPECIMENS, *WRITTEN] if s.name == name)
    args, kwargs = specimen.arguments()
    inputs = kwargs if kwargs and not args else args
    assert not (args and kwargs), "an audit takes positional or keyword inputs"
    model: Any = specimen.build()
    tol = 2e-6 if dtype == "float64" else 5e-4
    return jacdiag.audit(model, inputs, dtype=dtype, tol=tol, max_products=2000, state="init")  # type: ignore[arg-type]


class Truth:
    """A specimen in float64: its groups with their true shortcuts."""

    def __init__(self, specimen: Specimen) -> None:
        self.specimen, self.model = specimen, specimen.build().double()
        self.context: Context = specimen.context(self.model, torch.float64)
        self.values = [v.detach() for v in stream(specimen, self.model, self.context)]

    def each(self) -> Iterator[tuple[SublayerTruth, Tensor]]:
        for group, x in zip(self.specimen.groups(), self.values, strict=False):
            for one in group:
                yield one, x


@cache
def truth_of(name: str) -> Truth:
    return Truth(next(s for s in [*SPECIMENS, *WRITTEN] if s.name == name))


def dense_jacobian(fn: Callable[[Tensor], Tensor], x: Tensor, *, vectorize: bool) -> Tensor:
    """Return the whole Jacobian as a matrix, batch and tokens included.

    Args:
        fn: the map.
        x: the point.
        vectorize: all rows in one backward under vmap, in place of one backward for each row.
    """
    jacobian: Any = torch.autograd.functional.jacobian(fn, x.detach(), vectorize=vectorize)
    matrix: Tensor = jacobian.reshape(-1, x.numel())
    return matrix


def dense(fn: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Return the spectral norm of the whole Jacobian."""
    return float(torch.linalg.svdvals(dense_jacobian(fn, x, vectorize=True))[0])


def records_of(report: Report, truth: Truth) -> list[tuple[SublayerRecord, SublayerTruth, Tensor]]:
    left = [r for r in report.sublayers if not r.nested]
    pairs = []
    for one, x in truth.each():
        record = next(r for r in left if one.name in (None, r.name))
        left.remove(record)
        pairs.append((record, one, x))
    assert not left
    return pairs


def assert_holds(
    interval: Interval | None, true: float, specimen: Specimen, dtype: str, what: str
) -> None:
    assert interval is not None, what
    # a model that casts to float32 by itself is only as exact as that, in its own run as in any
    # other
    accuracy = 1e-3 if dtype == "float32" else 1e-5 if specimen.casts else 1e-6
    assert interval.converged, (what, interval.stop)
    assert interval.lower <= true <= interval.upper, (what, true, interval)
    assert interval.estimate == pytest.approx(true, rel=accuracy), what


@pytest.mark.parametrize("specimen", every_third([*SPECIMENS, *WRITTEN]), ids=str)
def test_dense_jacobian_in_one_backward_equals_one_backward_per_row(specimen: Specimen) -> None:
    truth = truth_of(specimen.name)
    one, x = next(truth.each())

    def branch(x: Tensor) -> Tensor:
        return one.branch(truth.model, x, truth.context)

    rows = dense_jacobian(branch, x, vectorize=False)
    assert torch.allclose(dense_jacobian(branch, x, vectorize=True), rows, rtol=0, atol=1e-12)


@pytest.mark.parametrize("specimen", every_third(WRITTEN), ids=str)
def test_branch_norms_however_the_residual_is_written(specimen: Specimen) -> None:
    """The dense norm lies inside the interval, computed with little effort."""
    truth = truth_of(specimen.name)
    args, kwargs = specimen.arguments()
    report = jacdiag.audit(
        specimen.build(), kwargs if kwargs else args, dtype="float64", tol=1e-3, decide=True
    )
    for record, one, x in records_of(report, truth):
        norm = dense(lambda x, one=one: one.branch(truth.model, x, truth.context), x)
        interval, slack = record.branch_norm, 1e-5 if specimen.casts else 1e-9
        assert interval is not None, record.notes
        assert interval.lower * (1 - slack) <= norm <= interval.upper * (1 + slack), record.name


@cases
def test_branch_core_and_residual_norms(specimen: Specimen, dtype: str) -> None:
    truth, report = truth_of(specimen.name), report_of(specimen.name, dtype)
    model, context = truth.model, truth.context
    for record, one, x in records_of(report, truth):
        norm = dense(lambda x, one=one: one.branch(model, x, context), x)
        assert_holds(record.branch_norm, norm, specimen, dtype, f"{record.name} branch")
        z = x if one.entry is None else one.entry.normalise(model, x)
        norm = dense(lambda z, one=one: one.core(model, z, context), z)
        assert_holds(record.core_norm, norm, specimen, dtype, f"{record.name} core")
        if one.branch(model, x, context).shape == x.shape:
            norm = dense(lambda x, one=one: residual([one], model, x, context), x)
            assert_holds(record.residual_norm, norm, specimen, dtype, f"{record.name} residual")


@cases
def test_joint_map_of_parallel_branches_and_the_product_over_depth(
    specimen: Specimen, dtype: str
) -> None:
    truth, report = truth_of(specimen.name), report_of(specimen.name, dtype)
    log, by_name = 0.0, {r.name: r for r, _, _ in records_of(report, truth)}
    rows = iter(records_of(report, truth))
    for group, x in zip(truth.specimen.groups(), truth.values, strict=False):
        norm = dense(lambda x, group=group: residual(group, truth.model, x, truth.context), x)
        log += math.log(norm)
        members = [next(rows)[0].name for _ in group]
        if len(group) > 1:
            for name in members:
                assert_holds(
                    by_name[name].joint_residual_norm, norm, specimen, dtype, f"{name} joint"
                )
    assert report.network is not None
    if specimen.one_stream():
        assert report.network.gain_product_log == pytest.approx(
            log, abs=1e-2 if dtype == "float32" else 1e-4
        )


@cases
def test_end_to_end_norm(specimen: Specimen, dtype: str) -> None:
    if not specimen.one_stream():
        pytest.skip("more than one stream: the main one is the tracer's choice")
    truth, report = truth_of(specimen.name), report_of(specimen.name, dtype)

    def chain(x: Tensor) -> Tensor:
        groups = truth.specimen.groups()
        for group in groups:
            x = residual(group, truth.model, x, truth.context)
            if group is not groups[-1] and group[0].after is not None:
                x = group[0].after(x)
        return x

    assert report.network is not None
    assert_holds(
        report.network.end_to_end, dense(chain, truth.values[0]), specimen, dtype, "end to end"
    )


@cases
def test_gains_of_norms_and_spreads(specimen: Specimen, dtype: str) -> None:
    truth, report = truth_of(specimen.name), report_of(specimen.name, dtype)
    model, context, accuracy = (
        truth.model,
        truth.context,
        1e-4 if dtype == "float32" or specimen.casts else 1e-9,
    )
    for record, one, x in records_of(report, truth):
        dim = 1 if record.kind == "conv" and x.dim() > 2 else -1
        spread = x.std(dim, correction=0)
        assert record.shortcut_std is not None
        assert record.shortcut_std.min == pytest.approx(float(spread.min()), rel=accuracy)
        assert record.shortcut_std.max == pytest.approx(float(spread.max()), rel=accuracy)
        if one.entry is None:
            assert record.norm_gain is None and record.notes["norm_gain"]
        else:
            gain = one.entry.gain(model, x)
            assert record.norm_gain is not None and record.norm_gain.per_token is not None
            assert record.norm_gain.estimate == pytest.approx(gain.max().item(), rel=accuracy)
            p99 = float(torch.quantile(gain.flatten(), 0.99))
            assert record.norm_gain.per_token.p99 == pytest.approx(p99, rel=accuracy)
        y = None
        if one.exit is not None:
            y = one.body(model, x if one.entry is None else one.entry(model, x), context)  # type: ignore[misc]
            gain = one.exit.gain(model, y)
        elif one.behind is not None:
            group = next(g for g in truth.specimen.groups() if one in g)
            y = group[0].carried(model, x, context) + sum(
                e.branch(model, x, context) for e in group
            )
            gain = one.behind.gain(model, y)
        if y is None:
            assert record.out_norm_gain is None and record.notes["out_norm_gain"]
        else:
            assert record.out_norm_gain is not None
            assert record.out_norm_gain.estimate == pytest.approx(gain.max().item(), rel=accuracy)


@pytest.mark.parametrize(
    "specimen", [s for s in SPECIMENS if s.one_stream() and s.finish is not None], ids=str
)
def test_gradient_norms_come_from_one_backward_of_the_loss(specimen: Specimen) -> None:
    truth, report = truth_of(specimen.name), report_of(specimen.name, "float64")
    assert report.network is not None
    norms = report.network.gradient_norms
    assert norms is not None and len(norms) == len(truth.values)
    loss_of = loss_by_hand(report, truth)
    groups = truth.specimen.groups()
    for start, value in enumerate(truth.values):
        x = value.clone().requires_grad_()
        h = x
        for group in groups[start:]:
            h = residual(group, truth.model, h, truth.context)
            h = h if group[0].after is None else group[0].after(h)
        (gradient,) = torch.autograd.grad(
            loss_of(specimen.finish(truth.model, h, truth.context)), x
        )  # type: ignore[misc]
        assert norms[start] == pytest.approx(
            float(gradient.norm()), rel=1e-5 if specimen.casts else 1e-9
        ), start
    predicted = report.network.predicted_gradient_norms
    assert predicted is not None
    assert all(p >= n * (1 - 1e-6) for p, n in zip(predicted, norms, strict=True)), (
        "Eq. 7 bounds the gradient"
    )


def loss_by_hand(report: Report, truth: Truth) -> Callable[[Tensor], Tensor]:
    """The loss that the report names, written again."""
    assert report.network is not None and report.network.loss is not None
    kind = report.network.loss["kind"]
    ids = next(
        (a for a in truth.context.args if isinstance(a, Tensor) and not a.is_floating_point()), None
    )
    if kind == "next-token cross entropy":
        assert ids is not None
        return lambda out: nn.functional.cross_entropy(
            out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        )
    assert kind == "random linear functional of the output"

    def functional(out: Tensor) -> Tensor:
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        return (weight.to(out) * out).sum() / out.numel() ** 0.5

    return functional


def test_replay_is_verified_by_the_jacobians_that_measuring_builds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from jacdiag.measure import replay_check
    from jacdiag.measure.linearization import linearise
    from jacdiag.sources import gpt

    torch.manual_seed(0)
    model = gpt.build(
        "vanilla", n_layer=2, n_embd=16, n_head=2, vocab_size=32, block_size=8
    ).double()
    sites = jacdiag.sites(model, torch.randint(32, (2, 8)), dtype=torch.float64)
    by_itself = replay_check.verify_replay(sites)

    # 1. No branch is run by itself, but for the one that was not linearised.
    own_pulls: list[str] = []
    own_pull = replay_check._own_pull

    def noted(site: Any, cotangent: torch.Tensor) -> torch.Tensor:
        own_pulls.append(site.name)
        return own_pull(site, cotangent)

    monkeypatch.setattr(replay_check, "_own_pull", noted)
    check = replay_check.ReplayCheck(sites)
    for site in sites[:3]:
        check.compare(linearise(site))
    errors = check.finish()
    assert own_pulls == [sites[3].name]
    assert errors.keys() == by_itself.keys() and max(errors.values()) < 1e-12

    # 2. One whose Jacobian rounds otherwise is run by itself, too.
    own_pulls.clear()
    other = linearise(sites[0])
    pull = other.branch.pull
    monkeypatch.setattr(other.branch, "pull", lambda w: (1 + 1e-6) * pull(w))
    check = replay_check.ReplayCheck(sites, only=[0])
    check.compare(other)
    assert check.finish()[sites[0].name] < 1e-12
    assert own_pulls == [sites[0].name]

    # 3. One that is not the model's is found, also where the branch itself is right.
    wrong = linearise(sites[0])
    right = wrong.branch.pull
    monkeypatch.setattr(wrong.branch, "pull", lambda w: 1.1 * right(w))
    check = replay_check.ReplayCheck(sites, only=[0])
    check.compare(wrong)
    assert check.finish()[sites[0].name] == pytest.approx(0.1 / 1.1)


def test_replay_is_verified_in_parts_as_in_whole() -> None:
    """Ranks look at some sub-layers each."""
    from jacdiag.measure.replay_check import verify_replay
    from jacdiag.sources import gpt

    torch.manual_seed(0)
    model = gpt.build(
        "vanilla", n_layer=3, n_embd=16, n_head=2, vocab_size=32, block_size=8
    ).double()
    sites = jacdiag.sites(model, torch.randint(32, (2, 8)), dtype=torch.float64)
    whole = verify_replay(sites)
    parts = [
        verify_replay(sites, only=part) for part in (range(2), range(2, 5), range(5, 6), range(0))
    ]
    assert [list(part) for part in parts] == [
        list(whole)[0:2],
        list(whole)[2:5],
        list(whole)[5:6],
        [],
    ]
    assert all(error < 1e-9 for part in [whole, *parts] for error in part.values())
