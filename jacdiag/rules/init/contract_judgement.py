"""How the weights of a model compare with a scheme, as the rules of the contract share it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from jacdiag.records import ContractRecord
from jacdiag.rules.init.scheme_deviations import Deviation, deviations
from jacdiag.rules.init.scheme_fit import Yardstick
from jacdiag.rules.init.schemes import Scheme, formulas_of


@dataclass(frozen=True)
class SchemeComparison:
    """A model compared with the scheme of its family, else with the one that most of it follows.

    Attributes:
        scheme: None if the model follows none; then only its layers are compared with each other.
        published: Whether it is the published init of the model's family.
        s: The base std where the scheme leaves it open.
        count: How many weights were compared.
        deviations: Those that differ.
        note: Which scheme it is, in words.
        mistake: Made with the formula of the scheme in the entire model; "" for none.
    """

    scheme: Scheme | None
    published: bool
    s: float | None
    count: int
    deviations: list[Deviation]
    note: str
    mistake: str = ""


@dataclass(frozen=True)
class Judgement:
    """The weights of a model and how they compare with a scheme.

    Several rules need the comparison, and it takes long: it is made once, when it is first needed.

    Attributes:
        contract: The weights.
        compare: Compares them with the scheme of the model's family, else with the rest of the
            model.
    """

    contract: ContractRecord
    compare: Callable[[ContractRecord], SchemeComparison]

    @cached_property
    def result(self) -> SchemeComparison:
        """The comparison with the scheme of the model's family, else with the rest of the model."""
        return self.compare(self.contract)

    @cached_property
    def deviations(self) -> list[Deviation]:
        """The weights that differ from the pinned contract, or else from the rest."""
        # 1. What the user pinned.
        pinned: list[Deviation] = []
        if self.contract.pinned:
            scheme = pinned_scheme(self.contract)
            _, pinned = deviations(Yardstick.given(self.contract, scheme))

        # 2. The other weights.
        named = {deviation.weight.parameter for deviation in pinned}
        others: list[Deviation] = []
        for deviation in self.result.deviations:
            if deviation.weight.parameter not in named:
                others.append(deviation)

        return [*pinned, *others]

    @cached_property
    def deviating_names(self) -> frozenset[str]:
        """The names of the parameters that differ."""
        return frozenset(deviation.weight.parameter for deviation in self.deviations)


def pinned_scheme(contract: ContractRecord) -> Scheme:
    """Return what the user pinned, as a scheme."""
    return Scheme(
        "pinned", "the pinned contract", "given by the user", formulas_of(contract.pinned)
    )
