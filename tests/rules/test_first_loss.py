"""The loss before the first step is printed as it was measured, or without a number."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch.nn import functional as F

import jacdiag
from benchmarks.initbench.catalogue import tokens
from benchmarks.initbench.decoders import GPT
from benchmarks.initbench.draws import draw, normal, ones
from jacdiag.records import Report


def gpt(*, tied: bool) -> GPT:
    torch.manual_seed(0)
    model = GPT(layers=4, width=64, tied=tied, bias=False)
    large = normal(1.0)
    draw(model, ("ln_", ones), ("wte|head", large), ("weight", normal(0.02)))
    return model


def said(report: Report) -> str:
    [finding] = [f for f in report.findings if "logits of std" in f.what]
    return finding.what


@pytest.mark.parametrize(("tied", "code"), [(True, "JD206"), (False, "JD204")])
def test_the_loss_is_that_of_the_model(tied: bool, code: str) -> None:
    model = gpt(tied=tied)
    ids = tokens()
    ids = ids["input_ids"] if isinstance(ids, dict) else ids
    report = jacdiag.audit(model, ids, state="init", select=["JD2", "JD401"], remedies="none")
    assert code in {finding.code for finding in report.findings}

    # What any reader can compute.
    output = model(ids)
    logits = getattr(output, "logits", output).detach()
    vocabulary = logits.shape[-1]
    loss = F.cross_entropy(logits[:, :-1].reshape(-1, vocabulary), ids[:, 1:].reshape(-1))
    match = re.search(r"the loss at the probe is ([\d.]+), .*ln V = ([\d.]+)", said(report))
    assert match is not None
    assert float(match[1]) == pytest.approx(float(loss), rel=0.02)
    assert float(match[2]) == pytest.approx(math.log(vocabulary), abs=0.01)


def test_without_a_measured_loss_no_number_is_given() -> None:
    report = jacdiag.audit(gpt(tied=True), tokens(), state="init", products=False, remedies="none")
    words = said(report)
    assert words.endswith("the first loss is far above ln V, that of a uniform guess")
