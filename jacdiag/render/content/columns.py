"""The columns of the tables of `audit` and `diff`: their titles, and what each of them means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jacdiag.records.number_format import three
from jacdiag.rules.thresholds import Limits, load_thresholds

_PLACEMENTS = {"pre": "pre-norm", "post": "post-norm"}
_PLACEMENTS |= {"sandwich": "sandwich norm", "reordered": "reordered norm"}
_NO_UNIT = "none (a factor)"


@dataclass(frozen=True, kw_only=True)
class Column:
    """What a column of a table means.

    Attributes:
        key: of the figure in the JSON report, or the name of the column in the code.
        title: as the table shows it.
        meaning: what the column shows, in one or two sentences.
        symbol: of the figure; "" without one.
        formula: how it comes out; "" without one.
        unit: of the figure; "" if it is no number.
        rules: codes of the rules that read it.
        limits: (figure, stratum, words) of the thresholds that those rules compare it with.
        target: what the paper asks for; "" if it asks for nothing.
    """

    key: str
    title: str
    meaning: str
    symbol: str = ""
    formula: str = ""
    unit: str = ""
    rules: tuple[str, ...] = ()
    limits: tuple[tuple[str, str, str], ...] = ()
    target: str = ""


COLUMNS: tuple[Column, ...] = (
    Column(
        key="depth",
        title="layer",
        meaning="The number of the layer that the sub-layer belongs to, from 0 at the input.",
        unit="none (a number)",
    ),
    Column(
        key="name",
        title="sub-layer",
        meaning="The module whose output is added to the residual stream, as the model names it.",
    ),
    Column(
        key="shortcut_std",
        title="shortcut std",
        meaning="The standard deviation of the residual stream where the sub-layer reads it, over "
        "features. The smallest over tokens. The bar next to it is on a log scale.",
        symbol="σ_x",
        formula="std(x)",
        unit="that of the residual stream",
        rules=("JD102", "JD105"),
        target="about 1 in a pre-norm model at init",
    ),
    Column(
        key="norm_gain",
        title="norm gain",
        meaning="The factor by which the norm at the branch's beginning multiplies a small change. "
        "The largest over tokens; the rule reads the 99th percentile.",
        symbol="1/σ",
        formula="1/√(σ_x² + ε) (Eq. 14)",
        unit=_NO_UNIT,
        rules=("JD102",),
        limits=(("norm_gain", "", "pre-norm at init"),),
    ),
    Column(
        key="core_norm",
        title="core norm",
        meaning="The spectral norm of the branch's Jacobian after the norm at its beginning, with "
        "its interval.",
        symbol="‖J_core‖",
        formula="the largest singular value of ∂ core(z) / ∂ z (Eq. 10, 18)",
        unit=_NO_UNIT,
        rules=("JD101",),
        limits=(
            ("core_norm", "attention", "attention, times √(2N), N the number of layers"),
            ("core_norm", "mlp", "MLP, times √(2N)"),
            ("core_norm", "moe", "mixture of experts, times √(2N)"),
        ),
    ),
    Column(
        key="branch_norm",
        title="branch norm",
        meaning="The spectral norm of the entire branch's Jacobian, with its interval. It is the "
        "largest factor by which the branch multiplies a small change of the stream.",
        symbol="‖J‖",
        formula="the largest singular value of ∂ f(x) / ∂ x (Eq. 9, 17); at most norm gain times "
        "core norm",
        unit=_NO_UNIT,
        rules=("JD103", "JD105", "JD110"),
        limits=tuple(
            ("branch_norm", placement, f"{words} at init")
            for placement, words in _PLACEMENTS.items()
        ),
    ),
    Column(
        key="over_probes",
        title="over N probes",
        meaning="The smallest to largest branch norm over several probes (--probes). It shows how "
        "much the data matter, and is no error of the measurement.",
        unit=_NO_UNIT,
    ),
    Column(
        key="out_norm_gain",
        title="out-norm gain",
        meaning="The factor by which a norm at the branch's end, or after the sum, multiplies a "
        "small change.",
        symbol="1/σ",
        formula="1/√(σ² + ε), σ the standard deviation of the norm's input",
        unit=_NO_UNIT,
    ),
    Column(
        key="residual_norm",
        title="residual norm",
        meaning="The spectral norm of the entire sub-layer's Jacobian, shortcut and branch "
        "together, and in post-norm the norm after their sum. It is left out for pre-norm, where "
        "it is nearly 1 + branch norm.",
        symbol="‖aI + J‖; ‖J_norm (aI + J)‖ in post-norm",
        formula="the largest singular value of ∂ (a x + f(x)) / ∂ x, or of ∂ norm(a x + f(x)) / "
        "∂ x in post-norm; a is the factor on the shortcut",
        unit=_NO_UNIT,
        rules=("JD104",),
    ),
    Column(
        key="weights.first_std",
        title="std W in",
        meaning="The standard deviation of the branch's first matrix (W_Q, W_QKV or W_1). Shown if "
        "weights alone were read.",
        symbol="std(W_in)",
        unit="that of the weights",
        rules=("JD201", "JD202", "JD203", "JD204", "JD205"),
    ),
    Column(
        key="weights.last_std",
        title="std W out",
        meaning="The standard deviation of the branch's last matrix (W_O or W_2). Shown if weights "
        "alone were read.",
        symbol="std(W_out)",
        unit="that of the weights",
        rules=("JD201", "JD202", "JD203", "JD204", "JD205"),
    ),
    Column(
        key="weights.first_norm",
        title="norm W in",
        meaning="The spectral norm of the branch's first matrix. Shown if weights alone were read.",
        symbol="‖W_in‖",
        formula="its largest singular value",
        unit=_NO_UNIT,
    ),
    Column(
        key="weights.last_norm",
        title="norm W out",
        meaning="The spectral norm of the branch's last matrix. Shown if weights alone were read.",
        symbol="‖W_out‖",
        formula="its largest singular value",
        unit=_NO_UNIT,
    ),
    Column(
        key="bound",
        title="paper's bound",
        meaning="The paper's upper bound on 1 + branch norm, from the standard deviations of the "
        "weights. It describes an initial state, and is left out for trained models.",
        formula="closed form (Eq. 15 for MLP, Eq. 20 for attention)",
        unit=_NO_UNIT,
    ),
    Column(
        key="earlier",
        title="earlier norm",
        meaning="The branch norm of the earlier model (--against), with its interval.",
        symbol="‖J‖",
        unit=_NO_UNIT,
        rules=("JD110",),
    ),
    Column(
        key="who",
        title="factor",
        meaning="At init: which factor of the branch norm breaks its condition, or meets it only "
        "partly. It is the shortcut (JD102), the sub-layer (JD101), or both.",
        rules=("JD101", "JD102"),
    ),
)

DIFF_COLUMNS: tuple[Column, ...] = (
    Column(
        key="depth",
        title="layer",
        meaning="The number of the layer, from 0 at the input. A dash stands for what is in no "
        "layer, such as the embedding.",
        unit="none (a number)",
    ),
    Column(
        key="part",
        title="part",
        meaning="The kind of the sub-layer, or the role of the weight: W_QKV, W_O, W_1, W_2, "
        "embedding. Both models are matched by it.",
    ),
    Column(
        key="figure",
        title="figure",
        meaning="What is compared: std (of a weight), shortcut std, norm gain, core norm or branch "
        "norm.",
    ),
    Column(
        key="a",
        title="A",
        meaning="The figure of the first model: a norm as its interval, a median with its range in "
        "parentheses if that is wide.",
    ),
    Column(
        key="b",
        title="B",
        meaning="The same figure of the second model.",
    ),
    Column(
        key="ratio",
        title="B / A",
        meaning="The figure of the second model over that of the first.",
        unit=_NO_UNIT,
    ),
    Column(
        key="parts",
        title="differs",
        meaning="A mark stands where the two differ beyond their intervals, or where one model "
        "lacks the figure.",
    ),
)
_BY_KEY = {column.key: column for column in COLUMNS}


def title_of(key: str) -> str:
    """Return the title of a column of the audit's table.

    Args:
        key: of the column.

    Raises:
        KeyError: the column is not explained.

    Example:
        >>> title_of("branch_norm")
        'branch norm'
    """
    return _BY_KEY[key].title


def figure_words(figure: str) -> str:
    """Return the name of a figure in words, as the tables show it.

    Args:
        figure: as in the JSON report.

    Example:
        >>> figure_words("shortcut_std")
        'shortcut std'
    """
    return figure.replace("_", " ")


def find_column(name: str) -> Column | None:
    """Return the column of the audit's table with a title or a key; None without one.

    Args:
        name: such as "branch norm" or "branch_norm", in either case.
    """
    wanted = name.strip().lower()
    for column in COLUMNS:
        if wanted in (column.title.lower(), column.key):
            return column
    return None


def facts_of(column: Column) -> list[str]:
    """Return what is known of a column beyond its meaning, one fact a line.

    Thresholds are those that ship: a configuration may set others.

    Args:
        column: of either table.
    """
    facts = []
    for label, text in (
        ("symbol", column.symbol),
        ("formula", column.formula),
        ("unit", column.unit),
        ("the paper asks for", column.target),
    ):
        if text:
            facts.append(f"{label}: {text}")

    # The thresholds are read from where the rules read them.
    thresholds = load_thresholds()
    for figure, stratum, words in column.limits:
        limits = thresholds.limits(figure, stratum)
        facts.append(f"good: {_limit_words(limits)} ({words})")
    if column.rules:
        facts.append(f"read by: {', '.join(column.rules)}")
    return facts


def _limit_words(limits: Limits) -> str:
    """Return thresholds as "at most 3.87; warning above 8.64"."""
    cuts = dict(limits.named_cuts)
    least = min(cuts.values())
    words = [f"at most {three(least)}"]
    for level, limit in cuts.items():
        if level != "info":
            words.append(f"{level} above {three(limit)}")
    return "; ".join(words)


def titles(columns: Sequence[Column]) -> list[str]:
    """Return the titles of columns, in their order."""
    return [column.title for column in columns]
