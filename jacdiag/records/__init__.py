"""Plain data that every other room speaks: the report and its parts, and the thresholds. No torch
here.
"""

from jacdiag.records.base import SCHEMA_VERSION
from jacdiag.records.comparison import AgainstRecord, ChangeRecord
from jacdiag.records.flight_replay import (
    BatchReplay,
    NormChange,
    ReplayRecord,
    SequenceReplay,
    TokenReplay,
)
from jacdiag.records.init_contract import ContractRecord, FiguresRecord, WeightRecord
from jacdiag.records.remedy import Outlook, RemedyRecord
from jacdiag.records.report import (
    LEVELS,
    Condition,
    Conditions,
    Cost,
    Finding,
    Growth,
    Interval,
    Kind,
    Level,
    ModelRecord,
    NetworkRecord,
    PerToken,
    Placement,
    Plan,
    ProbeRecord,
    ProbeSpread,
    Report,
    RuleResult,
    Spread,
    Status,
    SublayerRecord,
    TokenAt,
    Verdict,
    WeightStats,
)
from jacdiag.records.risk import Risk

__all__ = [
    "LEVELS",
    "SCHEMA_VERSION",
    "AgainstRecord",
    "BatchReplay",
    "ChangeRecord",
    "Condition",
    "Conditions",
    "ContractRecord",
    "Cost",
    "FiguresRecord",
    "Finding",
    "Growth",
    "Interval",
    "Kind",
    "Level",
    "ModelRecord",
    "NetworkRecord",
    "NormChange",
    "Outlook",
    "PerToken",
    "Placement",
    "Plan",
    "ProbeRecord",
    "ProbeSpread",
    "RemedyRecord",
    "ReplayRecord",
    "Report",
    "Risk",
    "RuleResult",
    "SequenceReplay",
    "Spread",
    "Status",
    "SublayerRecord",
    "TokenAt",
    "TokenReplay",
    "Verdict",
    "WeightRecord",
    "WeightStats",
]
