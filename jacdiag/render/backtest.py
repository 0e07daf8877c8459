"""A backtest in words and as a picture.

It shows figures by rank with their intervals, trivial classifiers, and live rules.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

from jacdiag.records.backtest import BacktestReport, Detector, Estimate, HeldOut, Ranking
from jacdiag.records.output_file import write_output
from jacdiag.render.plots.depth_curves import INK, PALE
from jacdiag.render.plots.report_plot import check_suffix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = 12
_BEST = 4  # figures of an architecture
_STYLE = {
    "font.size": 10.0,
    "font.family": "DejaVu Sans",
    "svg.hashsalt": "jacdiag",
    "svg.fonttype": "path",
}
HEAD = ("figure", "given lr", "within", "over all", "precision", "recall", "runs")


def rows(report: BacktestReport, *, every: bool = False) -> list[tuple[str, ...]]:
    """Return one row for each figure.

    A row holds the AUROC given the learning rate, within strata and over all; precision and recall;
    runs.
    """
    figures = [r for r in report.rankings if not r.trivial]
    shown = figures if every else figures[:_SHOWN]
    return [_row(r) for r in (*shown, *(r for r in report.rankings if r.trivial))]


def _row(ranking: Ranking) -> tuple[str, ...]:
    at = ranking.operating
    precision = f"{at.precision:.2f}" if at is not None and at.precision is not None else "–"
    recall = f"{at.recall:.2f}" if at is not None else "–"
    name = f"({ranking.name})" if ranking.trivial else ranking.name
    return (
        name,
        span(ranking.given_lr),
        span(ranking.within),
        span(ranking.over_all),
        precision,
        recall,
        str(ranking.measured),
    )


def span(estimate: Estimate) -> str:
    """Return text such as "0.93 [0.90, 0.95]", or "–" if nothing could be compared."""
    if estimate.value is None:
        return "–"
    if estimate.lower is None or estimate.upper is None:
        return f"{estimate.value:.2f}"
    return f"{estimate.value:.2f} [{estimate.lower:.2f}, {estimate.upper:.2f}]"


def summary(report: BacktestReport) -> list[str]:
    """Return what was looked at, and which figure came out best.

    The best figure is compared with those that know no Jacobian.
    """
    outcomes = Counter(label.outcome for label in report.labels.values())
    wrong = sum(report.bad.values())
    told = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    lines = [
        (
            f"{len(report.bad)} runs, {wrong} went wrong ({report.asked.get('bad', 'any')}); by "
            "loss "
            f"alone: {told}"
        )
    ]
    if report.asked.get("not_whole"):
        lines.append(
            f"{report.asked['not_whole']} runs did not come to their end and were left out"
        )
    strata = ", ".join(f"{name} {bad} of {count}" for name, (count, bad) in report.strata.items())
    lines.append(f"strata (went wrong): {strata}")
    best = report.best
    trivial = max((r.within.value or 0.0 for r in report.rankings if r.trivial), default=0.0)
    if best is None:
        return [*lines, "no figure could be ranked within one architecture and learning rate"]
    by = max(
        (r for r in report.rankings if not r.trivial and r.within.value is not None),
        key=lambda r: r.within.value or 0.0,
    )
    lines.append(f"best given the learning rate: {best.name}, {span(best.given_lr)}")
    lines.append(
        f"best within an architecture: {by.name}, {span(by.within)}; best trivial classifier "
        f"{trivial:.2f}"
    )
    return lines


def detected(detector: Detector, lead: int) -> str:
    """One live rule in a sentence."""
    rate = detector.alarms_per_10k
    told = (
        f"{rate:.2f} alarms in 10,000 healthy steps ({detector.healthy_steps:,} seen)"
        if rate is not None
        else ("no healthy step was seen")
    )
    median = (
        f", median lead {detector.median_lead:g} steps" if detector.median_lead is not None else ""
    )
    seen = f"{detector.found} of {detector.bad} found before the loss left its band"
    counts = sorted(detector.ahead_by_outcome.items())
    kinds = ", ".join(f"{kind} {ahead} of {count}" for kind, (ahead, count) in counts)
    kinds = f" ({kinds})" if kinds else ""
    return (
        f"{detector.code}: {seen}, {detector.ahead} at least {lead} steps "
        f"before{kinds}{median}; {told}"
    )


def by_stratum(report: BacktestReport) -> list[str]:
    """Return the best figures of each architecture, given the learning rate.

    The best figure that knows no Jacobian stands next to them.
    """
    lines = []
    for name in report.strata:
        known = [(r.given_by_stratum.get(name), r) for r in report.rankings]
        ranked = sorted(((v, r) for v, r in known if v is not None), key=lambda pair: -pair[0])
        told = [
            f"{v:.2f} {r.name}" for v, r in ranked if not r.trivial and not r.name.endswith("x lr")
        ][:_BEST]
        rival = next((f"; {v:.2f} {r.name}" for v, r in ranked if r.trivial), "")
        lines += [f"{name}: {', '.join(told)}{rival}"] if told else []
    return lines


def foretold(one: HeldOut) -> list[str]:
    """One factor that was held out, in sentences."""
    levels = ", ".join(
        f"{name} ({level.bad} of {level.runs}, by {level.figure or 'nothing'})"
        for name, level in one.levels.items()
    )
    rivals = {name: e.value for name, e in one.trivial.items() if e.value is not None}
    best = max(rivals, key=lambda name: rivals[name], default=None)
    beside = f"; best trivial classifier {rivals[best]:.2f} ({best})" if best is not None else ""
    one_figure = f", one figure for all {span(one.one_figure)}"
    lines = [
        f"held out by {one.factor}: {levels}",
        f"  AUROC, learning rate given: {span(one.auroc)}{one_figure}{beside}",
    ]
    if one.brier is not None:
        alone = (
            f", {one.brier_rate_alone:.3f} by learning rate alone"
            if one.brier_rate_alone is not None
            else ""
        )
        lines.append(
            f"  chance: Brier score {one.brier:.3f}{alone}; false alarms "
            f"{_part(one.false_alarms)}, "
            f"found {_part(one.recall)}"
        )
        bins = "  ".join(
            f"{b.chance:.0%}→{b.bad / b.runs:.0%} of {b.runs}" for b in one.calibration
        )
        lines.append(f"  chance → went wrong: {bins}")
    for name, t in one.transfer.items():
        if t.expected is not None and t.observed is not None:
            ranked = f", AUROC {t.auroc:.2f}" if t.auroc is not None else ""
            told = f"expected {t.expected:.0%}, went wrong {t.observed:.0%} of {t.runs}{ranked}"
            lines.append(f"  {name}: {told}; {_by(t.figures)}")
    return lines


def _by(figures: list[str]) -> str:
    return (
        "by "
        + ", ".join(figures[:2])
        + (f" and {len(figures) - 2} more" if len(figures) > 2 else "")
    )


def _part(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def markdown(report: BacktestReport) -> str:
    """The whole as Markdown."""
    lines = [
        "# Backtest",
        "",
        *(f"- {line}" for line in summary(report)),
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + "|".join([":---"] + ["---:"] * (len(HEAD) - 1)) + "|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows(report, every=True)]
    rate = report.asked.get("false_alarms", 0.05)
    lines += [
        "",
        "AUROC with a 95% bootstrap interval; precision and recall at a false-alarm rate of "
        f"{rate:g}.",
        "",
    ]
    if each := by_stratum(report):
        lines += [
            "## Within one architecture, learning rate given",
            "",
            "The best figures, then the best that knows no Jacobian (times lr nothing changes).",
            "",
            *(f"- {line}" for line in each),
            "",
        ]
    if report.detectors:
        lines += [
            "## Live rules",
            "",
            *(f"- {detected(d, report.asked.get('lead', 0))}" for d in report.detectors),
            "",
        ]
    if report.held_out:
        lines += ["## Held out", ""]
        lines += [
            f"{'  ' if line.startswith(' ') else ''}- {line.strip()}"
            for one in report.held_out
            for line in foretold(one)
        ] + [""]
    if report.curves:
        lines += [
            "## Curves of the chance",
            "",
            "| placement | figure | 1 | ln figure | ln lr | ln warm-up | runs | went wrong |",
            "|:---|:---|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {c.placement} | {c.figure} | "
            + " | ".join(_four(c.coefficients))
            + f" | {c.runs} | {c.bad} |"
            for c in report.curves.values()
        ] + [""]
    return "\n".join(lines)


def _four(coefficients: list[float]) -> list[str]:
    return [f"{value:.3g}" for value in coefficients] + ["–"] * (4 - len(coefficients))


def save(report: BacktestReport, path: str | os.PathLike[str]) -> None:
    """Draw the figures by rank and write the picture.

    The suffix (.png, .svg, .pdf) chooses the format.
    """
    from matplotlib import style

    suffix = check_suffix(path)
    undated: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}[
        suffix
    ]
    buffer = io.BytesIO()
    with style.context(_STYLE, after_reset=True):
        draw(report).savefig(buffer, format=suffix[1:], dpi=150, metadata=undated)
    write_output(path, buffer.getvalue())


def draw(report: BacktestReport) -> Figure:
    """Build the picture: the AUROC of each figure with its interval, one line a figure.

    Trivial classifiers are pale and stand below.
    """
    from matplotlib.figure import Figure

    kept = [r for r in report.rankings if not r.trivial][:_SHOWN] + [
        r for r in report.rankings if r.trivial
    ]
    figure = Figure(figsize=(9.0, 1.4 + 0.3 * len(kept)), layout="constrained")
    for place, (axes, title, of) in enumerate(
        zip(
            figure.subplots(1, 2, sharey=True),
            ("architecture and learning rate given", "architecture given"),
            ("given_lr", "within"),
            strict=True,
        )
    ):
        axes.axvline(0.5, color=PALE, linewidth=0.8)
        for height, ranking in enumerate(reversed(kept)):
            estimate: Estimate = getattr(ranking, of)
            colour = PALE if ranking.trivial else INK
            if estimate.value is None:
                continue
            if estimate.lower is not None and estimate.upper is not None:
                axes.plot(
                    [estimate.lower, estimate.upper], [height, height], color=colour, linewidth=1.5
                )
            axes.plot([estimate.value], [height], "o", color=colour, markersize=4.5)
        axes.set_xlim(0.0, 1.02)
        axes.set_xlabel(f"AUROC, {title}")
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.tick_params(axis="y", length=0)
        if place == 0:
            axes.set_yticks(range(len(kept)), [r.name for r in reversed(kept)])
    wrong = sum(report.bad.values())
    figure.suptitle(
        f"What foretold that a run went wrong: {wrong} of {len(report.bad)} runs", fontsize=11
    )
    return figure
