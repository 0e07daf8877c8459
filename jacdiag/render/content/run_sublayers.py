"""The sub-layers that the probes of a run look at, measured or not."""

from __future__ import annotations

from jacdiag.records.run_log import RunLog


def sublayer_depths(run: RunLog) -> dict[str, int]:
    """Return the depth of each sub-layer, as the report of the first probe has it.

    The first sub-layer comes first. A log may hold no report.

    Args:
        run: as far as it has come.
    """
    # 1. A later process may have written no report.
    if not run.probes:
        return {}
    first = run.probes[0]
    report = first.get("report") or {}

    # 2. Its sub-layers.
    depths: dict[str, int] = {}
    for row in report.get("sublayers", []):
        name = str(row.get("name"))
        depths[name] = int(row.get("depth", 0))

    return depths
