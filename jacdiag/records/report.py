"""The report of an audit as plain data: frozen records, and their JSON in both directions.

This floor knows neither torch nor a terminal. A number that was not measured is None (JSON null),
never 0; a number that is not finite is written as the string "inf", "-inf" or "nan".
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, ClassVar, Literal, Self

from jacdiag.records.base import SCHEMA_VERSION, Record, check_schema
from jacdiag.records.comparison import AgainstRecord
from jacdiag.records.flight_replay import ReplayRecord
from jacdiag.records.init_contract import ContractRecord, FiguresRecord
from jacdiag.records.judged_sublayers import JudgedSublayers
from jacdiag.records.number_format import between
from jacdiag.records.remedy import RemedyRecord
from jacdiag.records.risk import Risk
from jacdiag.records.signal_propagation import (
    AttentionRecord,
    BackwardRecord,
    DeadBranch,
    ForwardRecord,
)
from jacdiag.records.stream_range import StreamRange
from jacdiag.records.structure import MissingShortcutRecord

# -- words of the JSON -----------------------------------------------------------------------------
Level = Literal["info", "warning", "error"]
Status = Literal["fired", "clean", "unknown", "not-applicable"]
Condition = Literal["met", "partly", "not met", "unknown", "not applicable"]
Verdict = Literal["pass", "warn", "fail", "unknown", "observed"]
Kind = Literal["attention", "mlp", "moe", "mixer", "conv", "other"]
Placement = Literal["pre", "post", "sandwich", "reordered", "none"]

# What stands next to a product over depth, if the norm that it bounds was not measured.
PRODUCT_ALONE = "an upper bound whose true value, the end-to-end gain, was not measured"

# What stands next to a product over depth that is no bound.
UNCOVERED_CALLS = "the stream passes calls that no gain covers"

LEVELS: tuple[Level, ...] = ("info", "warning", "error")

_NAMED = 3  # sub-layers or parameters that the summary of a finding lists before it counts them


# -- figures and their intervals -------------------------------------------------------------------
@dataclass(frozen=True)
class TokenAt(Record):
    """One token of the probe. `token` is its id, None where the input is not token ids."""

    sequence: int | None
    position: int | None
    token: int | None = None


@dataclass(frozen=True)
class Spread(Record):
    """Standard deviation over features, per token, summarised over tokens.

    `p01` is the 1st percentile.
    """

    median: float
    min: float
    max: float
    p01: float | None = None
    argmin: TokenAt | None = None
    argmax: TokenAt | None = None


@dataclass(frozen=True)
class PerToken(Record):
    """Distribution over tokens of a norm that was solved token by token (lower ends)."""

    median: float
    p99: float
    max: float
    argmax: TokenAt | None = None


@dataclass(frozen=True)
class Interval(Record):
    """A spectral norm with its error bar.

    Attributes:
        estimate: best value, the largest Ritz value (not padded).
        lower: rigorous lower end, up to the rounding pad of the precision.
        upper: upper end that holds with probability `confidence`.
        products: products with J and J^T that were spent (0 for a closed form).
        converged: the requested width was reached.
        per_sequence: estimates per batch element, None where sequences could not be distinguished.
        stop: one sentence: why the solver stopped, and what to raise if that was too early.
    """

    estimate: float
    lower: float
    upper: float
    confidence: float = 1.0
    converged: bool = True
    products: int = 0
    per_sequence: list[float] | None = None
    per_token: PerToken | None = None
    stop: str = ""

    def __contains__(self, value: float) -> bool:
        return self.lower <= value <= self.upper

    def __str__(self) -> str:
        """Return the two ends, rounded outward: "5.80 to 6.05"."""
        return between(self.lower, self.upper)

    def side_of(self, threshold: float) -> Literal["above", "below", "across"]:
        """Return on which side of a threshold the interval lies; a non-finite one is across."""
        if self.lower > threshold:
            return "above"
        if self.upper <= threshold:
            return "below"

        # The threshold lies inside, or an end is nan. Every comparison with nan is false.
        return "across"

    def scaled(self, factor: float) -> Interval:
        """Return the interval of `factor` times the quantity, for factor > 0."""
        return dataclasses.replace(
            self,
            estimate=self.estimate * factor,
            lower=self.lower * factor,
            upper=self.upper * factor,
        )

    @classmethod
    def exact(
        cls, value: float, *, per_token: PerToken | None = None, stop: str = "closed form"
    ) -> Interval:
        """Return an interval without width, for a quantity that has a closed form."""
        return cls(value, value, value, per_token=per_token, stop=stop)


# -- parts of a report -----------------------------------------------------------------------------
@dataclass(frozen=True)
class WeightStats(Record):
    """A weight matrix of a sub-layer (or of the embedding or head): sizes, std, spectral norm."""

    parameter: str
    shape: list[int]
    std: float | None
    norm: float | None = None


@dataclass(frozen=True)
class ProbeSpread(Record):
    """One figure on several probes (`--probes`): how much it depends on the data.

    Attributes:
        least, most: smallest and largest of the estimates.
        estimates: one for each probe, that of the report itself first; None where it was not
            measured.
    """

    least: float
    most: float
    estimates: list[float | None] = field(default_factory=list)

    def __str__(self) -> str:
        """Return smallest and largest estimate: "5.71 to 6.02"."""
        return between(self.least, self.most)


@dataclass(frozen=True)
class SublayerRecord(Record):
    """All figures of one sub-layer.

    `notes` holds the reason for each field that is None (field name -> sentence).

    `placement` is None where no model was run (tier "weights"). `joint_residual_norm` is that of
    the shortcut plus all parallel branches on it (None unless `parallel`). `gradient_norm` is that
    of the loss over the branch's parameters. `dead_branch` is set if the branch does not depend on
    its input. `norm_inside` says whether a call that may be a norm lies in the branch; None if no
    model was run. `over_probes` holds the spread of figures over several probes by field name. It
    is empty if there was one probe.
    """

    # Where it is.
    name: str
    index: int
    depth: int
    kind: Kind
    placement: Placement | None
    parallel: bool = False
    token_wise: bool | None = None
    nested: bool = False

    # Standard deviations that enter its residual addition.
    shortcut_std: Spread | None = None
    branch_std: Spread | None = None
    shortcut_gain: float | None = 1.0

    # Spectral norms of its Jacobians.
    branch_norm: Interval | None = None
    residual_norm: Interval | None = None
    joint_residual_norm: Interval | None = None
    core_norm: Interval | None = None
    norm_gain: Interval | None = None
    out_norm_gain: Interval | None = None

    # Bounds from its weights alone, and how near the norm is to them.
    bound: float | None = None
    bound_norms: float | None = None
    tightness: float | None = None
    weights: dict[str, WeightStats] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    problems: str = ""

    # Figures of the one forward and the one backward.
    attention: AttentionRecord | None = None
    gradient_norm: float | None = None
    dead_branch: DeadBranch | None = None

    # What was not measured, how far it depends on the probe, and what it cost.
    notes: dict[str, str] = field(default_factory=dict)
    over_probes: dict[str, ProbeSpread] = field(default_factory=dict)
    cost: float | None = None
    norm_inside: bool | None = None


@dataclass(frozen=True)
class Growth(Record):
    """Growth exponents ln(last / first) / layers: of activations upward, of gradients downward."""

    activation: float | None = None
    gradient: float | None = None


@dataclass(frozen=True)
class NetworkRecord(Record):
    """Figures of the entire network.

    Attributes:
        gain_product_log: natural logarithm of the product of `residual_norm` over depth (Eq. 7). It
            is an upper bound on the logarithm of `end_to_end`, up to the width of the intervals,
            and usually far above it. It is no bound if `stream` has gaps.
        end_to_end: spectral norm of d y_N / d x_1, with the cancellation that the product hides.
        gradient_norms: norm of dL/dx at each depth, first shortcut first, the last output of the
            stack at the end.
        predicted_gradient_norms: the upper profile of Eq. 7 from the sub-layer norms and the last
            gradient. None if `stream` has gaps.
        loss: {"kind": ..., "value": ...}: what was differentiated.
        forward: the residual stream over depth.
        backward: gradients of the parameters, and parts without one.
        over_probes: spread of `end_to_end` over several probes, by field name.
        stream: the sub-layers that all of these figures are about; None in reports of older
            versions, and if no sub-layer lies on a stream.
    """

    gain_product_log: float | None = None
    end_to_end: Interval | None = None
    gradient_norms: list[float] | None = None
    predicted_gradient_norms: list[float] | None = None
    growth: Growth = field(default_factory=Growth)
    loss: dict[str, Any] | None = None
    forward: ForwardRecord | None = None
    backward: BackwardRecord | None = None
    notes: dict[str, str] = field(default_factory=dict)
    over_probes: dict[str, ProbeSpread] = field(default_factory=dict)
    stream: StreamRange | None = None

    @property
    def part(self) -> StreamRange | None:
        """The range of the figures if they are about a part of the sub-layers; else None."""
        # 1. No stream, or an older report.
        stream = self.stream
        if stream is None:
            return None

        # 2. A part, or all of them.
        if stream.is_partial:
            return stream
        return None


@dataclass(frozen=True)
class ModelRecord(Record):
    """What was looked at. `covered_parameters` and `uncovered` answer: which part was not?"""

    name: str
    parameters: int
    layers: int
    width: int | None = None
    covered_parameters: int | None = None
    uncovered: list[str] = field(default_factory=list)
    uncovered_reasons: dict[str, str] = field(default_factory=dict)
    weights: dict[str, WeightStats] = field(default_factory=dict)
    vocabulary: int | None = None
    left_out: list[str] = field(default_factory=list)
    missing_shortcuts: list[MissingShortcutRecord] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; the name stands under the key "class"."""
        data = super().to_dict()
        name = data.pop("name")
        return {"class": name, **data}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild a record from plain JSON values.

        Args:
            data: what `to_dict` returned.
        """
        name = data.get("class", "")
        return super().from_dict({"name": name, **data})


@dataclass(frozen=True)
class ProbeRecord(Record):
    """The probe input.

    `tokens` says where the token ids come from: "random", "random pixels", "inputs", a file, a file
    and the tokenizer that its text went through ("text.txt through GPT2Tokenizer of FOLDER"), or
    "text through its own tokenizer". `digest` is a hash of the input itself; "" in reports from
    before it was kept.
    """

    batch: int
    seq: int | None
    seed: int
    tokens: str = "random"
    excluded_rows: int = 0
    off_distribution: bool = False
    digest: str = ""

    @property
    def is_drawn(self) -> bool:
        """Whether the input depends on the seed; tokens of a file do not."""
        return self.is_random or self.tokens == "inputs"

    @property
    def is_random(self) -> bool:
        """Whether the input was drawn, so that a trained model never saw its like."""
        return self.tokens in ("random", "random pixels")


@dataclass(frozen=True)
class Plan(Record):
    """The plan of the run, as far as it was given on the command line."""

    lr: float | None = None
    warmup: int | None = None
    clip: float | None = None
    beta2: float | None = None


# -- what the rules found --------------------------------------------------------------------------
@dataclass(frozen=True)
class Conditions(Record):
    """The two conditions of the paper, each over the sub-layers that its rule judged.

    `small_sublayers_judged` and `large_shortcut_judged` say which ones these are. They are None if
    the rule was not run, and in reports of older versions.
    """

    small_sublayers: Condition = "unknown"
    large_shortcut: Condition = "unknown"
    small_sublayers_judged: JudgedSublayers | None = None
    large_shortcut_judged: JudgedSublayers | None = None


@dataclass(frozen=True)
class Finding(Record):
    """One rule that fired.

    `where` lists sub-layer names. `verified` means that the fix was tried and helped.
    """

    code: str
    level: Level
    where: list[str]
    what: str
    evidence: dict[str, Any] = field(default_factory=dict)
    why: str = ""
    fix: str = ""
    verified: bool = False


@dataclass(frozen=True)
class RuleResult(Record):
    """The result of a rule.

    `matched` counts the sub-layers it applied to; 0 means not applicable, never a pass.
    """

    code: str
    status: Status
    matched: int
    name: str = ""
    note: str = ""


@dataclass(frozen=True)
class Cost(Record):
    """What the audit cost. `forward_equivalents` counts in forwards of one sub-layer's branch."""

    forward_equivalents: float | None = None
    products: int | None = None
    seconds: float | None = None
    peak_memory_mb: float | None = None
    phases: dict[str, float] = field(default_factory=dict)


# -- the report ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Report(Record):
    """A complete audit.

    The JSON keys are a contract: add to them, never change or remove one.

    `state_reason` says why `state` is what it is. `state_basis` says what the reason rests on: the
    state was "given", the model was "built" here, a fact stands in the "file", or it is a guess
    from the "name" or the "weights". Both are "" in reports of older versions.
    """

    _document: ClassVar[str] = "report"

    # What was looked at, and on which input.
    source: dict[str, Any]
    tier: Literal["weights", "measured"]
    state: Literal["init", "trained"] | None
    probe: ProbeRecord | None
    model: ModelRecord

    # What was measured, and what the rules say of it.
    sublayers: list[SublayerRecord] = field(default_factory=list)
    network: NetworkRecord | None = None
    plan: Plan = field(default_factory=Plan)
    conditions: Conditions = field(default_factory=Conditions)
    verdict: Verdict = "unknown"
    findings: list[Finding] = field(default_factory=list)
    rules: list[RuleResult] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)

    # How it was measured.
    settings: dict[str, Any] = field(default_factory=dict)
    ladder: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    # Analyses that not every audit has.
    contract: ContractRecord | None = None
    figures: FiguresRecord | None = None
    baseline: FiguresRecord | None = None
    remedies: list[RemedyRecord] = field(default_factory=list)
    risk: Risk | None = None
    against: AgainstRecord | None = None
    state_reason: str = ""
    state_basis: str = ""
    replay: ReplayRecord | None = None

    # When and with which versions it was made.
    created: str = ""
    torch: str = ""
    jacdiag: str = ""
    schema_version: int = SCHEMA_VERSION

    @property
    def distrusted(self) -> set[str]:
        """Names of sub-layers whose replay differs from the model: their figures are not used."""
        checks: dict[str, Any] = self.settings.get("checks", {})
        return set(checks.get("replay") or {})

    @property
    def is_observed(self) -> bool:
        """Whether the model is trained and was compared with nothing, whatever else fired.

        Its norms were looked at and not judged. The verdict is "observed" if no rule fired at
        warning or above.
        """
        # 1. The verdict says so.
        if self.verdict == "observed":
            return True

        # 2. A rule such as JD903 may have fired on its own account.
        if self.verdict not in ("warn", "fail"):
            return False
        return self.state == "trained" and self._is_uncompared

    @property
    def _is_uncompared(self) -> bool:
        """Whether norms were measured, and JD110 had nothing to compare them with."""
        # 1. Weights alone, and an init contract alone, have no norms.
        norms = [row.branch_norm for row in self.sublayers if row.branch_norm is not None]
        if not norms:
            return False

        # 2. A rule that was not selected did not look for a comparison.
        statuses = {rule.code: rule.status for rule in self.rules}
        return statuses.get("JD110") == "not-applicable"

    def __str__(self) -> str:
        """Return a few lines: what was audited, the verdict, the worst norm, the findings."""
        return _summary(self)

    def __repr__(self) -> str:
        """Return one line; `to_dict` has everything."""
        sublayers = _counted(len(self.sublayers), "sub-layer")
        size = f"{sublayers}, {_counted(len(self.findings), 'finding')}"
        return f"<{type(self).__name__} of {source_name(self)}: {self.verdict}, {size}>"

    def table(self, width: int | None = None, **options: Any) -> None:
        """Print the table and the verdict, as `jacdiag audit` does.

        Args:
            width: characters a line, that of the terminal if not given; a narrower table has fewer
                columns.
            options: of `jacdiag.render.terminal.report.print_report`, such as `all_rows=True`.
        """
        from jacdiag.render.terminal.report import show_report

        show_report(self, width, **options)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: verdict, picture, table and what to do."""
        from jacdiag.render.html.pages import report_in_notebook

        return report_in_notebook(self)

    def to_json(self, indent: int | None = 2) -> str:
        """Return strict JSON (no bare NaN or Infinity)."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Args:
            text: the JSON.

        Returns:
            The report; fields that an older version did not write have their defaults.

        Raises:
            NewerSchemaError: the report is of a newer schema version.
            ValueError: the text is no JSON, or it is no report.
        """
        try:
            data = json.loads(text)
        # brackets in brackets without end
        except RecursionError as error:
            raise ValueError("the text nests too deep for a report") from error
        if not isinstance(data, Mapping):
            raise ValueError("a report is a JSON object")
        check_schema(data, cls._document)

        # Every version writes its number as an integer. Other JSON has none, or another one.
        version = data.get("schema_version")
        if not isinstance(version, int):
            raise ValueError(
                f"report has schema_version {version!r}; this jacdiag reads {SCHEMA_VERSION}"
            )
        return cls.from_dict(data)


# -- what `print(report)` shows --------------------------------------------------------------------
def source_name(report: Report) -> str:
    """Return a short name of what was audited."""
    # 1. The name that a caller or the source gives.
    source = report.source
    candidates = (report.settings.get("name"), source.get("name"), source.get("factory"))
    for name in candidates:
        if name:
            return str(name)

    # 2. The file without its folder.
    path = PurePath(str(source.get("path", "model")))
    return path.name


def _summary(report: Report) -> str:
    """Return the lines that `print(report)` shows, for a report of either tier and state."""
    # 1. What was audited, and the verdict.
    state = report.state or "state unknown"
    lines = [
        f"{type(report).__name__} of {source_name(report)} ({state}, {report.tier})",
        f"  model     {_model_summary(report)}",
        f"  verdict   {report.verdict}",
    ]

    # 2. The largest norm or bound, if there is one.
    largest = _largest_norm(report) or _largest_bound(report)
    if largest:
        lines.append(f"  worst     {largest}")

    # 3. What the rules found, and where the rest is.
    lines += _finding_lines(report)
    lines.append("  more      report.table(), report.findings, report.to_json()")
    return "\n".join(_printable(line) for line in lines)


def _model_summary(report: Report) -> str:
    """Return the model's name and sizes."""
    model = report.model
    name = model.name or "unnamed"
    layers = _counted(model.layers, "layer")
    sublayers = _counted(len(report.sublayers), "sub-layer")
    return f"{name}, {layers}, {sublayers}, {model.parameters:,} parameters"


def _finding_lines(report: Report) -> list[str]:
    """Return a line for each rule that fired, in the order of the report: the worst first."""
    by_code: dict[str, list[Finding]] = {}
    for finding in report.findings:
        by_code.setdefault(finding.code, []).append(finding)
    if not by_code:
        return ["  findings  none"]
    return [f"  {code}     {_level_and_place(findings)}" for code, findings in by_code.items()]


def _printable(line: str) -> str:
    """Replace what cannot be printed: names come out of files that somebody else made."""
    return "".join(sign if sign.isprintable() else " " for sign in line)


def _largest_norm(report: Report) -> str:
    """Return the largest finite branch norm with its interval; "" if none was measured."""
    norms = []
    for row in report.sublayers:
        norm = row.branch_norm
        if norm is None:
            continue
        if math.isfinite(norm.estimate):
            norms.append((norm, row.name))
    if not norms:
        return ""

    # Of equal ones, the first in the report.
    norm, name = max(norms, key=lambda pair: pair[0].estimate)
    return f"branch norm {norm} at {name}"


def _largest_bound(report: Report) -> str:
    """Return the largest finite bound from weights; "" if there is none."""
    bounds = []
    for row in report.sublayers:
        if row.bound is None:
            continue
        if math.isfinite(row.bound):
            bounds.append((row.bound, row.name))
    if not bounds:
        return ""

    # Of equal ones, the last by name.
    bound, name = max(bounds)
    return f"bound {bound:.3g} at {name}"


def _level_and_place(findings: list[Finding]) -> str:
    """Return the level of a rule's findings and where they are."""
    # 1. Each level and each place once. A dictionary keeps their order.
    levels: dict[str, None] = {}
    places: dict[str, None] = {}
    for finding in findings:
        levels[finding.level] = None
        places.update(dict.fromkeys(finding.where))
    level = ", ".join(levels)
    if not places:
        return level

    # 2. Name the first places, and count the others.
    named = ", ".join(list(places)[:_NAMED])
    unnamed = len(places) - _NAMED
    if unnamed > 0:
        return f"{level} at {named} and {unnamed} more"
    return f"{level} at {named}"


def _counted(number: int, noun: str) -> str:
    """Return a number and its noun, such as "1 layer" or "2 layers"."""
    plural = "" if number == 1 else "s"
    return f"{number} {noun}{plural}"
