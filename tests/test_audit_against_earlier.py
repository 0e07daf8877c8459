"""`jacdiag audit NOW --against EARLIER`: a run that was wrecked fails, the same run unharmed
passes.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jacdiag_cli.main import main

import jacdiag
from jacdiag.comparison import compare
from jacdiag.errors import SourceError, UsageError
from jacdiag.records import Report
from jacdiag.sources.gpt import GPT, build

SIZES: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "vocab_size": 64,
    "block_size": 16,
}
RATE, STEPS, WRECK = 3e-3, 60, 100.0


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences that can be learned: each token is the one before plus a step that the sequence
    keeps.
    """
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(64, (8, 1), generator=generator)
    strides = torch.randint(1, 4, (8, 1), generator=generator)
    ids = (starts + strides * torch.arange(17)) % 64
    return ids[:, :-1], ids[:, 1:]


def train(model: GPT, first: int, last: int, rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95))
    for step in range(first, last):
        loss = model(*batch(step))[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def save(model: GPT, step: int, path: Path) -> None:
    config = dataclasses.asdict(model.config)
    torch.save({"model": model.state_dict(), "model_args": config, "iter_num": step}, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """step0.pt, early.pt, and after it later.pt of the same run, and wrecked.pt at 100 times the
    learning rate.
    """
    home = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    model = build("vanilla", **SIZES)
    save(model, 0, home / "step0.pt")
    train(model, 0, STEPS, RATE)
    save(model, STEPS, home / "early.pt")
    for name, rate in (("later", RATE), ("wrecked", WRECK * RATE)):
        again = build("vanilla", **SIZES)
        again.load_state_dict(model.state_dict())
        train(again, STEPS, 2 * STEPS, rate)
        save(again, 2 * STEPS, home / f"{name}.pt")
    torch.save(batch(10_000)[0], home / "tokens.pt")
    return home


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.chdir(folder)

    def call(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([*args, "--tokens", "tokens.pt"] if "--tokens" not in args else [*args])
        left = capsys.readouterr()
        return code, left.out, left.err

    return call


def test_a_wrecked_run_alone_is_observed(run: Any) -> None:
    code, out, _ = run("audit", "wrecked.pt", "--state", "trained")
    assert (
        code == 0
        and "  OBSERVED  Trained model" in out
        and "PASS" not in out
        and "nothing to do" not in out
    )
    assert "jacdiag audit wrecked.pt --state trained --tokens tokens.pt --against EARLIER" in out


def test_compared_with_an_earlier_step_it_fails(run: Any, folder: Path) -> None:
    code, out, _ = run(
        "audit",
        "wrecked.pt",
        "--against",
        "early.pt",
        "--state",
        "trained",
        "--json",
        "wrecked.json",
    )
    assert code == 1 and "  FAIL  JD110: " in out and "times that of early.pt (error above" in out
    assert "earlier norm" in out and "go back to the earlier checkpoint" in out
    report = Report.from_json((folder / "wrecked.json").read_text())
    assert report.verdict == "fail" and report.against is not None and report.against.compared == 4
    assert report.conditions.small_sublayers in ("met", "partly", "not met")
    code, out, _ = run(
        "audit", "wrecked.pt", "--against", "early.pt", "--state", "trained", "--format", "markdown"
    )
    assert code == 1 and out.startswith("### ● FAIL: JD110") and "| **against** |" in out
    code, out, _ = run(
        "audit", "wrecked.pt", "--against", "early.pt", "--state", "trained", "--fail-on", "never"
    )
    assert code == 0


def test_the_same_run_unharmed_passes(run: Any) -> None:
    for now, earlier in (
        ("later.pt", "early.pt"),
        ("early.pt", "early.pt"),
        ("early.pt", "step0.pt"),
    ):
        code, out, _ = run("audit", now, "--against", earlier, "--state", "trained")
        assert code == 0 and "  PASS  Trained model" in out and f"compared with {earlier}" in out, (
            now,
            earlier,
        )


def test_it_agrees_with_diff(folder: Path) -> None:
    tokens = torch.load(folder / "tokens.pt")
    reports = {
        name: jacdiag.audit(folder / f"{name}.pt", tokens, state="trained")
        for name in ("early", "later", "wrecked")
    }
    for now in ("early", "later", "wrecked"):
        made = jacdiag.audit(
            folder / f"{now}.pt", tokens, state="trained", against=reports["early"]
        )
        assert made.against is not None
        listed = [
            (p.b, p.figure)
            for p in compare(reports["early"], reports[now]).parted
            if p.part != p.figure
        ]
        norms = [
            (name, figure)
            for name, figure in listed
            if figure in ("branch_norm", "core_norm", "norm_gain")
        ]
        kept = [(c.where, c.figure) for c in made.against.changes]
        assert [pair for pair in norms if pair not in kept] == []
        worse = [f for f in made.findings if f.code == "JD110" and f.level == "error"]
        assert bool(worse) == (now == "wrecked")
        assert all((name, "branch_norm") in listed for f in worse for name in f.where)


def test_earlier_json_report_and_earlier_checkpoint_give_the_same_result(
    run: Any, folder: Path
) -> None:
    assert run("audit", "early.pt", "--state", "trained", "--json", "early.json")[0] == 0
    found = []
    for earlier in ("early.json", "early.pt"):
        code, out, _ = run(
            "audit", "wrecked.pt", "--against", earlier, "--state", "trained", "--format", "json"
        )
        report = json.loads(out)
        found.append((code, report["against"]["branch_norms"], report["verdict"]))
    assert found[0] == found[1] and found[0][2] == "fail"


# -- what cannot be compared -----------------------------------------------------------------------
def test_another_architecture_is_refused(run: Any, folder: Path) -> None:
    sizes = {**SIZES, "n_layer": 3}
    save(build("vanilla", **sizes), 0, folder / "deeper.pt")
    save(build("vanilla", **{**SIZES, "n_embd": 48}), 0, folder / "wider.pt")
    assert run("audit", "deeper.pt", "--json", "deeper.json")[0] == 0
    for earlier in ("deeper.pt", "wider.pt", "deeper.json"):
        code, out, err = run("audit", "later.pt", "--against", earlier)
        assert code == 2 and f"'{earlier}' is of another architecture" in err and not out, err
        assert "jacdiag diff" in err
    assert "6 sub-layers (3 attention, 3 mlp) with pre-norm, width 32; now 4 sub-layers" in err


def test_a_report_of_another_probe_is_refused(run: Any, folder: Path) -> None:
    torch.save(batch(10_001)[0], folder / "others.pt")
    assert run("audit", "early.pt", "--batch", "1", "--json", "small.json")[0] == 0
    code, _, err = run("audit", "later.pt", "--against", "small.json")
    assert code == 2 and "'small.json' was measured with another probe" in err
    assert "--batch 1, as in 'small.json'" in err
    # A file of the same name and size with other tokens: only the digest can tell.
    assert run("audit", "early.pt", "--json", "kept.json")[0] == 0
    kept = (folder / "tokens.pt").read_bytes()
    (folder / "tokens.pt").write_bytes((folder / "others.pt").read_bytes())
    code, _, err = run("audit", "later.pt", "--against", "kept.json")
    (folder / "tokens.pt").write_bytes(kept)
    assert code == 2 and "another input of the same size, from tokens.pt" in err
    assert run("audit", "early.pt", "--json", "old.json")[0] == 0
    old = json.loads((folder / "old.json").read_text())
    del old["probe"]["digest"], old["against"]  # as written before either was kept
    (folder / "old.json").write_text(json.dumps(old))
    assert run("audit", "early.pt", "--against", "old.json", "--state", "trained")[0] == 0


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"schema_version": 1}', '{"schema_version": null}', "\x00"]
)
def test_a_file_that_is_no_report_is_refused(run: Any, folder: Path, text: str) -> None:
    (folder / "bad.json").write_text(text)
    code, _, err = run("audit", "later.pt", "--against", "bad.json")
    assert code == 2 and "'bad.json' is no report" in err and "Traceback" not in err


@pytest.mark.parametrize("name", ["nowhere.json", "nowhere.pt"])
def test_a_file_that_is_missing_is_named_with_the_option(run: Any, name: str) -> None:
    code, _, err = run("audit", "later.pt", "--against", name)
    assert code == 2
    assert f"error: --against: no such file or folder: '{name}'" in err
    assert "EARLIER is an earlier checkpoint" in err and "SOURCE" not in err


def test_a_report_of_a_newer_version_is_refused(run: Any, folder: Path) -> None:
    (folder / "newer.json").write_text('{"schema_version": 99}')
    code, _, err = run("audit", "later.pt", "--against", "newer.json")
    assert code == 2 and "'newer.json': the report was written by a newer jacdiag" in err
    assert "schema_version 99" in err and "update it" in err and "Traceback" not in err


def test_what_holds_no_norm_is_refused(run: Any, folder: Path) -> None:
    torch.save({"a.weight": torch.randn(8, 8), "b.weight": torch.randn(8, 8)}, folder / "bare.pt")
    code, _, err = run("audit", "later.pt", "--against", "bare.pt")
    assert (
        code == 2
        and "there is nothing to compare with in 'bare.pt'" in err
        and "--model FACTORY" in err
    )
    code, _, err = run("audit", "bare.pt", "--against", "later.pt", "--tokens", "tokens.pt")
    assert code == 2 and "weights alone cannot be compared" in err
    code, _, err = run("audit", "later.pt", "--against", "missing.pt")
    assert code == 2 and "missing.pt" in err
    code, _, err = run("audit", "later.pt", "--against", "later.json", "--json", "later.json")
    assert code == 2


def test_in_python_one_comparison_at_a_time(folder: Path) -> None:
    tokens = torch.load(folder / "tokens.pt")
    with pytest.raises(UsageError, match="against compares norms"):
        jacdiag.audit(folder / "later.pt", tokens, against=folder / "early.pt", products=False)
    with pytest.raises(SourceError):
        jacdiag.audit(folder / "later.pt", tokens, against=3)  # type: ignore[arg-type]
    model = build("vanilla", **SIZES)
    report = jacdiag.audit(model, tokens, state="init", against=model)
    assert (
        report.verdict in ("pass", "warn")
        and report.against is not None
        and report.against.changes == []
    )


def test_an_earlier_model_with_other_names_is_matched_by_role_and_depth(folder: Path) -> None:
    class Renamed(torch.nn.Module):
        def __init__(self, inner: GPT) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, ids: torch.Tensor) -> Any:
            return self.inner(ids)[0]

    model = jacdiag.sources.load(str(folder / "early.pt")).model
    tokens = torch.load(folder / "tokens.pt")
    report = jacdiag.audit(folder / "wrecked.pt", tokens, state="trained", against=Renamed(model))
    assert report.verdict == "fail" and report.against is not None
    assert set(report.against.branch_norms) == {row.name for row in report.sublayers}


def test_a_dead_row_does_not_change_the_random_probe_of_both(folder: Path) -> None:
    """Random tokens leave out rows of the embedding that were never trained; both models see the
    tokens of now.
    """
    state = torch.load(folder / "early.pt")
    state["model"]["transformer.wte.weight"][5:20] = 0
    torch.save(state, folder / "dead.pt")
    report = jacdiag.audit(
        folder / "early.pt", state="trained", batch=1, seq=8, against=folder / "dead.pt"
    )
    alone = jacdiag.audit(folder / "early.pt", state="trained", batch=1, seq=8)
    assert (
        report.probe is not None
        and alone.probe is not None
        and report.probe.digest == alone.probe.digest
    )
    dead = jacdiag.audit(folder / "dead.pt", state="trained", batch=1, seq=8)
    assert dead.probe is not None and dead.probe.digest != alone.probe.digest
    with pytest.raises(UsageError, match="measured with another probe"):
        jacdiag.audit(folder / "early.pt", state="trained", batch=1, seq=8, against=dead)
