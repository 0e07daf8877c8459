"""Ranks that share an audit, each on an accelerator of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from distributed.rig import as_ranks

import jacdiag
from accelerator.pretended import NAME
from accelerator.specimens import figures, ids, tiny

PROGRAM = f'''
import json, os, sys
import torch.distributed as dist
from accelerator.machine import machine
from accelerator.pretended import pretended_device
from accelerator.specimens import figures, ids, tiny
import jacdiag

rank = int(os.environ["RANK"])
with pretended_device(devices=2) as counts:
    device = f"{NAME}:{{rank}}"
    dist.init_process_group("gloo")
    report = jacdiag.audit(tiny().to(device), ids().to(device), ranks=True, tol=0.2)
    dist.destroy_process_group()
    own, other = machine().peak[rank], machine().peak[1 - rank]
    ranks = len(report.settings.pop("ranks"))
    facts = {{"mixed": counts.mixed, "ranks": ranks, "own": own, "other": other}}
    print(json.dumps({{"figures": figures(report), "facts": facts}}))
'''


@pytest.mark.long
def test_each_rank_measures_on_its_own_device(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(PROGRAM)
    ended = as_ranks(tmp_path, "own.py")
    assert [one.code for one in ended] == [0, 0], ended
    alone = json.loads(json.dumps(figures(jacdiag.audit(tiny(), ids(), tol=0.2))))
    for one in ended:
        result = json.loads(one.out)
        facts = result["facts"]
        assert facts["mixed"] == 0 and facts["ranks"] == 2
        assert facts["own"] > 0 == facts["other"]
        assert result["figures"]["sublayers"] == alone["sublayers"]
        assert result["figures"]["network"] == alone["network"]
        assert result["figures"]["findings"] == alone["findings"]
