"""Ranks as real processes: one report equal to the plain one, and an end with a name for every way
of ending.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.rig import ROOT, Ended, as_ranks, by_torchrun, environment, until_measuring
from fork_server import ForkedProcess, fork_server

import jacdiag

CLI = ("-m", "jacdiag_cli", "audit")


def plain(folder: Path, *args: str) -> dict[str, Any]:
    """Return the report of one process."""
    arguments = [*CLI, *args, "--format", "json"]
    process = fork_server().start(arguments, folder, environment(folder))
    output, errors = process.communicate(timeout=90)
    assert process.returncode == 0, errors
    return json.loads(output)


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """All but what a clock and the command line wrote."""
    cost, settings = report["cost"], report["settings"]
    kept = {k: v for k, v in report.items() if k not in ("created", "cost", "settings")}
    settings = {k: v for k, v in settings.items() if k not in ("ranks", "command")}
    return kept | {"settings": settings, "spent": (cost["forward_equivalents"], cost["products"])}


def silent(*others: Ended) -> None:
    assert [(one.out, one.err) for one in others] == [("", "")] * len(others)


def test_torchrun_gives_the_report_of_one_process(tmp_path: Path) -> None:
    done = by_torchrun(
        tmp_path, "audit", "build.py:talks", "--json", "two.json", "--plot", "two.png"
    )
    assert done.code == 0, done.err
    two, one = json.loads((tmp_path / "two.json").read_text()), plain(tmp_path, "build.py:talks")
    assert figures(two) == figures(one)
    assert (
        done.out.count(f"jacdiag {jacdiag.__version__}  ·  build.py:talks") == 1
        and (tmp_path / "two.png").stat().st_size
    )
    assert "out of 0" in done.err and "err of 0" in done.err and "of 1" not in done.err
    uses = two["settings"]["ranks"]
    assert [use["rank"] for use in uses] == [0, 1] and sum(use["jobs"] for use in uses) == 4 + 1
    assert "ranks" not in one["settings"]


@pytest.mark.long
def test_remedies_are_tried_by_all_ranks_together(tmp_path: Path) -> None:
    done = by_torchrun(
        tmp_path, "audit", "build.py:fine", "--remedies", "first", "--json", "two.json"
    )
    assert done.code == 0, done.err
    two, one = (
        json.loads((tmp_path / "two.json").read_text()),
        plain(tmp_path, "build.py:fine", "--remedies", "first"),
    )
    assert figures(two) == figures(one) and any(r["recommended"] for r in two["remedies"])


@pytest.mark.long
def test_a_remedy_that_fails_on_one_rank_is_a_note(tmp_path: Path) -> None:
    done = by_torchrun(
        tmp_path, "audit", "build.py:no_copy", "--remedies", "first", "--json", "two.json", bad=1
    )
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "two.json").read_text())
    assert not report["remedies"] and report["verdict"] == "warn"
    assert any(
        "could not be tried: MeasureError: rank 1 of 2 (" in n and "MemoryError" in n
        for n in report["notes"]
    )


@pytest.mark.long
def test_the_example_runs_as_it_stands(tmp_path: Path) -> None:
    env = environment(
        tmp_path, PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    script = ["bash", ROOT / "examples" / "torchrun.sh", "build.py:fine", "--format", "json"]
    done = subprocess.run(
        script, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["settings"]["ranks"]) == 2 or torch.cuda.is_available()


@pytest.mark.long
def test_three_ranks_with_decide_and_fewer_jobs_than_could_be(tmp_path: Path) -> None:
    """Some ranks may find nothing left to do: 2 jobs for 3."""
    sizes = ("build.py:fine", "--decide", "--model-args", '{"n_layer": 1}')
    ended = as_ranks(tmp_path, *CLI, *sizes, "--format", "json", size=3)
    assert [one.code for one in ended] == [0, 0, 0], ended[0].err
    silent(*ended[1:])
    assert figures(json.loads(ended[0].out)) == figures(plain(tmp_path, *sizes))


@pytest.mark.long
def test_findings_are_one_exit_code_for_all(tmp_path: Path) -> None:
    ended = as_ranks(tmp_path, *CLI, "build.py:fine", "--fail-on", "warning", "--json", "r.json")
    assert [one.code for one in ended] == [1, 1]
    silent(ended[1])
    assert json.loads((tmp_path / "r.json").read_text())["verdict"] == "warn"


@pytest.mark.parametrize(
    "command", [("rules",), pytest.param(("sites", "build.py:fine"), marks=pytest.mark.long)]
)
def test_commands_without_sharing_print_on_one_rank_only(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    ended = as_ranks(tmp_path, "-m", "jacdiag_cli", *command)
    assert [one.code for one in ended] == [0, 0] and ended[0].out
    silent(ended[1])


def test_one_rank_is_plain(tmp_path: Path) -> None:
    [done] = as_ranks(tmp_path, *CLI, "build.py:fine", "--format", "json", size=1)
    assert done.code == 0 and "ranks" not in json.loads(done.out)["settings"]


# -- a rank that ends ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("what", "bad", "told"),
    [
        pytest.param("has_no_file", 1, "FileNotFoundError", marks=pytest.mark.long),
        pytest.param("raises", 1, "LookupError: the router lost its way", marks=pytest.mark.long),
        pytest.param("out_of_memory", 0, "out of memory", marks=pytest.mark.long),
        pytest.param("killed", 0, "died", marks=pytest.mark.long),
        ("killed", 1, "died"),
    ],
)
def test_the_end_of_one_is_the_end_of_all_with_its_name(
    tmp_path: Path, what: str, bad: int, told: str
) -> None:
    """With rank 0 the store dies too."""
    ended = as_ranks(tmp_path, *CLI, f"build.py:{what}", "--json", "r.json", bad=bad)
    codes = [one.code for one in ended]
    assert codes == [-signal.SIGKILL if what == "killed" and rank == bad else 2 for rank in (0, 1)]
    speaker = 1 if what == "killed" and bad == 0 else 0
    assert f"error: rank {bad} of 2 (" in ended[speaker].err and told in ended[speaker].err
    silent(ended[1 - speaker])
    assert not (tmp_path / "r.json").exists() and not list(tmp_path.glob("*.tmp*"))


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("other_weight", "has other weights than rank 0 of 2"),
        pytest.param("other_heads", "has another model than rank 0 of 2", marks=pytest.mark.long),
    ],
)
def test_different_files_are_named_before_any_product(tmp_path: Path, what: str, told: str) -> None:
    ended = as_ranks(tmp_path, *CLI, f"build.py:{what}", bad=1)
    assert [one.code for one in ended] == [2, 2]
    assert "error: rank 1 of 2 (" in ended[0].err and told in ended[0].err
    assert {"other_weight": "'transformer.h.1.mlp.c_fc.weight'", "other_heads": "n_head"}.get(
        what, ""
    ) in ended[0].err


@pytest.mark.long
def test_different_weights_without_a_model(tmp_path: Path) -> None:
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        torch.save(
            {"h.0.mlp.w1.weight": torch.full((8, 8), 1.0 + rank)}, tmp_path / str(rank) / "w.pt"
        )
    code = (
        "import os, sys; os.chdir(os.environ['RANK']); from jacdiag_cli.main import main; "
        "sys.exit(main())"
    )
    ended = as_ranks(tmp_path, "-c", code, "audit", "w.pt")
    assert [one.code for one in ended] == [2, 2] and "other weights" in ended[0].err


@pytest.mark.long
def test_weights_that_stay_in_their_file(tmp_path: Path) -> None:
    """Each rank reads a file of its own: the report of one process, and a refusal where one bit
    differs.
    """
    from safetensors.torch import save_file

    from jacdiag.sources import gpt

    torch.manual_seed(0)
    state = gpt.build(
        "vanilla", n_layer=2, n_embd=16, n_head=2, vocab_size=64, block_size=8
    ).state_dict()
    state = {name: t.clone() for name, t in state.items() if name != "lm_head.weight"}
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        save_file(state, tmp_path / str(rank) / "w.safetensors")
    enter = (
        "import os, sys; os.chdir(os.environ.get('RANK', '0')); from jacdiag_cli.main import "
        "main; sys.exit(main())"
    )
    args = (
        "audit",
        "w.safetensors",
        "--model",
        "../build.py:fine",
        "--state",
        "init",
        "--format",
        "json",
    )
    ended = as_ranks(tmp_path, "-c", enter, *args)
    assert [one.code for one in ended] == [0, 0], ended[0].err
    alone = as_ranks(tmp_path, "-c", enter, *args, size=1)
    assert figures(json.loads(ended[0].out)) == figures(json.loads(alone[0].out))
    state["transformer.h.1.ln_1.weight"][3] += 1e-6
    save_file(state, tmp_path / "1" / "w.safetensors")
    ended = as_ranks(tmp_path, "-c", enter, *args)
    assert [one.code for one in ended] == [2, 2]
    assert "has other weights" in ended[0].err and "'transformer.h.1.ln_1.weight'" in ended[0].err


@pytest.mark.long
def test_torchrun_and_a_killed_rank(tmp_path: Path) -> None:
    """torchrun stops the others at once; the name of the dead is said all the same."""
    done = by_torchrun(tmp_path, "audit", "build.py:killed", bad=1)
    assert done.code == 1 and done.err.count("error: rank 1 of 2 (") == 1, done.err


@pytest.mark.long
def test_one_operation_that_does_not_end(tmp_path: Path) -> None:
    """Rank 0 hangs in C while rank 1 is killed: no signal gets it out, and it leaves with the name
    all the same.
    """

    def kill(processes: list[ForkedProcess]) -> None:
        until_measuring(tmp_path, 0, 1)
        processes[1].kill()

    ended = as_ranks(tmp_path, *CLI, "build.py:stuck_in_c", bad=0, then=kill)
    assert ended[0].code == 2 and "error: rank 1 of 2 (" in ended[0].err


# -- signals ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "hit", [(0, 1), *(pytest.param((k,), marks=pytest.mark.long) for k in (0, 1))]
)
def test_ctrl_c_ends_every_rank_with_130(tmp_path: Path, hit: tuple[int, ...]) -> None:
    """On all, as in a terminal, or on one only: 130 on every rank, one line, no file."""

    def interrupt(processes: list[ForkedProcess]) -> None:
        until_measuring(tmp_path, 0, 1)
        for rank in hit:
            processes[rank].send_signal(signal.SIGINT)

    ended = as_ranks(tmp_path, *CLI, "build.py:slow", "--json", "r.json", bad=1, then=interrupt)
    assert [one.code for one in ended] == [130, 130]
    assert ended[0].err.count("interrupted") == 1 and "Traceback" not in ended[0].err
    silent(ended[1])
    assert not (tmp_path / "r.json").exists()


@pytest.mark.long
def test_ctrl_c_on_torchrun(tmp_path: Path) -> None:
    done = by_torchrun(
        tmp_path, "audit", "build.py:slow", "--json", "r.json", bad=1, interrupt=True
    )
    assert done.code != 0 and done.err.count("interrupted; no file was written") == 1
    assert not (tmp_path / "r.json").exists()


@pytest.mark.long
def test_sigterm_on_one_rank_ends_every_rank(tmp_path: Path) -> None:
    def stop(processes: list[ForkedProcess]) -> None:
        until_measuring(tmp_path, 0, 1)
        processes[1].terminate()

    ended = as_ranks(tmp_path, *CLI, "build.py:slow", bad=1, then=stop)
    assert [one.code for one in ended] == [2, 2]
    assert "rank 1 of 2 (" in ended[0].err and "SIGTERM" in ended[0].err


# -- from Python -----------------------------------------------------------------------------------
@pytest.mark.long
def test_python_shares_only_when_asked(tmp_path: Path) -> None:
    """Rank 0 audits alone first, as a training loop may; then both together, twice."""
    (tmp_path / "own.py").write_text(
        "import os, jacdiag\n"
        "from build import fine\n"
        "import torch; torch.manual_seed(0); model = fine()\n"
        "alone = jacdiag.audit(model) if os.environ['RANK'] == '0' else None\n"
        "for _ in range(2):\n"
        "    report = jacdiag.audit(model, ranks=True)\n"
        "    assert len(report.sublayers) == 4 and len(report.settings['ranks']) == 2\n"
        "if alone is not None:\n"
        "    assert 'ranks' not in alone.settings and alone.sublayers == report.sublayers\n"
        "    assert alone.network == report.network and alone.verdict == report.verdict\n"
        "print(report.verdict)\n"
    )
    ended = as_ranks(tmp_path, "own.py")
    assert [one.code for one in ended] == [0, 0], ended
    assert ended[0].out == ended[1].out == "warn\n"


@pytest.mark.long
def test_python_inside_a_process_group_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import jacdiag, torch.distributed as dist\n"
        "from build import fine\n"
        "dist.init_process_group('gloo')\n"
        "import torch; torch.manual_seed(0); report = jacdiag.audit(fine(), ranks=True)\n"
        "dist.barrier(); dist.destroy_process_group()\n"
        "print(len(report.settings['ranks']))\n"
    )
    ended = as_ranks(tmp_path, "own.py")
    assert [(one.code, one.out) for one in ended] == [(0, "2\n")] * 2, ended


@pytest.mark.long
def test_python_error_names_the_rank_that_raised(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import os, jacdiag\n"
        "from build import fine\n"
        "try:\n"
        "    jacdiag.audit('no.pt' if os.environ['RANK'] == '1' else fine(), ranks=True)\n"
        "except jacdiag.JacdiagError as error:\n"
        "    print(error.what)\n"
    )
    ended = as_ranks(tmp_path, "own.py")
    assert [one.code for one in ended] == [0, 0]
    assert all(one.out.startswith("rank 1 of 2 (") and "no.pt" in one.out for one in ended)
