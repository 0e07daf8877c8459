"""After the first steps, say once what a watch does not see."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from jacdiag.monitor.batches import Batches
from jacdiag.records import Report
from jacdiag.rules.wording import list_names

FIRST_STEPS = 5  # a loop that evaluates or warms up before it trains has trained by then
_WINDOW = 20  # rows in which a ceiling of the gradient norm is looked for
# of them have to lie at it; norms of ten different batches do not agree by themselves
_AT_CEILING = 10
# clip_grad_norm_ divides by (norm + 1e-6), and a norm in float32 is off by less than this
_SAME_NORM = 1e-3
_OTHER_LOSS = 1e-2  # relative spread of the loss that only other batches or other weights have

_PASS_PROBE = "Pass a batch for the probe: jacdiag.watch(..., probe=input_ids)"


@dataclass(frozen=True)
class ProbeState:
    """What is known about the probe after the first steps.

    Attributes:
        is_random: it runs on random tokens.
        is_needed: Jacobian norms or statistics are measured on it.
    """

    is_random: bool
    is_needed: bool


class Silence:
    """A search for what is missing in the figures of a watch.

    Args:
        warn: called with (topic, text); says each topic once.
        note: called with a text that goes into the log only.
    """

    def __init__(self, warn: Callable[[str, str], None], note: Callable[[str], None]) -> None:
        """Begin before the first step; see the class for the arguments."""
        self.warn = warn
        self.note = note
        self.steps = 0
        self._recent: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self._looked_at_gradients = False

    @property
    def looks_at_batches(self) -> bool:
        """Whether the steps so far are too few for a look at batches and the probe."""
        return self.steps < FIRST_STEPS

    def step_ended(self, kind: str, batches: Batches | None, probe: ProbeState) -> None:
        """Look at batches and the probe, once.

        Args:
            kind: class of the watched model.
            batches: what was seen of the model's forward.
            probe: what the probe runs on.
        """
        self.steps += 1
        if self.steps != FIRST_STEPS:
            return

        # 1. The batches.
        if batches is not None:
            self._look_at_batches(kind, batches, probe)

        # 2. The probe.
        if probe.is_random and probe.is_needed:
            self.warn(
                "random probe",
                "the Jacobian probe runs on random tokens, not on data of the run: no batch had "
                "been seen when it was "
                f"first needed. {_PASS_PROBE}",
            )

    def look_at_probe(self, report: Report) -> None:
        """Say which sub-layers the probe cannot measure, once.

        NaN and Inf are left out: a live rule says those.

        Args:
            report: of a probe.
        """
        # 1. The sub-layers, with the reason of the first.
        names = []
        first_reason = ""
        for row in report.sublayers:
            reason = row.notes.get("branch_norm", "")
            is_lost = "not finite" in reason
            if row.branch_norm is None and reason and not is_lost:
                names.append(row.name)
                first_reason = first_reason or reason

        # 2. The sentence.
        if names:
            self.warn(
                "unmeasured sub-layers",
                f"the Jacobian probe cannot measure {list_names(names)}, whose norms JD504 does "
                f"not watch: {first_reason}",
            )

    def _look_at_batches(self, kind: str, batches: Batches, probe: ProbeState) -> None:
        """Say which batches are not seen or not kept."""
        # 1. Some are missing.
        if batches.in_compiled:
            self.note(
                f"the forward of {kind} is compiled together with the hook of the watch: the last "
                "batch of each step "
                "is seen. Watch the compiled model to see every micro-batch"
            )
        if batches.kept is not None and batches.kept.step_bytes is not None:
            self.note(
                "batches are not kept: those of a step take "
                f"{batches.kept.step_bytes / 2**20:,.0f} MB. "
                "keep_batches=N keeps those of the last N forwards"
            )

        # 2. None was seen, and that matters.
        if batches.seen or batches.in_compiled:
            return
        if batches.kept is None and not probe.is_needed:
            return
        if batches.in_graph:
            self.warn(
                "no batch",
                f"the forward of {kind} was captured into a CUDA graph, and a replay of it calls "
                f"no hook: no batch is seen or kept. {_PASS_PROBE}",
            )
            return
        if batches.in_eval:
            self.warn(
                "no batch",
                f"{kind} ran in eval mode in the first {self.steps} steps: its batches are taken "
                "for those of an "
                "evaluation and are not kept. Call model.train() before the loop if it should "
                "train with dropout. "
                f"{_PASS_PROBE} otherwise",
            )
            return
        self.warn(
            "no batch",
            f"the forward of {kind} was not called in the first {self.steps} steps, or past its "
            "hooks: no batch is "
            "kept. Watch the module that the loop calls, and call it as model(...), not "
            "model.forward(...)",
        )

    def look_at_gradients(
        self,
        names: Mapping[int, str],
        parameters: Callable[[], Iterable[Tensor]],
        watched: Callable[[], Iterable[Tensor]],
    ) -> None:
        """Look for gradients that no watched optimizer uses, once, before a step.

        Args:
            names: id of a parameter -> its name.
            parameters: returns those of the model.
            watched: returns those that the watched optimizers hold.
        """
        if self._looked_at_gradients or self.steps < FIRST_STEPS - 1:
            return
        self._looked_at_gradients = True

        # 1. The parameters with a gradient that no optimizer holds.
        held = {id(p) for p in watched()}
        others: list[Tensor] = []
        for parameter in parameters():
            is_held = id(parameter) in held
            if parameter.grad is not None and not is_held:
                others.append(parameter)
        if not others:
            return

        # 2. Name one of them.
        example = names.get(id(others[0]), "")
        count = "1 parameter has a gradient"
        if len(others) > 1:
            count = f"{len(others)} parameters have gradients"
        self.warn(
            "unheld",
            f"{count} and no optimizer that is watched holds them, such as '{example}': neither "
            "their gradients nor "
            "their updates are in the figures. Pass all optimizers: jacdiag.watch(model, [first, "
            "second])",
        )

    def look_at_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Look for gradient norms that stand at a ceiling, if the loop passed no norm.

        Args:
            rows: of the run log, type `step`.
        """
        for row in rows:
            # 1. If the loop passes the norm before clipping, a ceiling hides nothing.
            norm, loss = row["grad_norm_post"], row["loss"]
            is_norm_passed = row["grad_norm"] is not None
            if is_norm_passed or norm is None or loss is None:
                self._recent.clear()
                continue
            are_finite = math.isfinite(norm) and math.isfinite(loss)
            if not are_finite:
                continue

            # 2. Look at the last steps.
            self._recent.append((norm, loss))
            if len(self._recent) == _WINDOW:
                self._look_for_ceiling()

    def _look_for_ceiling(self) -> None:
        """Warn if many of the last gradient norms are equal to the largest, at other losses."""
        # 1. The steps at the ceiling.
        ceiling = max(norm for norm, _ in self._recent)
        least = ceiling * (1 - _SAME_NORM)
        losses = [loss for norm, loss in self._recent if norm > least]
        if ceiling <= 0 or len(losses) < _AT_CEILING:
            return

        # 2. Whether they are steps of different batches.
        spread = max(losses) - min(losses)
        if spread <= _OTHER_LOSS * max(map(abs, losses)):
            return  # the same batch with hardly changed weights has the same norm
        self.warn(
            "clip",
            f"the optimizer got gradients of norm {ceiling:.4g} in {len(losses)} of the last "
            f"{_WINDOW} steps, at "
            "different losses: they are clipped or rescaled before. A spike of the gradient "
            "cannot be seen. Pass the "
            "norm before clipping: w.step(loss, grad_norm=norm), with norm from clip_grad_norm_",
        )
