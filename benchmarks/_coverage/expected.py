"""What must be found of one sub-layer, by a source other than the tracer.

The tests' own models fill it from their code, the families of transformers from configs and class
names.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any

FIELDS = ("name", "kind", "placement", "token_wise", "parallel", "nested")


@dataclass(frozen=True)
class Expected:
    """The right answer for one sub-layer. None means that the source does not say.

    Attributes:
        name: the name of the module that holds the branch.
        kind, placement, token_wise, parallel, nested: as `jacdiag.sites` must report them.
    """

    name: str | None
    kind: str | None
    placement: str | None
    _: KW_ONLY
    token_wise: bool | None = None
    parallel: bool | None = None
    nested: bool | None = None

    def differences(self, site: Any) -> list[str]:
        """Compare a sub-layer that the tracer found with this answer.

        Returns:
            One sentence for each field that differs. A field whose answer is None is not compared.
        """
        lines = []
        for field in FIELDS:
            found, expected = getattr(site, field), getattr(self, field)
            if expected is not None and found != expected:
                lines.append(f"{site.name}: {field} is {found}, not {expected}")
        return lines
