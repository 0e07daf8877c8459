"""How often the host waits for an accelerator: the limits, and the file of the counts."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from accelerator.pretended import pretended_device
from benchmarks import host_waits


@cache
def audit(**options: Any) -> dict[str, Any]:
    with pretended_device() as counts:
        return host_waits.count_audit(counts, **options)


@cache
def watch(name: str) -> dict[str, Any]:
    with pretended_device() as counts:
        return host_waits.count_watch(counts, **host_waits.OPTIMIZERS[name])


SHORT = ("adamw", "accumulation")
NAMES = [
    name if name in SHORT else pytest.param(name, marks=pytest.mark.long)
    for name in host_waits.OPTIMIZERS
]


@pytest.mark.parametrize("decide", [False, True])
def test_an_audit_waits_once_a_product_and_thirty_times_a_sub_layer(decide: bool) -> None:
    counted = audit(decide=decide)
    assert counted["waits"] <= counted["waits_allowed"]
    assert counted["waits_per_sublayer_beyond"] <= host_waits.WAITS_PER_SUBLAYER


def test_an_audit_to_full_width_waits_once_a_product() -> None:
    assert audit(decide=False)["waits_per_product"] <= host_waits.WAITS_PER_PRODUCT


@pytest.mark.parametrize("name", NAMES)
def test_the_watch_does_not_wait_between_logs(name: str) -> None:
    assert watch(name)["waits_between_logs"] == 0
    assert watch(name)["uploads_from_pageable_memory_between_logs"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_watch_launches_few_operations_a_step(name: str) -> None:
    assert watch(name)["operations_per_step"] <= watch(name)["operations_allowed"]


def test_nothing_mixes_devices() -> None:
    assert audit(decide=False)["mixed_operations"] == watch("adamw")["mixed_operations"] == 0


def test_a_wait_in_a_step_would_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prove that the tests above can fail."""
    from jacdiag.monitor.training_watch import Watch

    step = Watch.step

    def waiting_step(self: Any, loss: Any, **options: Any) -> None:
        float(loss.detach())
        step(self, loss, **options)

    monkeypatch.setattr(Watch, "step", waiting_step)
    with pretended_device() as counts:
        row = host_waits.count_watch(counts)
    assert row["waits_between_logs"] == host_waits.STEPS - host_waits.FIRST_STEPS


def test_the_file_has_every_count_within_its_limits() -> None:
    recorded = json.loads(host_waits.RESULTS.read_text(encoding="utf-8"))
    assert recorded["watch"].keys() == host_waits.OPTIMIZERS.keys()
    assert recorded["audit"].keys() == {"default", "decide"}
    for row in (*recorded["audit"].values(), *recorded["watch"].values()):
        assert row["mixed_operations"] == 0
    for row in recorded["audit"].values():
        assert row["waits"] <= row["waits_allowed"]
    for row in recorded["watch"].values():
        assert row["waits_between_logs"] == 0
