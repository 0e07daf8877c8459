"""Two models compared: what each of them is, what changed, and how far the comparison goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jacdiag.comparison.match import Pair
from jacdiag.records import Report
from jacdiag.render.content.changed_figures import ChangeSummary, summarize_changes
from jacdiag.render.content.compared_figures import verdict
from jacdiag.render.content.sentences import legible, probe_words


@dataclass(frozen=True)
class ComparisonView:
    """Everything that is said of a comparison. No text in it holds a control character.

    Attributes:
        models: A and B.
        pairs: every pair of figures, in the order of depth.
        verdict: one sentence: where the models differ first.
        notes: why figures may differ for a reason outside the models.
        summary: what changed.
    """

    models: list[ComparedModel]
    pairs: list[Pair]
    verdict: str
    notes: list[str]
    summary: ChangeSummary

    @property
    def model_lines(self) -> list[str]:
        """A line for each model."""
        return _model_lines(self.models)

    def shown_pairs(self, *, all_rows: bool = False) -> list[Pair]:
        """Return the pairs that differ; with `all_rows` every pair."""
        # 1. All.
        if all_rows:
            return self.pairs

        # 2. Those that differ.
        shown = []
        for pair in self.pairs:
            if pair.parts:
                shown.append(pair)
        return shown


def build_comparison_view(
    pairs: Sequence[Pair],
    notes: Sequence[str],
    reports: tuple[Report, Report],
    names: tuple[str, str],
) -> ComparisonView:
    """Build what is shown of two models compared.

    Args:
        pairs: every pair of figures, in the order of depth.
        notes: why figures may differ for a reason outside the models.
        reports: A and B.
        names: what the user calls the two.
    """
    first, second = reports
    return ComparisonView(
        models=compared_models(first, second, names),
        pairs=list(pairs),
        verdict=verdict(pairs),
        notes=[legible(note) for note in notes],
        summary=summarize_changes(pairs),
    )


@dataclass(frozen=True)
class ComparedModel:
    """What one of the two models is.

    Attributes:
        letter: "A" or "B".
        name: as the user wrote it.
        step: of the training; None if the source does not say it.
        state: "init" or "trained"; "" if it is not known.
        probe: what it was run on, in words.
    """

    letter: str
    name: str
    step: int | None
    state: str
    probe: str

    @property
    def stage(self) -> list[str]:
        """Step and state, each as a few words."""
        # 1. The step. That of an initialized model goes without saying.
        stage = []
        if self.step is not None:
            stage.append(f"step {self.step:,}")
        elif self.state == "trained":
            stage.append("step not known")

        # 2. The state.
        state = self.state or "state not known"
        return [*stage, state]

    @property
    def facts(self) -> list[str]:
        """Name, step and state, and probe, each as a few words."""
        return [self.name, ", ".join(self.stage), self.probe]


def compared_models(a: Report, b: Report, names: tuple[str, str]) -> list[ComparedModel]:
    """Return what the two models are, A first.

    Args:
        a: the first report.
        b: the second one.
        names: what the user calls the two.
    """
    models = []
    for letter, report, name in zip("AB", (a, b), names, strict=True):
        # A report may come from a file: whatever stands there is checked.
        step = report.source.get("step")
        if not isinstance(step, int):
            step = None
        has_norm = any(row.branch_norm is not None for row in report.sublayers)
        probe = "weights alone, no norm was measured"
        if report.probe is not None and has_norm:
            probe = f"probe: {probe_words(report)}"
        model = ComparedModel(letter, name, step, str(report.state or ""), probe)
        models.append(legible_model(model))
    return models


def legible_model(model: ComparedModel) -> ComparedModel:
    """Return the model with printable characters only."""
    return ComparedModel(
        letter=model.letter,
        name=legible(model.name),
        step=model.step,
        state=legible(model.state),
        probe=legible(model.probe),
    )


def _model_lines(models: Sequence[ComparedModel]) -> list[str]:
    """Return a line for each model, the facts below each other."""
    # 1. The width of each fact. The probe stands last and needs none.
    rows = [[model.letter, *model.facts] for model in models]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    widths[-1] = 0

    # 2. The lines.
    return ["  ".join(map(str.ljust, row, widths)) for row in rows]
