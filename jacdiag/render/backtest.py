"""A backtest in words and as a picture.

It shows figures by rank with their intervals, trivial classifiers, and live rules.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from jacdiag.records.backtest import (
    LEAST_RUNS,
    BacktestReport,
    Detector,
    Estimate,
    HeldOut,
    Ranking,
)
from jacdiag.records.output_file import write_output
from jacdiag.render.content.depth_curves import INK, PALE
from jacdiag.render.plots.picture_file import STYLE, check_suffix, picture_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHOWN = 12
_BEST = 4  # figures of an architecture
_ABSENT = "–"
HEAD = ("figure", "given lr", "within", "over all", "precision", "recall", "runs")


def rows(report: BacktestReport, *, every: bool = False) -> list[tuple[str, ...]]:
    """Return one row of texts for each figure, under `HEAD`.

    A row holds the AUROC given the learning rate, within strata and over all; precision and recall;
    runs.

    Args:
        report: of a backtest.
        every: return every figure; else the best ones. Trivial classifiers are always there.
    """
    most = _SHOWN
    if every:
        most = len(report.rankings)
    return [_row(ranking) for ranking in _best_and_trivial(report, most)]


def _best_and_trivial(report: BacktestReport, most: int) -> list[Ranking]:
    """Return the best figures, and after them all trivial classifiers."""
    figures, trivial = [], []
    for ranking in report.rankings:
        if ranking.trivial:
            trivial.append(ranking)
        else:
            figures.append(ranking)
    return figures[:most] + trivial


def _row(ranking: Ranking) -> tuple[str, ...]:
    """Return the texts of one figure. A trivial classifier stands in brackets."""
    # 1. Its name.
    name = ranking.name
    if ranking.trivial:
        name = f"({name})"

    # 2. Precision and recall at one rate of false alarms.
    precision, recall = _ABSENT, _ABSENT
    operating = ranking.operating
    if operating is not None:
        recall = f"{operating.recall:.2f}"
        if operating.precision is not None:
            precision = f"{operating.precision:.2f}"

    # 3. How well it ranks.
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
        return _ABSENT
    text = f"{estimate.value:.2f}"

    # Too few runs have a value and no interval.
    lower, upper = estimate.lower, estimate.upper
    if lower is None or upper is None:
        return text
    return f"{text} [{lower:.2f}, {upper:.2f}]"


def signed_span(estimate: Estimate) -> str:
    """Return a difference, such as "+0.07 [-0.02, +0.16]"; "–" if there is none."""
    if estimate.value is None:
        return _ABSENT
    text = f"{estimate.value:+.2f}"
    if estimate.lower is None or estimate.upper is None:
        return text
    return f"{text} [{estimate.lower:+.2f}, {estimate.upper:+.2f}]"


# -- sentences -------------------------------------------------------------------------------------
def summary(report: BacktestReport) -> list[str]:
    """Return what was looked at, and which figure came out best.

    The best figure is compared with those that know no Jacobian.
    """
    # 1. The runs, and how they ended.
    outcomes = Counter(label.outcome for label in report.labels.values())
    counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    definition = report.asked.get("bad", "any")
    lines = [
        f"{len(report.bad)} runs, {sum(report.bad.values())} went wrong ({definition}); "
        f"by loss alone: {counts}"
    ]
    lines += _worse_line(report)
    unfinished = report.asked.get("not_whole")
    if unfinished:
        lines.append(f"{unfinished} runs did not come to their end and were left out")
    strata = ", ".join(f"{name} {bad} of {count}" for name, (count, bad) in report.strata.items())
    lines.append(f"strata (went wrong): {strata}")

    # 2. Why there is no AUROC.
    reason = _no_auroc(report)
    if reason:
        lines.append(reason)

    # 3. The best figures.
    if report.best is not None:
        lines += _best_lines(report, report.best)
    best_within = _best_within(report)
    if best_within is not None:
        lines.append(
            f"best within an architecture: {best_within.name}, {span(best_within.within)}; "
            f"best trivial classifier {_best_trivial_within(report):.2f}"
        )
    return lines


def _worse_line(report: BacktestReport) -> list[str]:
    """Return how many runs only ended over their peers, and which runs are peers."""
    # 1. Runs that went wrong without a divergence or a spike.
    worse = report.asked.get("worse")
    counts_worse = report.asked.get("bad") in ("any", "worse")
    if worse is None or not counts_worse:
        return []
    merely_worse = 0
    for name, is_bad in report.bad.items():
        if is_bad and report.labels[name].outcome == "healthy":
            merely_worse += 1

    # 2. What they are compared with.
    peers = "the best of all runs"
    factors = report.asked.get("peers")
    if factors:
        peers = f"the best run of the same {', '.join(factors)}"

    # 3. Runs of a higher rate are no peers, if the rates are known.
    has_rates = any(
        ranking.name == "learning rate" and ranking.measured for ranking in report.rankings
    )
    if has_rates:
        peers += " at the same or a lower learning rate"
    return [
        f"{merely_worse} of those that went wrong neither diverged nor spiked, and ended "
        f"{worse:g} nats or more over {peers}"
    ]


def _no_auroc(report: BacktestReport) -> str:
    """Return why no figure has an AUROC within one architecture and learning rate, or "".

    The reason is the widest comparison that fails.
    """
    # 1. There is one.
    if report.best is not None:
        return ""

    # 2. The report does not say how many runs could be compared.
    comparable = report.comparable
    if not comparable:
        return "no figure could be ranked within one architecture and learning rate"

    # 3. Too few runs.
    needs = f"an AUROC takes at least {LEAST_RUNS} runs that went wrong and {LEAST_RUNS} others"
    wrong = sum(report.bad.values())
    others = len(report.bad) - wrong
    if min(wrong, others) < LEAST_RUNS:
        return f"no AUROC: {needs}; here {wrong} went wrong and {others} did not"

    # 4. No figure that was measured on enough of them.
    if all(ranking.trivial for ranking in report.rankings):
        return "no figure to rank: --figure COLUMN names a column that holds one, or audit each run"
    wrong, others = comparable["given_lr"]
    if min(wrong, others) < LEAST_RUNS:
        return (
            "no AUROC within one architecture, learning rate and warm-up: "
            f"{needs} that share them; here {wrong} and {others} do"
        )
    return "no AUROC within one architecture and learning rate: too few runs have a figure"


def _best_lines(report: BacktestReport, best: Ranking) -> list[str]:
    """Return the best figure given the learning rate, and its lead over what is trivial."""
    lines = [f"best given the learning rate: {best.name}, {span(best.given_lr)}"]
    lead = report.lead
    if lead is None:
        return lines
    lines.append(
        f"its lead over {lead.rival}: {signed_span(lead.difference)}; it was picked among "
        f"{lead.candidates} figures on these runs"
    )
    return lines


def _best_within(report: BacktestReport) -> Ranking | None:
    """Return the figure with the largest AUROC within strata; None if no figure has one."""
    candidates = []
    for ranking in report.rankings:
        if ranking.trivial:
            continue
        if ranking.within.value is not None:
            candidates.append(ranking)
    return max(candidates, key=lambda ranking: ranking.within.value or 0.0, default=None)


def _best_trivial_within(report: BacktestReport) -> float:
    """Return the largest AUROC within strata of the trivial classifiers."""
    trivial = [ranking for ranking in report.rankings if ranking.trivial]
    return max((ranking.within.value or 0.0 for ranking in trivial), default=0.0)


def detected(detector: Detector, lead: int) -> str:
    """Return the record of one live rule as a sentence.

    Args:
        detector: the live rule.
        lead: steps that count as early.
    """
    # 1. The bad runs that it found, and how early.
    text = (
        f"{detector.code}: {detector.found} of {detector.bad} found before the loss left its band, "
        f"{detector.ahead} at least {lead} steps before"
    )
    counts = sorted(detector.ahead_by_outcome.items())
    if counts:
        listed = ", ".join(f"{outcome} {ahead} of {count}" for outcome, (ahead, count) in counts)
        text += f" ({listed})"
    if detector.median_lead is not None:
        text += f", median lead {detector.median_lead:g} steps"

    # 2. Its false alarms.
    rate = detector.alarms_per_10k
    if rate is None:
        return f"{text}; no healthy step was seen"
    return f"{text}; {rate:.2f} alarms in 10,000 healthy steps ({detector.healthy_steps:,} seen)"


def by_stratum(report: BacktestReport) -> list[str]:
    """Return the best figures of each architecture, given the learning rate.

    The best figure that knows no Jacobian is named last.
    """
    lines = []
    for stratum in report.strata:
        figures, trivial = _scores_in_stratum(report, stratum)
        if not figures:
            continue  # too few runs of this architecture
        line = f"{stratum}: {', '.join(figures[:_BEST])}"
        if trivial:
            line += f"; {trivial[0]}"
        lines.append(line)
    return lines


def _scores_in_stratum(report: BacktestReport, stratum: str) -> tuple[list[str], list[str]]:
    """Return the figures and the trivial classifiers of one stratum, the best first.

    Each is a text such as "0.93 branch norm". A figure times the learning rate is left out, for it
    ranks runs of the same learning rate as the figure does.
    """
    figures = []
    trivial = []
    for score, ranking in _scored_rankings(report, stratum):
        text = f"{score:.2f} {ranking.name}"
        if ranking.trivial:
            trivial.append(text)
        elif not ranking.name.endswith("x lr"):
            figures.append(text)
    return figures, trivial


def _scored_rankings(report: BacktestReport, stratum: str) -> list[tuple[float, Ranking]]:
    """Return the rankings that have a score in one stratum, from the best to the worst."""
    scored = []
    for ranking in report.rankings:
        score = ranking.given_by_stratum.get(stratum)
        if score is not None:
            scored.append((score, ranking))

    return sorted(scored, key=lambda pair: -pair[0])


# -- what was held out -----------------------------------------------------------------------------
def held_out_lines(held_out: HeldOut) -> list[str]:
    """Return what became of the levels of one factor that were held out, in sentences."""
    # 1. The levels, and how well the others predict them.
    levels = []
    for name, level in held_out.levels.items():
        figure = level.figure or "nothing"
        levels.append(f"{name} ({level.bad} of {level.runs}, by {figure})")
    lines = [f"held out by {held_out.factor}: {', '.join(levels)}", _held_out_auroc(held_out)]

    # 2. How good the chances were, if there are some.
    if held_out.brier is not None:
        lines += _chance_lines(held_out)
    return lines + _transfer_lines(held_out)


def _held_out_auroc(held_out: HeldOut) -> str:
    """Return how well the figures ranked the held-out runs, next to the trivial classifiers."""
    text = (
        f"  AUROC, learning rate given: {span(held_out.auroc)}, "
        f"one figure for all {span(held_out.one_figure)}"
    )

    # The best of those that know no Jacobian.
    trivial = {}
    for name, estimate in held_out.trivial.items():
        if estimate.value is not None:
            trivial[name] = estimate.value
    if trivial:
        best = max(trivial, key=lambda name: trivial[name])
        text += f"; best trivial classifier {trivial[best]:.2f} ({best})"
    return text


def _chance_lines(held_out: HeldOut) -> list[str]:
    """Return how good the chances were: Brier score, alarms, and chances against outcomes."""
    score = f"Brier score {held_out.brier:.3f}"
    if held_out.brier_rate_alone is not None:
        score += f", {held_out.brier_rate_alone:.3f} by learning rate alone"
    alarms = f"false alarms {_percent(held_out.false_alarms)}, found {_percent(held_out.recall)}"
    groups = [
        f"{group.chance:.0%}→{group.bad / group.runs:.0%} of {group.runs}"
        for group in held_out.calibration
    ]
    return [f"  chance: {score}; {alarms}", f"  chance → went wrong: {'  '.join(groups)}"]


def _transfer_lines(held_out: HeldOut) -> list[str]:
    """Return for each architecture how often its runs were expected to go wrong, and did."""
    lines = []
    for name, transfer in held_out.transfer.items():
        # An architecture without curves has nothing to be expected.
        if transfer.expected is None or transfer.observed is None:
            continue
        text = (
            f"expected {transfer.expected:.0%}, "
            f"went wrong {transfer.observed:.0%} of {transfer.runs}"
        )
        if transfer.auroc is not None:
            text += f", AUROC {transfer.auroc:.2f}"
        lines.append(f"  {name}: {text}; by {_first_figures(transfer.figures)}")
    return lines


def _first_figures(figures: list[str]) -> str:
    """Return the first two figures, and how many there are beyond."""
    text = ", ".join(figures[:2])
    if len(figures) > 2:
        text += f" and {len(figures) - 2} more"
    return text


def _percent(share: float | None) -> str:
    """Return a share in percent, or "–" if it is not known."""
    if share is None:
        return _ABSENT  # no run to take it over
    return f"{share:.0%}"


# -- Markdown --------------------------------------------------------------------------------------
def markdown(report: BacktestReport) -> str:
    """Return a backtest as Markdown: summary, all figures, live rules, held-out levels, curves."""
    # 1. The summary, and the table of all figures.
    rate = report.asked.get("false_alarms", 0.05)
    lines = [
        "# Backtest",
        "",
        *_bullets(summary(report)),
        "",
        _table_row(HEAD),
        "|" + "|".join([":---"] + ["---:"] * (len(HEAD) - 1)) + "|",
        *(_table_row(cells) for cells in rows(report, every=True)),
        "",
        "AUROC with a 95% bootstrap interval; precision and recall at a false-alarm rate of "
        f"{rate:g}.",
        "",
    ]

    # 2. The sections that have something to show.
    strata = by_stratum(report)
    if strata:
        lines += [
            "## Within one architecture, learning rate given",
            "",
            "The best figures, then the best that knows no Jacobian (times lr nothing changes).",
            "",
            *_bullets(strata),
            "",
        ]
    if report.detectors:
        lead = report.asked.get("lead", 0)
        records = [detected(detector, lead) for detector in report.detectors]
        lines += ["## Live rules", "", *_bullets(records), ""]
    if report.held_out:
        lines += ["## Held out", ""]
        for held_out in report.held_out:
            lines += _nested_bullets(held_out_lines(held_out))
        lines.append("")
    if report.curves:
        lines += _curve_table(report)
    return "\n".join(lines)


def _bullets(texts: Iterable[str]) -> list[str]:
    """Return list items."""
    return [f"- {text}" for text in texts]


def _nested_bullets(texts: Iterable[str]) -> list[str]:
    """Return list items; an indented text belongs to the item above it."""
    items = []
    for text in texts:
        item = f"- {text.strip()}"
        if text.startswith(" "):
            item = f"  {item}"
        items.append(item)
    return items


def _table_row(cells: Iterable[str]) -> str:
    """Return a row of a table."""
    return "| " + " | ".join(cells) + " |"


def _curve_table(report: BacktestReport) -> list[str]:
    """Return the section on the fitted curves, with their coefficients."""
    lines = [
        "## Curves of the chance",
        "",
        "| placement | figure | 1 | ln figure | ln lr | ln warm-up | runs | went wrong |",
        "|:---|:---|---:|---:|---:|---:|---:|---:|",
    ]
    for curve in report.curves.values():
        # A curve may have no coefficient for the warm-up.
        coefficients = [f"{value:.3g}" for value in curve.coefficients]
        missing = [_ABSENT] * (4 - len(coefficients))
        counts = [str(curve.runs), str(curve.bad)]
        lines.append(_table_row([curve.placement, curve.figure, *coefficients, *missing, *counts]))
    return [*lines, ""]


# -- picture ---------------------------------------------------------------------------------------
def save(report: BacktestReport, path: str | os.PathLike[str]) -> None:
    """Draw the figures by rank and write the picture.

    The suffix (.png, .svg, .pdf) chooses the format.

    Args:
        report: of a backtest.
        path: where to; "-" is stdout.

    Raises:
        UsageError: another suffix, or a path that cannot be written to.
    """
    write_output(path, picture(report, check_suffix(path)))


def picture(report: BacktestReport, suffix: str) -> bytes:
    """Return the picture of a backtest. The same report gives the same bytes.

    Args:
        report: of a backtest.
        suffix: of the format: .png, .svg or .pdf.
    """
    style = {**STYLE, "font.size": 10.0}
    return picture_bytes(lambda: draw(report), suffix, dpi=150, style=style)


def draw(report: BacktestReport) -> Figure:
    """Build the picture: the AUROC of each figure with its interval, one line a figure.

    Trivial classifiers are pale and stand below.
    """
    from matplotlib.figure import Figure

    # 1. Two panels, with the best figure at the top.
    rankings = _best_and_trivial(report, _SHOWN)
    figure = Figure(figsize=(9.0, 1.4 + 0.3 * len(rankings)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    upwards = rankings[::-1]
    _draw_panel(
        left,
        [(ranking, ranking.given_lr) for ranking in upwards],
        "AUROC, architecture and learning rate given",
    )
    left.set_yticks(range(len(upwards)), [ranking.name for ranking in upwards])
    _draw_panel(
        right,
        [(ranking, ranking.within) for ranking in upwards],
        "AUROC, architecture given",
    )

    # 2. The title.
    bad = sum(report.bad.values())
    figure.suptitle(
        f"What predicted that a run went wrong: {bad} of {len(report.bad)} runs", fontsize=11
    )
    return figure


def _draw_panel(axes: Axes, estimates: Sequence[tuple[Ranking, Estimate]], label: str) -> None:
    """Draw estimates with their intervals, from the bottom to the top."""
    # 1. A line where a figure would tell nothing.
    axes.axvline(0.5, color=PALE, linewidth=0.8)

    # 2. The estimates.
    for height, (ranking, estimate) in enumerate(estimates):
        colour = INK
        if ranking.trivial:
            colour = PALE
        _draw_estimate(axes, estimate, height, colour)

    # 3. The axes.
    axes.set_xlim(0.0, 1.02)
    axes.set_xlabel(label)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _draw_estimate(axes: Axes, estimate: Estimate, height: int, colour: str) -> None:
    """Draw a dot for an estimate and a line for its interval, if there is one."""
    if estimate.value is None:
        return
    if estimate.lower is not None and estimate.upper is not None:
        ends = [estimate.lower, estimate.upper]
        axes.plot(ends, [height, height], color=colour, linewidth=1.5)
    axes.plot([estimate.value], [height], "o", color=colour, markersize=4.5)
