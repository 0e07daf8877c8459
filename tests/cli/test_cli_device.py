"""`--device`: any accelerator that torch knows, and what is said of one that is not there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from accelerator.pretended import NAME, pretended_device
from cli.rig import Done

Run = Callable[..., Done]


@pytest.mark.parametrize("command", ["audit", "sites"])
def test_the_command_line_says_what_there_is_and_what_it_lacks(
    command: str, jd: Run, factory: str
) -> None:
    with pretended_device(devices=2, float64=False):
        for device, options, event, fact in [
            ("xpu", [], "XPU was asked for and is not there", f"cpu, {NAME}:0, {NAME}:1"),
            (f"{NAME}:2", [], f"there is no {NAME}:2", f"cpu, {NAME}:0, {NAME}:1"),
            ("tpu", [], "no such device", f"cpu, {NAME}:0, {NAME}:1"),
            (NAME, ["--dtype", "float64"], "PRETENDED has no float64", "--dtype float32"),
        ]:
            done = jd(command, f"{factory}build", "--device", device, *options)
            assert done.code == 2, device
            assert event in done.err and fact in " ".join(done.err.split()), done.err
