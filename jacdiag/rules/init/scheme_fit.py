"""Compare the weights of one model with a scheme: what it expects of each, and whether they agree.

A fused matrix is judged section by section (queries, keys, values) where the scheme treats them
differently. Matrices that start at zero on purpose are not judged by a scheme that the model was
found to follow: `zero_matrices.py` says which these are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from jacdiag.records import ContractRecord, WeightRecord
from jacdiag.records.init_contract import FUSED, SectionRecord
from jacdiag.rules.grouping import group_by
from jacdiag.rules.init.formula import Formula
from jacdiag.rules.init.schemes import (
    MATRICES,
    OUTSIDE,
    VECTORS,
    Scheme,
    allowed_with_any_scheme,
)
from jacdiag.rules.init.weight_facts import (
    StdInterval,
    is_constant,
    is_vector,
    is_zero,
    parameters_of,
    sampling_interval,
    std_of,
    with_role,
)
from jacdiag.rules.init.zero_matrices import drawn_among_zeros, zero_on_purpose

# One attention draws these alike: by one variant of a formula, never each by another.
_TOGETHER = ("W_Q", "W_K", "W_V")
Spread = tuple[float, float]  # interval of a base std, relative
# What the value of a formula depends on in one model: the formulas, fan_in, fan_out and the layer.
_Sizes = tuple[tuple[Formula, ...], int | None, int | None, int | None]
TABLES = ("embedding", "positions", "head")
# Sub-layers whose matrices a scheme covers; "" in reports from before the kind was kept. Inside a
# recurrent or convolutional mixer every section has an init of its own.
_KINDS = ("", "attention", "cross-attention", "mlp", "moe")
# Of so few inputs a layer may have std 1 by LeCun's or Xavier's formula.
_FEW_INPUTS = 16
# An embedding or positions so small were meant to be: a norm follows them (RWKV 1e-4,
# x-transformers 1e-5). If none does, JD102 reports the small stream. The limit lies between 1e-4
# and 4e-4, the variance of 0.02 taken for its std.
_TINY = 2e-4
# A vector is an expected constant up to the rounding of low precisions.
_EXACT_RELATIVE, _EXACT_ABSOLUTE = 1e-3, 1e-12


@dataclass(frozen=True)
class Piece:
    """What is compared with one value: an entire weight, or the rows of a fused one with one role.

    Attributes:
        weight: The record, of these rows alone if `section` says so.
        section: Their role; "" for an entire weight.
        rows: Where they lie in the fused one; None for an entire weight.
    """

    weight: WeightRecord
    section: str = ""
    rows: SectionRecord | None = None


@dataclass(frozen=True)
class Mismatch:
    """A piece that is not what was expected.

    Attributes:
        piece: The weight, or its section.
        value: The expected std (or value), the nearest if there are several.
        formula: Where it comes from.
    """

    piece: Piece
    value: float
    formula: Formula


@dataclass(frozen=True)
class Yardstick:
    """A scheme with its base std, for one model.

    Attributes:
        contract: The model's weights.
        scheme: What they are compared with.
        s: The base std where the scheme leaves it open.
        spread: Interval of `s`, relative.
        is_followed: Whether the model was found to follow the scheme. If not, the scheme is that of
            its family, or was pinned. Then every weight is compared with it, without exception.
        judges_tables: Whether embedding, positions and head are judged.
        looks: The mistake that the entire model was made with; "" for none.
    """

    contract: ContractRecord
    scheme: Scheme
    s: float | None = None
    spread: Spread = (1.0, 1.0)
    is_followed: bool = True
    judges_tables: bool = True
    looks: str = ""

    @classmethod
    def given(cls, contract: ContractRecord, scheme: Scheme) -> Yardstick:
        """Return the yardstick of a scheme that was given: pinned, or published for the family."""
        return cls(contract, scheme, is_followed=False)

    @cached_property
    def judged_by_zeros(self) -> frozenset[str]:
        """Names of the matrices that start at zero on purpose, or that should have done so."""
        drawn = [weight for weight, _ in drawn_among_zeros(self.contract)]
        return zero_on_purpose(self.contract).union(parameters_of(drawn))

    @cached_property
    def has_unit_draws(self) -> bool:
        """Whether matrices have std 1, where the scheme says something else.

        The default of torch.nn.init.normal_ is right for positions in some models. Where it was
        drawn into matrices by mistake, positions with it are part of the mistake.
        """
        matrices = with_role(self.contract.weights, *MATRICES)
        for weight in filter(is_of_unit_spread, matrices):
            is_meant = self.agrees_by_itself(weight)
            if not is_meant:
                return True

        return False

    def mismatches(self, weight: WeightRecord) -> list[Mismatch] | None:
        """Return what about a weight is not as the scheme says.

        Returns:
            [] if the weight agrees, None if the scheme says nothing about it.
        """
        if not self._judges(weight):
            return None

        # 1. The reading that leaves the fewest; the first of several.
        readings = map(self._compare, self._readings(weight))
        stated = [mismatches for mismatches in readings if mismatches is not None]
        fewest = min(stated, key=len, default=None)
        if fewest is None:
            return None

        # 2. Of a fused matrix, the sections that are wrong.
        located: list[Mismatch] = []
        for mismatch in fewest:
            located += self._sections_at_fault(mismatch) or [mismatch]
        return located

    def _sections_at_fault(self, mismatch: Mismatch) -> list[Mismatch]:
        """Return the sections of an entire weight that are wrong; [] if all are wrong alike."""
        # 1. Its sections, each with the value of the entire weight.
        piece = mismatch.piece
        orders = _orders_of_sections(piece.weight)
        if piece.section or not orders:
            return []
        sections = list(_pieces(piece.weight, orders[0], fan_out=piece.weight.fan_out))

        # 2. Those that do not have it.
        at_fault: list[Mismatch] = []
        for section in sections:
            if not holds(section.weight, mismatch.value, self.spread):
                at_fault.append(Mismatch(section, mismatch.value, mismatch.formula))

        # 3. Where all are off alike, the matrix is.
        are_all = len(at_fault) == len(sections)
        if are_all and _are_alike(sections):
            return []

        return at_fault

    def values(self, weight: WeightRecord) -> Mapping[Formula, float]:
        """Return the values that the scheme states for an entire weight or a section of one."""
        variants = self._variants.get(_attention_of(weight), frozenset[int]())
        return self._values_of(weight, variants)

    def _values_of(
        self, weight: WeightRecord, variants: Collection[int]
    ) -> Mapping[Formula, float]:
        """Return the values of some variants of the formula for queries, keys or values.

        All variants count if none is listed.
        """
        # 1. Only queries, keys and values have variants that go together.
        values = self._known_values(weight)
        if not variants or weight.role not in _TOGETHER:
            return values

        # 2. The number of a variant is its place among the formulas.
        counted: dict[Formula, float] = {}
        for number, formula in enumerate(self.scheme.of(weight)):
            is_counted = number in variants
            if is_counted and formula in values:
                counted[formula] = values[formula]

        return counted

    def _known_values(self, weight: WeightRecord) -> Mapping[Formula, float]:
        """Return the values of all formulas for a weight whose variables are known."""
        # 1. Weights of the same sizes in the same layer have the same values.
        formulas = self.scheme.of(weight)
        key = (formulas, weight.fan_in, weight.fan_out, weight.layer)
        values = self._values_by_sizes.get(key)
        if values is not None:
            return values

        # 2. A variable of a formula may not be known for every weight.
        known = variables(self.contract, weight, self.s)
        values = {}
        for formula in formulas:
            value = formula.value(known)
            if value is not None:
                values[formula] = value

        self._values_by_sizes[key] = values
        return values

    @cached_property
    def _values_by_sizes(self) -> dict[_Sizes, Mapping[Formula, float]]:
        """Values of formulas for weights of some sizes in some layer, each when first needed."""
        return {}

    @cached_property
    def _variants(self) -> Mapping[str, frozenset[int]]:
        """Variants that an attention may have been drawn by, by its name."""
        projections = with_role(self.contract.weights, *_TOGETHER)
        variants: dict[str, frozenset[int]] = {}
        for attention, weights in group_by(projections, _attention_of).items():
            variants[attention] = self._usual_variants(weights)
        return variants

    def _usual_variants(self, weights: Sequence[WeightRecord]) -> frozenset[int]:
        """Return the variants with which most of these queries, keys and values agree.

        None are returned if all are open.
        """
        # 1. A scheme that was given is meant with all its variants.
        if not self.is_followed:
            return frozenset()

        # 2. All of them need the same number of variants.
        counts = {len(self.scheme.of(weight)) for weight in weights}
        if len(counts) != 1:
            return frozenset()

        # 3. Count how many weights agree with each variant, none of them included.
        (count,) = counts
        votes = [0] * count
        for weight in weights:
            for number in self._variants_that_agree(weight):
                votes[number] += 1

        # 4. Several may agree with equally many.
        most = max(votes, default=0)
        return frozenset(number for number in range(count) if votes[number] == most)

    def _variants_that_agree(self, weight: WeightRecord) -> Iterator[int]:
        """Yield the places of the formulas whose value a weight has."""
        values = self._known_values(weight)
        for number, formula in enumerate(self.scheme.of(weight)):
            value = values.get(formula)
            if value is not None and holds(weight, value, self.spread):
                yield number

    def agrees_by_itself(self, weight: WeightRecord) -> bool:
        """Return whether an entire weight has a value that the scheme itself states."""
        values = self.values(weight).values()
        return any(holds(weight, value, self.spread) for value in values)

    def _judges(self, weight: WeightRecord) -> bool:
        """Return whether the scheme has a say about a weight of this model."""
        # 1. A scheme that was given has a say about every weight.
        if not self.is_followed:
            return True

        # 2. Embedding, positions and head.
        if weight.role == "positions" and not _is_lookup(weight):
            return self._are_positions_of_mistake(weight)
        if weight.role in TABLES and not self.judges_tables:
            return self._are_positions_of_mistake(weight)

        # 3. Matrices of the sub-layers.
        width = int(self.contract.sizes.get("d", 0))
        if weight.role in MATRICES and not is_projection(weight, width):
            return False

        # 4. What starts at zero on purpose, or does not although the others of its name do.
        if _is_open_gate(weight):
            return False
        return weight.parameter not in self.judged_by_zeros

    def _are_positions_of_mistake(self, weight: WeightRecord) -> bool:
        """Return whether positions have the default std that matrices have by mistake."""
        # Embeddings may have that std on purpose.
        is_table_of_positions = weight.role == "positions"
        if not is_table_of_positions:
            return False
        return self.has_unit_draws and is_of_unit_spread(weight)

    def _readings(self, weight: WeightRecord) -> Iterator[list[Piece]]:
        """Yield the ways to take a weight: as it is, or as its sections.

        Open are the order of the halves of a gated FFN, and whether fan_out is that of the section
        or of the entire matrix.
        """
        # 1. As it is, unless the scheme treats the sections differently.
        is_named = bool(self.scheme.named(weight))
        sections_have_formulas = self._has_formulas_for_sections(weight)
        if is_named or not sections_have_formulas:
            yield [Piece(weight)]

        # 2. A value that was given for just this weight is that of all of it.
        if is_named and not self.is_followed:
            return

        # 3. As its sections, where they may have values of their own.
        if not weight.sections:
            return
        may_differ = sections_have_formulas or self._depends_on_fan_out(weight)
        if not may_differ:
            return
        for order in _orders_of_sections(weight):
            yield list(_pieces(weight, order))
            yield list(_pieces(weight, order, fan_out=weight.fan_out))

    def _depends_on_fan_out(self, weight: WeightRecord) -> bool:
        """Return whether a formula for a weight has the size of its output in it."""
        formulas = self.scheme.of(weight)
        return any("fan_out" in formula.names for formula in formulas)

    def _has_formulas_for_sections(self, weight: WeightRecord) -> bool:
        """Return whether the scheme states a value for a section that a weight has or may have."""
        is_one_matrix = not weight.sections and weight.role not in FUSED
        if is_one_matrix:
            return False
        roles = {section.role for section in weight.sections}

        # A fused matrix may hold sections that its record does not list.
        if self.is_followed:
            roles.update(FUSED.get(weight.role, ()))

        return not roles.isdisjoint(self.scheme.formulas)

    def _compare(self, pieces: Sequence[Piece]) -> list[Mismatch] | None:
        """Return the pieces that differ; None if the scheme states nothing for any of them."""
        # 1. Queries, keys and values are drawn by one variant of their formula.
        sections = [piece.weight for piece in pieces if piece.section in _TOGETHER]
        variants = frozenset[int]()
        if sections:
            variants = self._usual_variants(sections)

        # 2. Each piece compared with its values.
        mismatches: list[Mismatch] = []
        is_stated = False
        for piece in pieces:
            if sections:
                values = self._values_of(piece.weight, variants)
            else:
                values = self.values(piece.weight)
            if not values:
                continue

            is_stated = True
            if not self._agrees(piece.weight, values):
                mismatches.append(_nearest_mismatch(piece, values))

        # 3. Without a value nothing was compared.
        if not is_stated:
            return None
        return mismatches

    def _agrees(self, weight: WeightRecord, values: Mapping[Formula, float]) -> bool:
        """Return whether a weight has one of the values, or one that goes with any scheme."""
        # 1. The family of the draw, where only one will do.
        expected_family = self.scheme.family
        is_judged_by_family = bool(expected_family) and weight.role in MATRICES
        if is_judged_by_family and weight.family != expected_family:
            return False

        # 2. A value of the scheme.
        if any(holds(weight, value, self.spread) for value in values.values()):
            return True

        # 3. Tables may have other values, whichever scheme the matrices follow.
        if not self.is_followed:
            return False
        return self._is_allowed_with_any_scheme(weight)

    def _is_allowed_with_any_scheme(self, weight: WeightRecord) -> bool:
        """Return whether embedding, positions or head hold what goes with any scheme."""
        formulas = allowed_with_any_scheme().get(weight.role, ())
        if formulas:
            known = variables(self.contract, weight, self.s)
            for formula in formulas:
                value = formula.value(known)
                if value is not None and holds(weight, value):
                    return True

        # Tables may also be so small that they were meant to be.
        if _is_tiny_table(weight):
            return True

        # Or both have the default of their class.
        return self._is_default_as_the_embedding(weight)

    def _is_default_as_the_embedding(self, weight: WeightRecord) -> bool:
        """Return whether positions have the N(0, 1) of nn.Embedding, as the embedding does.

        What is right for the one is right for the other. Where matrices have std 1 by mistake, it
        is part of that.
        """
        # 1. Positions with the default.
        if weight.role != "positions":
            return False
        if not holds(weight, 1.0):
            return False

        # 2. They are no part of a mistake.
        has_mistake = self.has_unit_draws
        if has_mistake:
            return False

        # 3. The embedding has the default, too.
        embeddings = with_role(self.contract.weights, "embedding")
        return any(map(_has_unit_std, embeddings))


def _has_unit_std(table: WeightRecord) -> bool:
    """Return whether a table is a draw with std 1."""
    return not is_constant(table) and holds(table, 1.0)


def _are_alike(sections: Iterable[Piece]) -> bool:
    """Return whether all sections can have been drawn with one std."""
    # 1. The intervals that are known.
    known: list[StdInterval] = []
    for section in sections:
        interval = sampling_interval(section.weight)
        if interval is not None:
            known.append(interval)

    # 2. Each compared with each other one.
    pairs = itertools.combinations(known, 2)
    return all(itertools.starmap(StdInterval.meets, pairs))


def _nearest_mismatch(piece: Piece, values: Mapping[Formula, float]) -> Mismatch:
    """Return the mismatch with the value that a piece is nearest to."""

    def distance(formula: Formula) -> float:
        return _distance(piece.weight, values[formula])

    formula = min(values, key=distance)
    return Mismatch(piece, values[formula], formula)


def _attention_of(weight: WeightRecord) -> str:
    """Return the name of the module whose projections a weight is one of."""
    return weight.parameter.removesuffix(".weight").rpartition(".")[0]


def _is_tiny_table(weight: WeightRecord) -> bool:
    """Return whether embedding or positions are so small that they were meant to be."""
    is_table = weight.role in ("embedding", "positions")
    std = std_of(weight)
    return is_table and 0 < std <= _TINY


def _distance(weight: WeightRecord, value: float) -> float:
    """Return how far a weight is from a value, as a ratio; infinite for the value zero."""
    if value <= 0:
        return math.inf

    # A std of zero is far from any value.
    std = max(std_of(weight), 1e-30)
    return abs(math.log(std / value))


def _orders_of_sections(weight: WeightRecord) -> list[list[str]]:
    """Return the orders in which a fused matrix may hold its roles; none without sections."""
    roles = [section.role for section in weight.sections]
    if not roles:
        return []

    # The halves of a gated FFN may stand either way round.
    if weight.role == "W_gate_up":
        return [roles, roles[::-1]]
    return [roles]


def _pieces(
    weight: WeightRecord, order: Iterable[str], fan_out: int | None = None
) -> Iterator[Piece]:
    """Yield the sections of a fused matrix as weights, with their own fan_out or the one given."""
    for section, role in zip(weight.sections, order, strict=True):
        # A section is judged as a weight of its own.
        rows = replace(
            weight,
            role=role,
            fan_out=fan_out or section.fan_out,
            family=section.family,
            std=section.std,
            lower=section.lower,
            upper=section.upper,
            mean=section.mean,
            truncation=section.truncation,
            sections=[],
        )
        yield Piece(rows, role, section)


def is_projection(weight: WeightRecord, width: int = 0) -> bool:
    """Return whether a matrix is the linear map of an attention or FFN that a scheme covers.

    Its sizes are those of the map. A depthwise kernel, a table of relative positions or a
    matrix that acts along the sequence has others, and an init of its own.

    Args:
        weight: The matrix.
        width: Of the model; 0 if it is not known. A stack of matrices of an attention, one per
            head, must read or make so many features.
    """
    # 1. A matrix of a sub-layer of the right kind.
    sizes = [size for size in weight.shape if size > 1]
    if weight.kind not in _KINDS or len(sizes) < 2:
        return False

    # 2. Its sizes are those of the map, if those are known.
    if weight.fan_in is None or weight.fan_out is None:
        return True
    fans = [weight.fan_in, weight.fan_out]
    if sorted(sizes[-2:]) != sorted(fans):
        return False

    # 3. The first of two factors narrows. One that does not makes shifts and scales (adaLN).
    if weight.role.endswith("_a"):
        narrows = weight.fan_out < weight.fan_in
        if not narrows:
            return False

    # 4. A matrix per head reads the model's width, or makes it.
    is_stored_by_head = len(sizes) == 3 and _is_of_attention(weight)
    if width and is_stored_by_head:
        return width in fans
    return True


def _is_of_attention(weight: WeightRecord) -> bool:
    return weight.kind in ("attention", "cross-attention")


def _is_open_gate(weight: WeightRecord) -> bool:
    """Return whether a gate of an attention starts at zero.

    Then its bias alone sets how far it is open.
    """
    # The gate of a feed-forward network has the same role.
    is_gate = weight.role == "W_gate" and _is_of_attention(weight)
    return is_gate and is_zero(weight)


def _is_lookup(weight: WeightRecord) -> bool:
    """Return whether positions are a drawn table that is looked up.

    Positions, class tokens and the like that are added as they stand have no default of a library:
    what they hold was written at that place. A table of sinusoids was not drawn.
    """
    return weight.fan_in is not None and weight.family not in ("sinusoid", "other")


def variables(
    contract: ContractRecord, weight: WeightRecord, s: float | None = None
) -> dict[str, float]:
    """Return what a formula may use for one weight."""
    own = {"fan_in": weight.fan_in, "fan_out": weight.fan_out, "l": weight.layer, "s": s}
    known = dict(contract.sizes)

    # What is not known is left out, so that formulas with it have no value.
    for name, value in own.items():
        if value is not None:
            known[name] = float(value)

    return known


def holds(weight: WeightRecord, value: float, spread: Spread = (1.0, 1.0)) -> bool:
    """Return whether a weight can have been drawn with the std `value`.

    A vector must be that value.

    Args:
        weight: The record of the weight.
        value: Std of a matrix, value of a vector.
        spread: Relative interval of `value` itself.
    """
    # 1. Vectors have a value, not a std.
    if weight.role in VECTORS or is_vector(weight):
        return _is_constant_of(weight, value)

    # 2. What was not measured is reported by another rule.
    if weight.lower is None or weight.upper is None:
        return True

    # 3. A constant has no std but zero.
    if value == 0 or is_constant(weight):
        return value == 0 and is_zero(weight)

    # 4. `value` may be the std before or after the truncation.
    interval = StdInterval(weight.lower / spread[1], weight.upper / spread[0])
    return interval.holds(value) or interval.holds(value * weight.truncation)


def _is_constant_of(weight: WeightRecord, value: float) -> bool:
    """Return whether all numbers of a weight are one value."""
    if weight.mean is None:
        return False
    is_equal = math.isclose(weight.mean, value, rel_tol=_EXACT_RELATIVE, abs_tol=_EXACT_ABSOLUTE)
    return is_equal and is_constant(weight)


def is_of_unit_spread(weight: WeightRecord) -> bool:
    """Return whether a weight has std 1 and too many inputs for it.

    Std 1 is the default of torch.nn.init.normal_.
    """
    # 1. Of few inputs, a formula may give std 1.
    has_few_inputs = weight.fan_in is not None and weight.fan_in < _FEW_INPUTS
    if has_few_inputs:
        return False

    # 2. A draw with that std.
    if is_constant(weight) or not weight.std:
        return False
    return holds(weight, 1.0)


def judged_by_schemes(contract: ContractRecord) -> list[WeightRecord]:
    """Return the weights that show which scheme a model follows."""
    width = int(contract.sizes.get("d", 0))
    inside: list[WeightRecord] = []
    outside: list[WeightRecord] = []
    for weight in contract.weights:
        # 1. What was not measured shows nothing.
        if weight.lower is None:
            continue

        # 2. Tables and others outside of the sub-layers, then matrices inside of them.
        if weight.role in OUTSIDE:
            outside.append(weight)
        elif weight.role in MATRICES and is_projection(weight, width):
            inside.append(weight)

    return inside + outside
