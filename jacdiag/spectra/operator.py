"""The Jacobian as a batched linear operator, known by its products J u and J^T w.

It is built once, each product costs about one forward, and products are counted. Operators that
share a Jacobian can share its products too (`products_together`). The norms of one sub-layer (core,
branch, residual) all lead through one linearised branch. A probe of one short sequence gives matrix
products of few rows, which keep a processor half idle: on a CPU three vectors of 64 tokens cost as
much as two one by one.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Literal, Protocol

import torch
from torch import Tensor

from jacdiag.devices.float32_precision import full_precision, is_in_full_precision
from jacdiag.devices.packed_download import download
from jacdiag.errors import MeasureError

Map = Callable[[Tensor], Tensor]
Way = Literal["push", "pull"]
Steps = Generator[tuple["JacobianOperator", Tensor], Tensor, Tensor]


class Operator:
    """P independent matrices of shape (m, n), known by their products only.

    Attributes:
        problems, codomain, domain: P, m and n.
        dtype, device: of the vectors.
        products: how many times `push` or `pull` ran; one counts for all P problems.
    """

    problems: int
    domain: int
    codomain: int
    dtype: torch.dtype
    device: torch.device
    products: int = 0

    def push(self, u: Tensor) -> Tensor:
        """Return J u: (P, n) -> (P, m)."""
        self.products += 1
        return self._push(u)

    def pull(self, w: Tensor) -> Tensor:
        """Return J^T w: (P, m) -> (P, n)."""
        self.products += 1
        return self._pull(w)

    def _push(self, u: Tensor) -> Tensor:
        raise NotImplementedError

    def _pull(self, w: Tensor) -> Tensor:
        raise NotImplementedError

    def steps(self, way: Way, vector: Tensor) -> Steps:
        """Make the product as a generator that yields the Jacobian products that it needs.

        `products_together` makes them, for several operators at once.
        """
        if way == "push":
            return self._push(vector)
        return self._pull(vector)
        yield  # never reached: it makes this a generator, one that needs nothing

    @property
    def jacobians(self) -> tuple[JacobianOperator, ...]:
        """The linearised functions in it."""
        return ()

    def release(self) -> None:
        """Drop graphs; the operator cannot be used afterwards."""


class JacobianOperator(Operator):
    """The Jacobian of `fn` at `x`, as one problem per index of the batch dimensions.

    `pull` is the vjp of one forward, `push` the vjp of that pull (the transpose of the transpose),
    so that only a differentiable backward is needed and the primal is never computed again. The
    graph of the first pull is kept for it. Where torch.func refuses the function (a custom
    autograd.Function without setup_context, saved-tensor hooks), the same two transposes are made
    with torch.autograd.

    Args:
        fn: the function; its output may have another shape than x, with the batch dimensions at the
            same places.
        x: the point.
        batch_dims: dimensions over which problems are independent; () makes one problem of
            everything.

    Attributes:
        value: fn(x).
        stacks: whether products with several vectors can be made in one call. The first try shows
            it.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> op = JacobianOperator(lambda x: x**2, x)
        >>> op.push(torch.ones(1, 2)), op.pull(torch.ones(1, 2))
        (tensor([[2., 4.]]), tensor([[2., 4.]]))
    """

    def __init__(self, fn: Map, x: Tensor, batch_dims: Sequence[int] = (0,)) -> None:
        self.x_shape, self.dtype, self.device = x.shape, x.dtype, x.device
        self.stacks = True
        self._kept: tuple[Tensor, Tensor] | None = None
        self._push_map: Map | None = None
        self._pulls: _Pulls
        with _graphs():
            point = x.detach().clone()
            self._pulls_by_autograd: Callable[[], _Pulls] | None = partial(
                _PullsByAutograd, fn, point
            )
            try:
                self._pulls = _PullsByFunc(fn, point)
            except RuntimeError:
                self._pulls = self._pulls_by_autograd()
        self.value = self._pulls.value
        self.set_batch_dims(batch_dims)

    def set_batch_dims(self, dims: Sequence[int]) -> None:
        """Set which dimensions are independent, without rebuilding the operator.

        The product that was kept is dropped, since its rows were of other problems.

        Raises:
            MeasureError: the output has no such dimension of the same size, so that problems cannot
                be separated.
        """
        # 1. The dimensions of x.
        rank = len(self.x_shape)
        for d in dims:
            if not -rank <= d < rank:
                raise MeasureError(
                    "batch_dims name a dimension that x does not have",
                    got=f"{tuple(dims)} of {rank}",
                )
        self.dims = tuple(sorted({d % rank for d in dims}))
        self._kept = None

        # 2. The output has to have them too.
        y_shape = self.value.shape
        for d in self.dims:
            is_kept = d < len(y_shape) and y_shape[d] == self.x_shape[d]
            if not is_kept:
                raise MeasureError(
                    "the output does not keep the batch dimensions",
                    got=f"dimensions {self.dims} of {tuple(self.x_shape)}, "
                    f"compared with {tuple(y_shape)}",
                    hint="batch_dims=() makes one problem of everything",
                )

        # 3. The sizes of one problem.
        self.problems = math.prod(self.x_shape[d] for d in self.dims)
        self.domain = self.x_shape.numel() // self.problems
        self.codomain = self.value.numel() // self.problems

    def keep(self, w: Tensor) -> None:
        """Make J^T w, and keep it: `pull` with this very object costs no product any more.

        Args:
            w: (P, m). Neither this vector nor its product must be written to.
        """
        self._kept = (w, self.pull(w))

    def pull_shaped(self, w: Tensor) -> Tensor:
        """Return J^T w in the shapes of fn: w like fn(x), result like x. Counts as a product."""
        self.products += 1
        with making_products():
            return self._pulled(_copied(w))

    def push(self, u: Tensor) -> Tensor:
        """Return J u: (P, n) -> (P, m)."""
        (product,) = self.products_of("push", [u])
        return product

    def pull(self, w: Tensor) -> Tensor:
        """Return J^T w: (P, m) -> (P, n)."""
        (product,) = self.products_of("pull", [w])
        return product

    def steps(self, way: Way, vector: Tensor) -> Steps:  # noqa: ARG002  (of Operator; a single map has one way)
        """Make the product as a generator that yields itself as the only Jacobian."""
        return (yield self, vector)

    @property
    def jacobians(self) -> tuple[JacobianOperator, ...]:
        """The operator itself."""
        return (self,)

    def products_of(self, way: Way, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return products with several vectors, made in one call if the vectors are short."""
        if way == "push" or self._kept is None:
            return self._made(way, vectors)

        # 1. Make those that are not kept.
        start, product = self._kept
        others = iter(self._made(way, [vector for vector in vectors if vector is not start]))

        # 2. All of them, in their order.
        products: list[Tensor] = []
        for vector in vectors:
            products.append(product if vector is start else next(others))
        return products

    def _made(self, way: Way, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Make products with several vectors, which count."""
        self.products += len(vectors)
        product: Map = self._pushed
        shape = self.x_shape
        if way == "pull":
            product, shape = self._pulled, self.value.shape

        # 1. How many fit into one call. The very first call keeps a graph: it takes one at a time.
        at_once = 1
        if self.stacks and self._push_map is not None:
            at_once = max(1, _NARROW // max(1, shape.numel()))

        # 2. The products.
        results: list[Tensor] = []
        with making_products():
            for first in range(0, len(vectors), at_once):
                chunk = [
                    _shaped_view(v, self.dims, shape) for v in vectors[first : first + at_once]
                ]
                if len(chunk) == 1:
                    results.append(product(_copied(chunk[0])))
                else:
                    results += self._stacked(product, chunk)
        return [flat(t, self.dims) for t in results]

    def _stacked(self, product: Map, vectors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return a product with each of several vectors, by vmap if the function allows it."""
        # 1. In one new tensor: `torch.stack` may take over the strides of what it stacks.
        stack = vectors[0].new_empty((len(vectors), *vectors[0].shape))
        for place, vector in zip(stack, vectors, strict=True):
            place.copy_(vector)

        # 2. All at once.
        if self.stacks:
            try:
                with warnings.catch_warnings():
                    # one by one then, inside torch
                    warnings.filterwarnings("ignore", message=".*batching rule")
                    return torch.func.vmap(product)(stack).unbind()
            except RuntimeError:  # code that looks at values, or writes into tensors of its own
                self.stacks = False

        # 3. One after the other.
        return [product(t) for t in stack]

    def _pulled(self, w: Tensor) -> Tensor:
        """Return J^T w in the shapes of fn. The first one keeps the graph, for `_pushed`."""
        if self._push_map is None:
            with _graphs():
                return self._first_pulled(w.detach())

        return self._pulls.pull(w)

    def _first_pulled(self, w: Tensor) -> Tensor:
        """Return J^T w, and keep the graph by which J u is made from now on."""
        # 1. The transpose of the pull. torch.func may refuse it where it made the pull itself.
        by_autograd = self._pulls_by_autograd
        try:
            pulled, self._push_map = self._pulls.transposed_at(w)
        except RuntimeError:
            if by_autograd is None or isinstance(self._pulls, _PullsByAutograd):
                raise
            self._pulls = _Released()  # its graph is freed before the other is built
            self._pulls = by_autograd()
            pulled, self._push_map = self._pulls.transposed_at(w)

        # 2. The function is not run again.
        self._pulls_by_autograd = None
        return pulled

    def _pushed(self, u: Tensor) -> Tensor:
        """Return J u in the shapes of fn."""
        if self._push_map is None:
            self._pulled(torch.zeros_like(self.value))
        assert self._push_map is not None
        return self._push_map(u)

    def release(self) -> None:
        """Drop graphs; the operator cannot be used afterwards."""
        self._push_map = _released
        self._pulls = _Released()
        self._pulls_by_autograd = None
        self._kept = None


# numbers in vectors that are worth stacking; wider products gain nothing, and memory would grow
_NARROW = 1 << 20


def flat(t: Tensor, dims: Sequence[int]) -> Tensor:
    """Return a tensor of any shape as (P, n), one row per index of the batch dimensions."""
    problems = math.prod(t.shape[d] for d in dims)
    leading = tuple(range(len(dims)))
    if tuple(dims) != leading:
        t = t.movedim(tuple(dims), leading)
    return t.reshape(problems, -1)


def shaped(rows: Tensor, dims: Sequence[int], shape: torch.Size) -> Tensor:
    """Return rows (P, n) in a shape; the inverse of `flat`.

    Args:
        rows: one per index of the batch dimensions.
        dims: the batch dimensions.
        shape: of the result.
    """
    return _shaped_view(rows, dims, shape).contiguous()


def _shaped_view(rows: Tensor, dims: Sequence[int], shape: torch.Size) -> Tensor:
    """Return what `shaped` does, with strides that no gradient may have."""
    leading = tuple(range(len(dims)))
    if tuple(dims) == leading:
        return rows.reshape(shape)

    lead = [shape[d] for d in dims]
    inner = [n for d, n in enumerate(shape) if d not in dims]
    apart = rows.reshape(*lead, *inner)
    return apart.movedim(leading, tuple(dims))


def _copied(vector: Tensor) -> Tensor:
    """Return a copy whose strides are those of a new tensor.

    A backward of the model's own code may write into the gradient that it is given. It may also
    misread the strides of a permuted view, which no gradient has in training: on the CPU, the
    backward of a batch norm in eval mode returns wrong numbers for a gradient of shape (1, C, H, W)
    whose first stride is not C * H * W (torch 2.6 to 2.13). `contiguous()` is not enough, because
    it keeps the stride of a dimension of 1.
    """
    return vector.clone(memory_format=torch.contiguous_format)


def _checked(value: object) -> Tensor:
    """Return what a function gave back; raise unless it is a floating tensor."""
    if not isinstance(value, Tensor):
        got = f"type {type(value).__name__}"
        raise MeasureError("the function returned no floating tensor", got=got)
    if not value.is_floating_point():
        raise MeasureError("the function returned no floating tensor", got=f"{value.dtype}")
    return value


@contextmanager
def _graphs() -> Iterator[None]:
    """Build graphs in full precision, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.enable_grad(), full_precision():
        yield


@contextmanager
def making_products() -> Iterator[None]:
    """Make products in full precision, whatever mode the caller is in.

    Each product enters it. Whoever makes many of them enters it around all: it takes no time then.
    """
    is_entered = not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    if is_entered and is_in_full_precision():
        yield
        return

    with torch.inference_mode(False), torch.no_grad(), full_precision():
        yield


class _Pulls(Protocol):
    """J^T w of a function at a point, and the transpose of that.

    Attributes:
        value: of the function at the point.
    """

    value: Tensor

    def pull(self, w: Tensor) -> Tensor:
        """Return J^T w."""

    def transposed_at(self, w: Tensor) -> tuple[Tensor, Map]:
        """Return J^T w, and J u as a function of u, by the graph of this very product."""


class _PullsByFunc:
    """Pulls by torch.func."""

    def __init__(self, fn: Map, x: Tensor) -> None:
        value, self._vjp = torch.func.vjp(lambda x: _checked(fn(x)), x)  # type: ignore[misc]
        self.value = value.detach()

    def pull(self, w: Tensor) -> Tensor:
        """Return J^T w."""
        pulled: Tensor = self._vjp(w)[0]
        return pulled

    def transposed_at(self, w: Tensor) -> tuple[Tensor, Map]:
        """Return J^T w, and J u as a function of u."""
        # A copy, because a backward may write into the gradient that it is given.
        pulled, push = torch.func.vjp(lambda w: self._vjp(w.clone())[0], w)  # type: ignore[misc]
        return pulled.detach(), lambda u: push(u)[0]


class _PullsByAutograd:
    """Pulls by torch.autograd."""

    def __init__(self, fn: Map, x: Tensor) -> None:
        self._x = x.requires_grad_()
        self._y = _checked(fn(self._x))
        self.value = self._y.detach()

    def pull(self, w: Tensor) -> Tensor:
        """Return J^T w."""
        return gradient(self._y, self._x, w)

    def transposed_at(self, w: Tensor) -> tuple[Tensor, Map]:
        """Return J^T w, and J u as a function of u."""
        w = w.requires_grad_()
        pulled = gradient(self._y, self._x, w.clone(), keep_graph=True)  # a copy, as above
        return pulled.detach(), lambda u: gradient(pulled, w, u)


class _Released:
    """Stands for the pulls of an operator whose graphs were dropped."""

    value = torch.empty(0)

    def pull(self, w: Tensor) -> Tensor:
        """Raise."""
        return _released(w)

    def transposed_at(self, w: Tensor) -> tuple[Tensor, Map]:
        """Raise."""
        return _released(w), _released


def _released(_: Tensor) -> Tensor:
    raise RuntimeError("this operator was released")


def gradient(y: Tensor, x: Tensor, w: Tensor, keep_graph: bool = False) -> Tensor:
    """Return J^T w of the map from x to y; zeros if y does not depend on x.

    Args:
        y: value of the map.
        x: its point.
        w: of the shape of y.
        keep_graph: keep the graph of this product, too.
    """
    if not y.requires_grad:
        return torch.zeros_like(x)

    (gradient,) = torch.autograd.grad(
        y, x, w, retain_graph=True, create_graph=keep_graph, allow_unused=True
    )
    if gradient is None:
        return torch.zeros_like(x)
    return gradient


def independent_dims(
    pull: Map,
    x_shape: torch.Size,
    y_shape: torch.Size,
    feature_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> tuple[int, ...]:
    """Find the dimensions over which a Jacobian is block diagonal; none is taken for granted.

    Two pulls are spent, or three if two candidate dimensions have the same size. A cotangent lives
    on one index of every dimension but features: a middle one, then the last. (Under a causal mask
    the first token reaches only itself, which shows nothing.) A dimension is independent if every
    pull is exactly zero off that index along it.

    Args:
        pull: J^T w in the shapes of x and y.
        x_shape: of the point.
        y_shape: of the function's value.
        feature_dim: the dimension that is never independent.
        dtype: of the cotangents.
        device: of the cotangents.
        generator: of their random numbers.

    Returns:
        The independent dimensions, ascending; dimensions of size 1 count as independent.
    """
    if len(x_shape) != len(y_shape):
        return ()
    feature = feature_dim % len(x_shape)
    candidates = _candidates(x_shape, y_shape, feature)

    # 1. A cotangent for every place, on one index of every dimension but the features.
    all_places = _places_to_look_at(y_shape, set(candidates))
    vectors = draw_cotangents(x_shape, y_shape, feature_dim, generator)
    uploaded = torch.stack(vectors).to(dtype).to(device)

    # 2. For every place and dimension: whether the pull leaves that index.
    leaves = []
    for places, vector in zip(all_places, uploaded, strict=True):
        w = torch.zeros(y_shape, dtype=dtype, device=device)
        index: list[int | slice] = list(places)
        index[feature] = slice(None)
        w[tuple(index)] = vector
        touched = pull(w) != 0
        for d in candidates:
            along = touched.movedim(d, 0).flatten(1).any(1)
            # Not by a write at an index, which would be an upload.
            leaves.append(along[: places[d]].any() | along[places[d] + 1 :].any())

    # 3. One look at all of them. A dimension is independent if no pull leaves its index.
    dependent = set()
    for (_, d), is_left in zip(product(all_places, candidates), download(leaves), strict=True):
        if is_left:
            dependent.add(d)
    return tuple(d for d in candidates if d not in dependent)


def draw_cotangents(
    x_shape: torch.Size, y_shape: torch.Size, feature_dim: int, generator: torch.Generator
) -> list[Tensor]:
    """Draw the vectors that `independent_dims` pulls, one for each place.

    Args:
        x_shape: of the point.
        y_shape: of the function's value, of as many dimensions.
        feature_dim: along which a vector lies.
        generator: of the random numbers.
    """
    feature = feature_dim % len(x_shape)
    places = _places_to_look_at(y_shape, set(_candidates(x_shape, y_shape, feature)))
    return [torch.randn(y_shape[feature], generator=generator, dtype=torch.float64) for _ in places]


def _candidates(x_shape: torch.Size, y_shape: torch.Size, feature: int) -> list[int]:
    """Return the dimensions that may be independent: of the same size, and not the features."""
    same_size = {d for d in range(len(x_shape)) if x_shape[d] == y_shape[d]}
    return sorted(same_size - {feature})


def _places_to_look_at(shape: torch.Size, candidates: set[int]) -> list[list[int]]:
    """Return one index per dimension for every pull: the middle, the end, one off the diagonal.

    The third is needed only if two candidates have the same size: a map that swaps them (a
    transpose of batch and tokens) leaves the diagonal where it is, and looks independent there.
    """
    # 1. The places of every pull.
    middle = [n // 2 for n in shape]
    end = [n - 1 for n in shape]
    places = [middle, end]

    # 2. One more, if two candidates could be swapped. Sizes of 1 hold one index only.
    candidate_sizes = [shape[d] for d in candidates]
    sizes = [size for size in candidate_sizes if size > 1]
    has_equal_sizes = len(set(sizes)) < len(sizes)
    if has_equal_sizes:
        off_diagonal = [(n - 1 - d) % n for d, n in enumerate(shape)]
        places.append(off_diagonal)
    return places


def products_together(
    way: Way, operators: Sequence[Operator], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """Return one product with each of several operators.

    Vectors that meet at the same Jacobian pass it in one call.

    Args:
        way: "push" for J u, "pull" for J^T w.
        operators: any number of them.
        vectors: one for each operator.
    """
    # 1. One alone makes its product by itself.
    if len(operators) == 1:
        operator, vector = operators[0], vectors[0]
        return [operator.push(vector) if way == "push" else operator.pull(vector)]

    # 2. How many operators hold each Jacobian.
    holders: Counter[JacobianOperator] = Counter()
    for operator in operators:
        holders.update(set(operator.jacobians))

    # 3. An operator's product waits for one Jacobian at a time: the Jacobian, the vector to be
    # multiplied, and the generator that goes on with the answer.
    results: list[Tensor | None] = [None] * len(operators)
    waiting: dict[int, tuple[JacobianOperator, Tensor, Steps]] = {}

    def resume(k: int, steps: Steps, answer: Tensor | None) -> None:
        """Go on with one operator's product until it needs the next Jacobian, or ends."""
        try:
            if answer is None:
                jacobian, vector = next(steps)
            else:
                jacobian, vector = steps.send(answer)
            waiting[k] = jacobian, vector, steps
        except StopIteration as end:
            results[k] = end.value
            waiting.pop(k, None)

    # 4. Begin all products.
    for k, (operator, vector) in enumerate(zip(operators, vectors, strict=True)):
        if operator not in operator.jacobians:  # a Jacobian counts for itself
            operator.products += 1
        resume(k, operator.steps(way, vector), None)

    # 5. Make the products with one Jacobian after the other. What few operators hold comes first:
    # the others then meet at what they have in common.
    while waiting:
        awaited = [jacobian for jacobian, _, _ in waiting.values()]
        rarest = min(awaited, key=holders.__getitem__)
        group = [k for k, (jacobian, _, _) in waiting.items() if jacobian is rarest]
        answers = rarest.products_of(way, [waiting[k][1] for k in group])
        for k, answer in zip(group, answers, strict=True):
            resume(k, waiting[k][2], answer)
    return [result for result in results if result is not None]
