"""The comparison with an earlier model: the figures that differ beyond both intervals."""

from __future__ import annotations

from dataclasses import dataclass, field

from jacdiag.records.base import Record


@dataclass(frozen=True)
class ChangeRecord(Record):
    """One figure whose two intervals have no value in common.

    Attributes:
        where: the sub-layer, by its name now; "" for the entire network.
        depth: of the sub-layer; None for the entire network.
        figure: branch_norm, core_norm, norm_gain, shortcut_std or end_to_end.
        earlier: lower end, estimate and upper end in the earlier model.
        now: the same in the model that is audited.
    """

    where: str
    depth: int | None
    figure: str
    earlier: list[float]
    now: list[float]

    @property
    def ratio(self) -> float:
        """The estimate now over the earlier one; inf if that was 0."""
        if not self.earlier[1]:
            return float("inf")
        return self.now[1] / self.earlier[1]

    @property
    def grew(self) -> bool:
        """Whether the interval now lies above the earlier one."""
        return self.now[0] > self.earlier[2]

    @property
    def amplification(self) -> float:
        """By how much 1 + |J| grew at least; a gradient grows by at most that factor (Eq. 9)."""
        return (1 + self.now[0]) / (1 + self.earlier[2])


@dataclass(frozen=True)
class AgainstRecord(Record):
    """A comparison with an earlier model, measured with the same probe.

    Attributes:
        source: what the earlier model is called.
        state: of the earlier model, "init" or "trained".
        created: when the earlier report was made, ISO 8601.
        training: at least one of the two is trained, so that growth is compared with that of
            healthy training.
        compared: how many branch norms were measured in both.
        missing: sub-layers whose branch norm was measured in one model only, by their name now.
        changes: figures that differ beyond both intervals, as `jacdiag diff` finds them.
        branch_norms: name now -> lower end, estimate and upper end of the earlier branch norm.
    """

    # The earlier model.
    source: str
    state: str
    created: str = ""
    training: bool = False

    # What differs.
    compared: int = 0
    missing: list[str] = field(default_factory=list)
    changes: list[ChangeRecord] = field(default_factory=list)
    branch_norms: dict[str, list[float]] = field(default_factory=dict)
