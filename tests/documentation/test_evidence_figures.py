"""The headline figures of the pages on evidence are those of the result files."""

from __future__ import annotations

import json
import re
import statistics
from functools import cache
from typing import Any

import pytest
from jacdiag_cli.main import main

from jacdiag.pipeline import with_remedies
from jacdiag.rules.thresholds import load_thresholds
from scripts.docs.repository_files import ROOT

LAB = ROOT / "examples" / "spike_lab" / "results"
SUMMARY = "docs/evidence/what-it-can-tell.md"
FIRST_STEP = "docs/evidence/before-the-first-step.md"
INDEX = "docs/evidence/index.md"
ANNOUNCED = "docs/evidence/announced-divergences.md"
FACTORS = {
    "seed": "seeds",
    "warmup": "warm-ups",
    "recipe": "recipes",
    "branch_std": "scales of the branches",
    "layers": "depths",
    "width": "widths",
    "embed_std": "scales of the embedding",
}


@cache
def page(path: str) -> str:
    """Return the text of a page with single spaces."""
    return " ".join((ROOT / path).read_text(encoding="utf-8").split())


@cache
def result(name: str) -> Any:
    """Return a JSON file of the benchmarks."""
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))


def test_what_the_host_waits_for_is_that_of_the_count() -> None:
    counts = result("accelerator.json")["audit"]
    for row in counts.values():
        assert f"{row['waits']} of {row['waits_allowed']}" in page("docs/concepts/devices.md")
        assert f"{row['waits_per_sublayer_beyond']}" in page("docs/concepts/devices.md")


def test_the_default_command_takes_what_was_measured() -> None:
    run = result("default_command.json")
    shown, phases = run["seconds_until_shown"], run["seconds_of_phases"]
    assert (
        f"the first verdict is shown after {shown['large shortcut']:.0f} s, both after "
        f"{shown['both conditions']:.0f} s. All of it takes {run['seconds']:.0f} s, "
        f"{phases['remedies']:.0f} of them for remedies ({run['remedies_over_measuring']} of the "
        "measuring)"
    ) in page("docs/evidence/cost.md")
    first_look, sublayers = phases["first look"], phases["sub-layers"]
    claim = f"this takes {first_look:.0f} s, and the sub-layers {sublayers:.0f} s"
    assert claim in page("docs/how-to/audit-a-model.md")


def test_the_price_of_norms_and_audits_is_what_was_measured() -> None:
    text = page("docs/evidence/cost.md")
    run = result("spectral.json")

    # 1. Compared with others: the median and the least of four sub-layers.
    lines = {
        "power, own products": "power iteration on our products. The fair comparison: the solver "
        "alone differs",
        "svds, own products": "`svds` on our products (it does not stop at 1%)",
        "power, jvp": "power iteration by jvp (its products cost more)",
        "svds, jvp": "`scipy.sparse.linalg.svds` on `torch.func` jvp and vjp (both)",
    }
    for peer, words in lines.items():
        ratios = [contest["ratio"][peer] for contest in run["contests"]]
        row = f"{words} | {statistics.median(ratios):.1f} | {min(ratios):.1f} |"
        assert f"times faster than {row}" in text

    # 2. An audit.
    goals = {goal["what"]: goal["measured"] for goal in run["goals"]}
    median = run["every_sublayer"]["median"]
    assert f"median of 24 sub-layers | {median} |" in text
    assert f"{median} forwards of the sub-layer" in page("README.md")
    assert f"building | {run['audit']['share_outside_products']:.1%} |" in text
    assert f"plain forwards | {run['recording']['recording_in_forwards']} |" in text
    memory = goals["peak memory over a training step + basis"]
    assert f"plus the Lanczos basis | {memory:.2f} |" in text


class Backtest:
    """What a page that `jacdiag backtest --markdown` wrote says."""

    def __init__(self, name: str) -> None:
        self.text = (LAB / name).read_text(encoding="utf-8")

    def read(self, pattern: str) -> tuple[str, ...]:
        """Return the groups of a pattern that is on the page."""
        match = re.search(pattern, self.text)
        assert match is not None, pattern
        return match.groups()

    @property
    def best(self) -> str:
        """AUROC of the best figure, with its interval."""
        return self.read(r"best given the learning rate: .*, (\S+ \[.*\])\n")[0]

    @property
    def lead(self) -> str:
        """Lead over the gradient norm, without plus signs."""
        pattern = r"its lead over gradient norm, first step x width: (\S+ \[.*\]);"
        return self.read(pattern)[0].replace("+", "")

    @property
    def candidates(self) -> str:
        """How many figures the best one was picked among."""
        return self.read(r"it was picked among (\d+) figures")[0]

    @property
    def gradient_norm(self) -> str:
        """AUROC of the gradient norm times width, with its interval."""
        return self.read(r"\| \(gradient norm, first step x width\) \| (.*?) \|")[0]

    def held_out(self, factor: str) -> tuple[str, str, str]:
        """Return AUROC with interval, AUROC of the best trivial classifier, and its name."""
        value, rival, name = self.read(
            rf"held out by {factor}: .*\n.*learning rate given: (.*?), one figure.*"
            r"best trivial classifier (\S+) \((.*)\)"
        )
        return value, rival, name


WRONG = Backtest("cpu.md")
DIVERGED = Backtest("cpu-diverged.md")


def test_counts_of_the_lab_are_on_every_page_that_uses_them() -> None:
    runs, wrong, healthy, diverged, spiked = WRONG.read(
        r"(\d+) runs, (\d+) went wrong \(any\); .*: (\d+) healthy, (\d+) diverged, (\d+) spiked"
    )
    merely = WRONG.read(r"- (\d+) of those that went wrong neither diverged nor spiked")[0]
    assert int(wrong) == int(diverged) + int(spiked) + int(merely)
    assert int(runs) == int(healthy) + int(diverged) + int(spiked)
    assert DIVERGED.read(r"(\d+) went wrong \(diverged\)")[0] == diverged
    assert (
        f"{wrong} runs went wrong: {diverged} diverged, {spiked} spiked, and {merely} ended 0.4"
        in (page(FIRST_STEP))
    )
    assert f"{wrong} of them: {diverged} diverged, {spiked} spiked, and {merely} merely" in page(
        SUMMARY
    )
    text = (
        f"Of {runs} small runs {diverged} diverged, {merely} ended worse and only {spiked} spiked"
    )
    assert text in page("README.md")
    assert f"{spiked} of {runs} runs spiked" in page(INDEX)


def test_both_ways_to_count_stand_side_by_side() -> None:
    for text in (
        f"| best figure of the audit | {WRONG.best} | {DIVERGED.best} |",
        f"times width | {WRONG.gradient_norm} | {DIVERGED.gradient_norm} |",
        f"| lead of the best figure | {WRONG.lead} | {DIVERGED.lead} |",
        f"| picked among | {WRONG.candidates} figures | {DIVERGED.candidates} figures |",
    ):
        assert text in page(SUMMARY)
    for backtest in (WRONG, DIVERGED):
        name = backtest.read(r"best given the learning rate: (.*?), \d")[0]
        assert f"`{name}`" in page(SUMMARY)
    norm = WRONG.gradient_norm.split()[0]
    row = f"| {WRONG.best} | {norm} | {DIVERGED.best} | {DIVERGED.gradient_norm} |"
    assert f"| the best single figure, on all runs {row}" in page(FIRST_STEP)
    assert f'{WRONG.lead} on "wrong"' in page(FIRST_STEP)
    assert f"picked among {WRONG.candidates} figures" in page(FIRST_STEP)
    assert f"it leads by {DIVERGED.lead}" in page(FIRST_STEP)
    readme = page("README.md")
    text = f"best of {WRONG.candidates} figures: runs that go wrong; of {DIVERGED.candidates}: that"
    assert text in readme
    assert f"| {WRONG.best}; {DIVERGED.best} |" in readme
    assert f"| {WRONG.lead}; {DIVERGED.lead} |" in readme


@pytest.mark.parametrize("factor", FACTORS)
def test_each_row_of_what_was_held_out(factor: str) -> None:
    wrong, wrong_rival, _ = WRONG.held_out(factor)
    diverged, rival, name = DIVERGED.held_out(factor)
    if not name.startswith("gradient norm"):
        rival = f"{rival}, loss of the first step"
        assert name == "loss, first step"
    row = f"| {wrong} | {wrong_rival} | {diverged} | {rival} |"
    assert f"| the chance, {FACTORS[factor]} held out {row}" in page(FIRST_STEP)


def test_ranges_over_what_was_held_out() -> None:
    wrong = sorted(WRONG.held_out(factor)[0].split()[0] for factor in FACTORS)
    diverged = sorted(DIVERGED.held_out(factor)[0].split()[0] for factor in FACTORS)
    rivals = sorted(DIVERGED.held_out(factor)[1] for factor in FACTORS)
    summary = f'it is {wrong[0]} to {wrong[-1]} for "wrong" (goal 0.90) and {diverged[0]} to '
    assert f'{summary}{diverged[-1]} for "diverged"' in page(SUMMARY)
    assert f"in part: {wrong[0]} to {wrong[-1]} of the pairs" in page(INDEX)
    text = (
        f"{diverged[0]} to {diverged[-1]} of the pairs, {rivals[0]} to {rivals[-1]} by what knows"
    )
    assert text in page(INDEX)


def test_no_figure_is_ahead_if_only_divergence_counts() -> None:
    """The page says so in bold. It would have to go if one of these came out otherwise."""
    assert "something that knows no Jacobian is ahead in every row" in page(FIRST_STEP)
    assert "better than every figure of the audit, within the noise" in page(SUMMARY)
    assert float(DIVERGED.best.split()[0]) < float(DIVERGED.gradient_norm.split()[0])
    for factor in FACTORS:
        value, rival, _ = DIVERGED.held_out(factor)
        assert float(value.split()[0]) < float(rival)
    assert float(WRONG.lead.split("[")[1].split(",")[0]) < 0, "the interval of the lead holds 0"


def test_announced_divergences_and_spikes() -> None:
    # 1. All grids at the limit that ships, and how near the rate alone comes.
    foresight = result("foresight.json")
    by_placement = foresight["by_placement"]
    diverged = sum(point["diverged"] for point in by_placement.values())
    ahead = sum(point["ahead"] for point in by_placement.values())
    assert {name for name, point in by_placement.items() if point["diverged"]} == {"none", "post"}
    assert f"{ahead} of {diverged} divergences (goal 80%, missed)" in page(SUMMARY)
    assert f"The goal was missed: {ahead} of {diverged} (77%" in page(ANNOUNCED)
    assert f"All {diverged} are runs without norms or in post-norm" in page(SUMMARY)
    figure = most_announced(foresight["points"]["figure"])
    rate = most_announced(foresight["points"]["rate and warm-up alone"])
    assert f"{rate} of {diverged} at up to one false alarm, where JD105 has {figure}" in page(
        SUMMARY
    )

    # 2. Runs that spiked.
    counts = []
    for name in ("rise", "live", "unseen"):
        counts.append(Backtest(f"{name}.md").read(r"JD105: .*spiked (\d+) of (\d+)\)"))
    assert "spiked" not in Backtest("fresh.md").read(r"- (\d+ runs, .*)\n")[0]
    early = sum(int(ahead_of_spike) for ahead_of_spike, _ in counts)
    spiked = sum(int(of) for _, of in counts)
    assert f"{spiked} runs spiked, and JD105 fired 20 steps before {early} of them" in page(SUMMARY)


def most_announced(points: dict[str, list[dict[str, Any]]]) -> int:
    """Return the most divergences that were announced at up to one alarm in 10,000 steps."""
    most = 0
    for same_limit in zip(*points.values(), strict=True):
        alarms = sum(point["alarms"] for point in same_limit)
        if 1e4 * alarms <= sum(point["healthy_steps"] for point in same_limit):
            most = max(most, sum(point["ahead"] for point in same_limit))
    return most


def test_faults_and_init_bugs() -> None:
    faults = result("faults.json")["table"].values()
    found = sum(row["found"] for row in faults)
    trials = sum(row["trials"] for row in faults)
    assert f"{found} of {trials} injected faults were found in time" in page(SUMMARY)
    assert f"| {found} of {trials} that were injected, on time |" in page(INDEX)
    batch = result("faults.json")["table"]["corrupted batch"]
    assert f"within 10 steps | {batch['within_10']} of {batch['trials']} positions |" in page(
        "README.md"
    )

    bugs = result("initbench.json")["summary"]
    assert f"{bugs['found']} of {bugs['bugs']} rebuilt bugs were found" in page(SUMMARY)
    assert f"{bugs['found']} of {bugs['bugs']} found, {bugs['located']} located" in page(INDEX)
    assert f"| {bugs['found']}; {bugs['located']} of {bugs['bugs']} |" in page("README.md")
    correct = bugs["recipes"] + bugs["bugs"]
    assert bugs["mended_alarmed"] == bugs["recipes_alarmed"] == 0
    assert f"no false alarm in {correct} correct models" in page(INDEX)


def test_seeds_of_mended_models_differ_by_less_than_a_clear_figure() -> None:
    spreads = result("remedies.json")["spread"].values()
    largest = max(max(spread["largest_over_median"].values()) for spread in spreads)
    said = page(INDEX)
    assert f"at most {largest:.2f} times the median" in said
    assert {spread["seeds"] for spread in spreads} == {12} and "of 12 seeds" in said
    assert largest < with_remedies._CLEAR


def test_remedies_are_of_verdicts() -> None:
    recipes = result("remedies.json")["recipes"].values()
    passed = sum(row["passed"] for row in recipes)
    of = sum(row["of"] for row in recipes)
    assert sum(row["passed_unmended"] for row in recipes) == 0
    assert f"passes {passed} of {of} new seeds" in page(INDEX)
    assert f"yes, {passed} of {of}; no run was trained with one" in page(INDEX)
    assert "Remedies were tried on verdicts, not on runs" in page("README.md")
    first_sentence = page("README.md").removeprefix("# jacdiag ").split(". ")[0]
    assert not re.search(r"spike|predict|diverge", first_sentence)


def test_the_plain_command_gives_the_counts_and_figures_of_the_page(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["backtest", str(LAB / "fresh.runs.gz"), "--resamples", "1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    written = [line.removeprefix("- ") for line in Backtest("fresh.md").text.splitlines()[2:6]]
    assert printed[:3] == written[:3]
    value = re.compile(r"best given the learning rate: .*, \S+ (?=\[)")
    assert value.match(printed[3])[0] == value.match(written[3])[0]  # type: ignore[index]
    assert printed[0].startswith("80 runs, 28 went wrong")
    assert "80 runs, of which 28 went wrong" in page("docs/how-to/predict-runs.md")


@pytest.mark.parametrize("name", ["checkpoint_growth", "growth_from_init"])
def test_page_on_comparing_names_the_thresholds_of_growth(name: str) -> None:
    limits = load_thresholds().limits(name, "pre")
    assert f"{limits.info:g} and {limits.warning:g} times" in page(
        "docs/how-to/compare-checkpoints.md"
    )
