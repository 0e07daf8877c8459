"""The tracer against models whose sub-layers are known: all of them, no others, and exactly the
model's own values.
"""

from __future__ import annotations

import pytest
import torch
from menagerie import ALL, CORE, Specimen, SublayerTruth, residual, stream
from menagerie.traced import traced
from selection import every_third
from torch import Tensor, nn

import jacdiag
from jacdiag.trace import Sites, Sublayer

everything = pytest.mark.parametrize("specimen", ALL, ids=str)
core = pytest.mark.parametrize("specimen", CORE, ids=str)


def truths(specimen: Specimen) -> tuple[nn.Module, list[tuple[SublayerTruth, Tensor]]]:
    """The model in float64, and every sub-layer on the stream with its true shortcut."""
    model = specimen.build().double()
    context = specimen.context(model, torch.float64)
    values = stream(specimen, model, context)
    return model, [
        (one, x) for group, x in zip(specimen.groups(), values, strict=False) for one in group
    ]


def paired(specimen: Specimen, sites: Sites) -> list[tuple[Sublayer, SublayerTruth]]:
    """Sub-layers found beside sub-layers expected, in the order of the stream; by name where there
    is one.
    """
    assert len(sites) == len(specimen.expected), _listing(sites)
    left = list(sites)
    pairs = []
    for one in specimen.expected:
        fits = [s for s in left if one.name is None or s.name == one.name]
        assert fits, f"{one.name} was not found: {_listing(sites)}"
        left.remove(fits[0])
        pairs.append((fits[0], one))
    return pairs


def _listing(sites: Sites) -> str:
    return (
        "; ".join(
            f"{s.name} {s.kind} {s.placement}{' nested' * s.nested} ({s.line})" for s in sites
        )
        or "nothing"
    )


def pull(fn, x: Tensor, w: Tensor) -> Tensor:
    """J^T w by plain autograd."""
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        y = fn(x)
        if not y.requires_grad:
            return torch.zeros_like(x)
        (g,) = torch.autograd.grad(y, x, w, allow_unused=True)
    return torch.zeros_like(x) if g is None else g


def cotangent(x: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(
        x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(x)


def assert_near(a: Tensor, b: Tensor, tolerance: float, what: str = "") -> None:
    a, b = a.detach().double(), b.detach().double()
    error = float((a - b).norm() / b.norm().clamp_min(1e-12))
    assert error <= tolerance, f"{what} off by {error:.1e}"


# -- the menagerie itself --------------------------------------------------------------------------
@everything
def test_truth_reproduces_the_model(specimen: Specimen) -> None:
    """The truth, summed up along the stream, is the model: if this fails the specimen is wrong, not
    the tracer.
    """
    if specimen.finish is None:
        pytest.skip("this specimen's truth has no stream")
    for dtype, tolerance in (
        (torch.float32, 3e-6),
        (torch.float64, 3e-6 if specimen.casts else 1e-13),
    ):
        model = specimen.build().to(dtype)
        args, kwargs = specimen.arguments(dtype)
        context = specimen.context(model, dtype)
        with torch.no_grad():
            mine = specimen.finish(model, stream(specimen, model, context)[-1], context)
            theirs = model(*args, **kwargs)
        assert_near(mine, tensor_of(theirs), tolerance, specimen.name)


def tensor_of(output) -> Tensor:
    """The first tensor of an output."""
    while not isinstance(output, Tensor):
        output = next(
            iter(
                output.values()
                if isinstance(output, dict)
                else vars(output).values()
                if hasattr(output, "__dict__")
                else output
            )
        )
    return output


def test_specimens_are_reproducible_and_distinct() -> None:
    assert len({s.name for s in ALL}) == len(ALL)
    before = torch.random.get_rng_state()
    for specimen in ALL:
        a, b = specimen.build().state_dict(), specimen.build().state_dict()
        assert all(torch.equal(a[k], b[k]) for k in a), specimen.name
    assert torch.equal(before, torch.random.get_rng_state())


# -- what is found ---------------------------------------------------------------------------------
@everything
def test_finds_exactly_the_sublayers(specimen: Specimen) -> None:
    sites = traced(specimen.name)
    for site, truth in paired(specimen, sites):
        assert truth.kind is not None and truth.placement is not None
        assert truth.differences(site) == []
    names = [s.name for s in sites]
    assert len(set(names)) == len(names), "names must tell sub-layers apart"
    assert [s.index for s in sites] == list(range(len(sites)))
    assert sites.deterministic


@everything
def test_sublayers_are_in_order_of_depth(specimen: Specimen) -> None:
    pairs = [(s, e) for s, e in paired(specimen, traced(specimen.name)) if not e.nested]
    assert [s.depth for s, e in pairs if e.layer is not None] == [
        e.layer for _, e in pairs if e.layer is not None
    ]
    indices = [s.index for s, e in pairs if not e.parallel]
    assert indices == sorted(indices)


@everything
def test_shortcut_gain_equals_the_truth(specimen: Specimen) -> None:
    model = specimen.build().double()
    for site, one in paired(specimen, traced(specimen.name)):
        gain = site.shortcut_gain
        if one.shortcut_gain is None:
            assert gain is None
        elif callable(one.shortcut_gain):
            assert isinstance(gain, Tensor)
            assert_near(gain, one.shortcut_gain(model).expand_as(gain), 1e-12, site.name)
        else:
            assert gain == pytest.approx(one.shortcut_gain, abs=1e-12)


@everything
def test_every_parameter_is_accounted_for(specimen: Specimen) -> None:
    assert set(traced(specimen.name).coverage.uncovered) == set(specimen.uncovered)


# -- exact replay ----------------------------------------------------------------------------------
def assert_replayed(sites: Sites) -> None:
    """Assert that each branch, run twice, and each norm give the recorded values to the bit."""
    for site in sites:
        for _ in range(2):
            assert torch.equal(site.branch(site.shortcut), site.value), site.name
        if site.has_input_norm:
            assert torch.equal(site.norm(site.shortcut), site.normalized), site.name


@everything
def test_replayed_branch_equals_the_recorded_value(specimen: Specimen) -> None:
    assert_replayed(traced(specimen.name))


@pytest.mark.parametrize("specimen", every_third(ALL, always=CORE.__contains__), ids=str)
def test_replayed_branch_equals_the_recorded_value_in_float32(specimen: Specimen) -> None:
    """The precision changes kernels, not what is replayed: one of each kind shows it."""
    assert_replayed(traced(specimen.name, torch.float32))


@everything
def test_shortcut_and_branch_equal_the_truth(specimen: Specimen) -> None:
    model, known = truths(specimen)
    context = specimen.context(model, torch.float64)
    by_expected = {id(e): s for s, e in paired(specimen, traced(specimen.name))}
    for one, x in known:
        site = by_expected[id(one)]
        tolerance = 1e-5 if specimen.casts else 1e-11
        assert_near(site.shortcut, x, tolerance, f"shortcut of {site.name}")
        assert_near(site.value, one.branch(model, x, context), tolerance, f"branch of {site.name}")


@everything
def test_jacobian_equals_the_truth(specimen: Specimen) -> None:
    """J^T w of the branch, its core and the residual map against the truth's, and away from the
    recorded point.
    """
    model, known = truths(specimen)
    context = specimen.context(model, torch.float64)
    tolerance = 1e-5 if specimen.casts else 1e-10
    pairs = {id(e): s for s, e in paired(specimen, traced(specimen.name))}
    groups = {id(e): g for g in specimen.groups() for e in g}
    for one, x in known:
        site = pairs[id(one)]
        w = cotangent(site.value)
        want = pull(lambda t, e=one: e.branch(model, t, context), x, w)
        assert_near(pull(site.branch, site.shortcut, w), want, tolerance, f"J of {site.name}")
        if one.entry is not None and one.placement in ("pre", "sandwich"):
            z = one.entry.normalise(model, x)
            assert_near(site.normalized, z, tolerance, f"z of {site.name}")
            want = pull(lambda t, e=one: e.core(model, t, context), z, w)
            assert_near(
                pull(site.core, site.normalized, w), want, tolerance, f"core J of {site.name}"
            )
            assert_near(
                site.core(site.norm(site.shortcut)),
                site.value,
                tolerance,
                f"core o norm of {site.name}",
            )
        if not one.parallel and one.after is None:
            want = pull(lambda t, e=one: residual(groups[id(e)], model, t, context), x, w)
            assert_near(
                pull(site.residual, site.shortcut, w), want, tolerance, f"residual of {site.name}"
            )


@everything
def test_nested_branches_equal_the_truth(specimen: Specimen) -> None:
    model = specimen.build().double()
    context = specimen.context(model, torch.float64)
    for site, one in paired(specimen, traced(specimen.name)):
        if one.nested and one.body is not None:
            assert_near(site.value, one.branch(model, site.shortcut, context), 1e-11, site.name)


@everything
def test_jacobian_by_finite_differences(specimen: Specimen) -> None:
    """A branch's value away from the recorded point: what a recorded cache or a stale tensor gets
    wrong.
    """
    for site in traced(specimen.name):
        x, w, step = site.shortcut, cotangent(site.value, seed=2), 1e-6
        # each token moves by its own size
        u = cotangent(x, seed=1) * x.square().mean(-1, keepdim=True).sqrt()
        ahead, behind = (site.branch(x + s * step * u) for s in (1, -1))
        slope = (ahead - behind) / (2 * step)
        product = (pull(site.branch, x, w) * u).sum()
        assert abs((slope * w).sum() - product) <= 1e-5 * slope.norm() * w.norm(), site.name


@core
def test_torch_func_transforms_run_on_branches(specimen: Specimen) -> None:
    """Double transpose by torch.func: <J u, w> = <u, J^T w> relative to |J u| |w|."""
    for site in traced(specimen.name):
        u, w = cotangent(site.shortcut, 3), cotangent(site.value, 4)
        _, back = torch.func.vjp(site.branch, site.shortcut)
        _, forward = torch.func.vjp(lambda t: back(t)[0], torch.zeros_like(w))  # noqa: B023
        (ju,), (jw,) = forward(u), back(w)
        assert abs((ju * w).sum() - (u * jw).sum()) <= 1e-12 * ju.norm() * w.norm()


# -- independence of the caller --------------------------------------------------------------------
@pytest.mark.parametrize("specimen", every_third(ALL, always=CORE.__contains__), ids=str)
def test_records_do_not_depend_on_the_caller(specimen: Specimen) -> None:
    """A second run, under no_grad, inference_mode or in train mode, gives the same sub-layers and
    the same bits.
    """
    args, kwargs = specimen.arguments()
    first = traced(specimen.name)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        model = specimen.build()
        model.train(mode is torch.enable_grad)
        with mode():
            again = jacdiag.sites(model, *args, dtype=torch.float64, **kwargs)
        for a, b in zip(first, again, strict=True):
            for field in ("name", "kind", "placement", "depth", "parameters"):
                assert getattr(a, field) == getattr(b, field)
            assert torch.equal(a.shortcut, b.shortcut) and torch.equal(a.value, b.value)
            w = cotangent(a.value)
            assert torch.equal(pull(a.branch, a.shortcut, w), pull(b.branch, b.shortcut, w))
