"""The whole path on a real little model: what comes out, and what is said to input that cannot be
used.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from cli.rig import MODEL, ROOT, Done, files

from jacdiag.records import Report

Run = Callable[..., Done]
PROBE = ["--seq", "16", "--tol", "0.2"]
SHORT = [*PROBE, "--remedies", "none"]


def model(**how: Any) -> torch.nn.Module:
    namespace: dict[str, Any] = {}
    exec(MODEL, namespace)
    torch.manual_seed(0)
    built: torch.nn.Module = namespace["build"](**how)
    return built


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights.pt"
    torch.save(model().state_dict(), path)
    return path


@pytest.mark.check("pipeline", "jacdiag audit")
def test_audit_of_a_factory_writes_valid_json_and_a_plot(
    jd: Run, factory: str, tmp_path: Path
) -> None:
    done = jd("audit", f"{factory}build", *PROBE, "--format", "json", "--plot", "gain.png")
    assert done.code == 0, done.err
    schema = json.loads((ROOT / "jacdiag" / "records" / "report.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(json.loads(done.out))
    report = Report.from_json(done.out)
    assert [row.name for row in report.sublayers] == ["h.0.attn", "h.0.mlp", "h.1.attn", "h.1.mlp"]
    assert report.tier == "measured" and all(row.branch_norm for row in report.sublayers)
    assert report.model.uncovered == ["spare"]
    assert (tmp_path / "gain.png").read_bytes().startswith(b"\x89PNG")


def test_two_audits_of_a_factory_print_the_same_figures(jd: Run, factory: str) -> None:
    def figures() -> list[Any]:
        return json.loads(jd("audit", f"{factory}build", *SHORT, "--format", "json").out)[
            "sublayers"
        ]

    assert figures() == figures()


def test_user_thresholds_make_the_audit_fail(jd: Run, factory: str, tmp_path: Path) -> None:
    (tmp_path / "jacdiag.toml").write_text(
        "[thresholds.branch_norm]\ninfo = 0.01\nwarning = 0.02\nerror = 0.03\n"
    )
    done = jd("audit", f"{factory}build", *SHORT, "--select", "JD103")
    assert done.code == 1 and "FAIL" in done.out


def test_a_state_dict_with_its_model(jd: Run, factory: str, weights: Path) -> None:
    done = jd("audit", weights, "--model", f"{factory}build", *SHORT)
    assert done.code == 0 and "h.1.mlp" in done.out, done.err


def test_a_state_dict_alone_gives_the_weights_tier(jd: Run, weights: Path) -> None:
    done = jd("audit", weights, "--format", "json")
    assert done.code == 0, done.err
    report = Report.from_json(done.out)
    assert report.tier == "weights" and report.verdict != "pass"
    refused = jd("sites", weights)
    assert refused.code == 2 and "--model FACTORY" in refused.err


def test_weights_that_do_not_fit(jd: Run, factory: str, weights: Path, tmp_path: Path) -> None:
    done = jd(
        "audit",
        weights,
        "--model",
        f"{factory}build",
        "--model-args",
        '{"d": 8}',
        "--json",
        "r.json",
        *SHORT,
    )
    assert done.code == 2 and "wte.weight" in done.err and "shape" in done.err
    done = jd(
        "audit",
        weights,
        "--model",
        f"{factory}build",
        "--model-args",
        '{"layers": 3}',
        "--json",
        "r.json",
        *SHORT,
    )
    assert done.code == 2 and "h.2.attn" in done.err
    assert "r.json" not in files(tmp_path)


def test_non_finite_weights_are_an_error(jd: Run, factory: str, tmp_path: Path) -> None:
    state = model().state_dict()
    state["h.1.mlp.0.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    done = jd("audit", "nan.pt", "--model", f"{factory}build", *SHORT, "--json", "r.json")
    assert done.code == 1, done.err
    report = Report.from_json((tmp_path / "r.json").read_text())
    assert [f.code for f in report.findings if f.level == "error"] == ["JD906"]
    assert "h.1.mlp.0.weight" in done.out and "no norm" not in done.out
    assert report.conditions.small_sublayers == "unknown"
    assert "of 4 sub-layers" in next(
        line for line in done.out.splitlines() if "small sub-layers" in line
    )


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("touch was-run",)


def bad_files(folder: Path) -> None:
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("a story, not a checkpoint\n")
    (folder / "empty-folder").mkdir()
    torch.save(model().state_dict(), folder / "whole.pt")
    (folder / "truncated.pt").write_bytes((folder / "whole.pt").read_bytes()[:3000])
    (folder / "truncated.safetensors").write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{")
    with zipfile.ZipFile(folder / "evil.pt", "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps({"model": Payload()}, protocol=2))
        archive.writestr("evil/version", "3\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["missing.pt"], "missing.pt"),
        (["empty.pt"], "empty"),
        (["text.pt"], "text.pt"),
        (["empty-folder"], "empty-folder"),
        (["truncated.pt"], "truncated.pt"),
        (["truncated.safetensors"], "truncated.safetensors"),
        (["evil.pt"], "system"),
        (["build.py:nothing"], "nothing"),
        (["build.py:build", "--model-args", '{"colour": 1}'], "colour"),
        (["no_such_module_at_all:f"], "no_such_module_at_all"),
        (["hf:no-such-config.json"], "no-such-config.json"),
        (["build.py:no_residual", "--seq", "4"], "no residual sub-layer was found"),
        (["build.py:raises", "--seq", "4"], "the router lost its way"),
        (["build.py:leaves"], "sys.exit(0)"),
        (["build.py:returns_nothing"], "returned no nn.Module"),
        (["build.py:build", "--seq", "64"], "index out of range"),
        (["build.py:build", "--seq", "4", "--tokens", "missing.npy"], "missing.npy"),
        (["build.py:build", "--seq", "4", "--tokens", "high.pt"], "vocabulary"),
        (["build.py:build", "--model", "build.py:build"], "--model belongs to a checkpoint file"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else None,
)
def test_unusable_input_exits_2_and_writes_no_file(
    jd: Run, factory: str, tmp_path: Path, args: list[str], message: str
) -> None:
    bad_files(tmp_path)
    torch.save(torch.full((600,), 64), tmp_path / "high.pt")
    before = files(tmp_path)
    done = jd("audit", *args, "--json", "report.json", "--plot", "gain.png")
    assert (done.code, done.out) == (2, ""), done.err
    assert done.err.startswith("error: ") and message in done.err and "Traceback" not in done.err
    assert files(tmp_path) == before, "something was written, or run"


def test_cuda_that_is_not_there(jd: Run, factory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = jd("audit", f"{factory}build", "--device", "cuda:0", *SHORT)
    assert (
        done.code == 2
        and "CUDA was asked for and is not there" in done.err
        and "--device cpu" in done.err
    )
