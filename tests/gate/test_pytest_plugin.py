"""`assert_stable_init`, the pytest plugin, the pre-commit hooks and the GitHub action, as far as
one machine shows.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from fork_server import fork_server
from gate import net
from jacdiag_cli.main import cli, main

from jacdiag.testing import assert_stable_init

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parents[2]
IDS = torch.randint(0, 256, (1, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.check("testing")
def test_a_sound_model_returns_its_report() -> None:
    report = assert_stable_init(net.model, IDS, seeds=1, products=False)
    assert report.contract is not None and report.settings["gate"]["exit_code"] == 0


@pytest.mark.check("testing")
def test_the_message_can_be_read() -> None:
    with pytest.raises(AssertionError) as failed:
        assert_stable_init(
            partial(net.model, broken=True), IDS, seeds=1, products=False, fail_on="warning"
        )
    text = str(failed.value)
    assert (
        "✗ JD203 depth-scaling" in text
        and "expects 0.02/sqrt(2*N) = 0.00707" in text
        and "net.py:" in text
    )
    assert "gate: FAIL" in text


def test_a_baseline_is_written_and_compared(tmp_path: Path) -> None:
    path, small = tmp_path / "init.json", partial(net.model, layers=2, d=32)
    assert_stable_init(small, IDS, seeds=2, baseline=path, write_baseline=True)
    assert_stable_init(small, IDS, seeds=1, seed=7, baseline=path)
    with pytest.raises(AssertionError, match="JD110"):
        assert_stable_init(partial(small, broken=True), IDS, seeds=1, baseline=path)


# -- the plugin ------------------------------------------------------------------------------------
SUITE = """
    import torch
    from functools import partial
    import net

    IDS, small = torch.randint(0, 256, (1, 8)), partial(net.model, layers=2, d=32)

    def test_sound(jacdiag_gate):
        jacdiag_gate(small, IDS, products=False)

    def test_broken(jacdiag_gate):
        jacdiag_gate(partial(small, broken=True), IDS, products=False, fail_on="warning")

    def test_recorded(jacdiag_gate):
        jacdiag_gate(small, IDS, baseline="init.json")
"""


def write_suite(folder: Path) -> None:
    shutil.copy(Path(net.__file__), folder / "net.py")
    (folder / "test_init.py").write_text(textwrap.dedent(SUITE), encoding="utf-8")


def pytest_run(folder: Path, *args: str) -> tuple[int, str]:
    write_suite(folder)
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-rs", *args]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    env["COLUMNS"] = "200"
    process = fork_server().start(["-m", "pytest", *options], folder, env)
    output, errors = process.communicate(timeout=300)
    return process.wait(0), output + errors


def test_without_the_option_they_are_skipped(tmp_path: Path) -> None:
    code, out = pytest_run(tmp_path)
    assert code == 0 and "3 skipped" in out and "needs --jacdiag" in out


def test_with_it_they_run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: torch is imported here already."""
    write_suite(pytester.path)
    monkeypatch.setenv("COLUMNS", "200")
    plain = ("-p", "no:cacheprovider", "-p", "no:xdist", "--jacdiag", "--jacdiag-seeds")
    done = pytester.runpytest_inprocess(*plain, "2", "--jacdiag-write-baselines")
    done.assert_outcomes(passed=2, failed=1)
    assert done.ret == 1 and (pytester.path / "init.json").is_file()
    # The traceback ends in the user's test, and the reason stands below it.
    out = done.stdout.str()
    assert "test_init.py:12: AssertionError" in out and "✗ JD203 depth-scaling" in out
    assert "jacdiag/testing" not in out.split("= FAILURES =")[1].split("= jacdiag gate =")[0]
    assert (
        "test_init.py::test_broken: failed in" in out
        and "test_init.py::test_sound: passed in" in out
    )
    assert pytester.runpytest_inprocess(*plain, "1", "-k", "recorded").ret == 0


def test_the_plugin_is_registered_and_light() -> None:
    from importlib.metadata import entry_points

    assert [e.value for e in entry_points(group="pytest11", name="jacdiag")] == [
        "jacdiag.testing.plugin"
    ]
    code = "import jacdiag.testing.plugin, jacdiag.testing, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# -- pre-commit and the action ---------------------------------------------------------------------
def hooks() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load(
        (ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8")
    )
    return found


def script(folder: Path, text: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    clean = {k: v for k, v in os.environ.items() if k not in ("CI",)}
    command = ["bash", "-eo", "pipefail", "-c", text]
    whole = {**clean, "PATH": path, **env}
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=300, env=whole
    )


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("hook", hooks(), ids=lambda h: str(h["id"]))
def test_hooks_do_what_pre_commit_would(
    hook: dict[str, Any],
    broken: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process: pre-commit runs the words of the entry, without a shell."""
    assert {"id", "name", "entry", "language"} <= set(hook) and hook["pass_filenames"] is False
    shutil.copy(Path(net.__file__), tmp_path / "net.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CI", raising=False)
    command, *words = shlex.split(hook["entry"])
    args = ["net.py:model", "--seq", "16", "--batch", "1", "--fail-on", "warning"]
    args += ["--select", "JD2"]
    args += ["--model-args", '{"broken": true}'] if broken else []
    assert command == "jacdiag"
    assert main([*words, *args]) == int(broken), capsys.readouterr()


def action() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    return found


def action_step(name: str) -> dict[str, Any]:
    """Return a step of the action that runs a script, by a word of the script."""
    [step] = [step for step in action()["runs"]["steps"] if name in step.get("run", "")]
    return step


def gate_step(
    folder: Path, args: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, str], str]:
    """Run the action's own script as a runner would, with its files in a folder."""
    shutil.copy(Path(net.__file__), folder / "net.py")
    files = {name: folder / name.lower() for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT")}
    done = script(
        folder,
        action_step("jacdiag gate")["run"],
        SOURCE="net.py:model",
        ARGS=args,
        RUNNER_TEMP=str(folder / "temp"),
        **{name: str(path) for name, path in files.items()},
    )
    outputs = dict(line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines())
    summary = files["GITHUB_STEP_SUMMARY"]
    return done, outputs, summary.read_text() if summary.exists() else ""


def installed_by_the_action(folder: Path, install: str) -> list[str]:
    """Return the arguments that pip gets from the action's install step."""
    pip = folder / "python"
    pip.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > arguments\n')
    pip.chmod(0o755)
    done = script(
        folder,
        f'PATH="$PWD:$PATH"\n{action_step("pip install")["run"]}',
        INSTALL=install,
        GITHUB_ACTION_PATH="/actions/owner/jacdiag/v0.2.0 beta",
    )
    assert done.returncode == 0, done.stderr
    return (folder / "arguments").read_text().splitlines()


PIP = ["-m", "pip", "install", "--quiet"]


def test_the_action_installs_its_own_version(tmp_path: Path) -> None:
    """Both `uses: ./` and `uses: OWNER/jacdiag@TAG` put the path of the action's files there."""
    default = action()["inputs"]["install"]["default"]
    assert installed_by_the_action(tmp_path, default) == [
        *PIP,
        "/actions/owner/jacdiag/v0.2.0 beta",
    ]
    assert (ROOT / "pyproject.toml").is_file()  # beside action.yml: that path can be installed


def test_the_action_installs_the_requirements_that_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "jacdiag[hf]").touch()  # what a shell could take for a pattern
    asked = installed_by_the_action(tmp_path, "torch==2.6.* jacdiag[hf]>=0.2")
    assert asked == [*PIP, "torch==2.6.*", "jacdiag[hf]>=0.2"]


def test_the_action_refuses_a_quote_without_its_partner(tmp_path: Path) -> None:
    done, outputs, _ = gate_step(tmp_path, "--select 'JD2")
    assert (done.returncode, outputs) == (2, {"exit-code": "2"})
    assert "::error::The input 'args' has a quote without its partner" in done.stdout


def test_the_action_judges_an_empty_list_of_arguments(tmp_path: Path) -> None:
    """No word is passed: an empty one would be a second SOURCE."""
    (tmp_path / "jacdiag").write_text('#!/bin/sh\nprintf "<%s>" "$@" > arguments\n')
    (tmp_path / "jacdiag").chmod(0o755)
    for args in ("", " \n ", "--select 'JD2 JD1' ''"):
        text = f'PATH="$PWD:$PATH"\n{action_step("jacdiag gate")["run"]}'
        outputs = str(tmp_path / "outputs")
        done = script(tmp_path, text, SOURCE="a b", ARGS=args, GITHUB_OUTPUT=outputs)
        assert done.returncode == 0, done.stderr
        words = (tmp_path / "arguments").read_text()
        between = "<--select><JD2 JD1><>" if args.strip() else ""
        assert words.startswith(f"<gate><a b>{between}<--format>")


def test_the_action_fails_with_annotations_summary_and_sarif(tmp_path: Path) -> None:
    args = """--model-args '{"broken": true}' --seq 16 --batch 1 --fail-on warning --select JD2"""
    done, outputs, summary = gate_step(tmp_path, args)
    assert done.returncode == 1 and outputs["exit-code"] == "1", done.stderr
    assert "::error file=net.py,line=" in done.stdout
    assert summary.startswith("### ✗ jacdiag gate: FAIL")
    assert '"ruleId": "JD203"' in (tmp_path / "temp/jacdiag/report.sarif").read_text()


def test_github_action_of_a_stable_model_exits_0_and_writes_its_outputs(tmp_path: Path) -> None:
    done, outputs, summary = gate_step(tmp_path, "--seq 16 --batch 1 --seeds 1 --select JD2")
    assert (done.returncode, outputs["exit-code"]) == (0, "0") and "PASS" in summary
    for name, output in action()["outputs"].items():
        assert output["value"] == f"${{{{ steps.gate.outputs.{name} }}}}"
        assert outputs[name]
    assert Path(outputs["report"]).is_file()
    assert Path(outputs["sarif"]).is_file()


def test_the_workflow_that_tries_the_action_uses_its_inputs_and_outputs() -> None:
    text = (ROOT / ".github/workflows/action.yml").read_text(encoding="utf-8")
    steps = yaml.safe_load(text)["jobs"]["gate"]["steps"]
    [use] = [step for step in steps if step.get("uses") == "./"]
    assert set(use["with"]) <= set(action()["inputs"])
    assert set(re.findall(r"steps\.gate\.outputs\.([\w-]+)", text)) <= set(action()["outputs"])
    command = [*use["with"]["args"].split(), use["with"]["source"]]
    cli.commands["gate"].make_context("gate", command, click.Context(cli, **cli.context_settings))
    assert (ROOT / use["with"]["source"].partition(":")[0]).is_file()


def test_the_action_says_that_it_cannot_run_and_runs_nothing_of_its_arguments(
    tmp_path: Path,
) -> None:
    done, outputs, summary = gate_step(
        tmp_path, "--nonsense '$(touch owned)' `touch owned`; touch owned"
    )
    assert (done.returncode, outputs["exit-code"], summary) == (2, "2", "")
    assert not (tmp_path / "owned").exists()


def test_the_action_uploads_only_when_asked() -> None:
    made = action()
    uploads = [s for s in made["runs"]["steps"] if "upload-sarif" in s.get("uses", "")]
    assert len(uploads) == 1 and "inputs.sarif == 'true'" in uploads[0]["if"]
    assert made["inputs"]["sarif"]["default"] == "false" and made["runs"]["using"] == "composite"
    # Inputs reach scripts through the environment alone: nothing of them is pasted into a shell.
    assert not any("${{ inputs" in s.get("run", "") for s in made["runs"]["steps"])
