"""What is packaged and what it needs: the wheel, its requirements, and its types for a client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import jacdiag

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_has_two_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = f"jacdiag-{jacdiag.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"jacdiag", "jacdiag_cli", info}
    assert f"{info}/licenses/LICENSE" in names
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pt", ".png"))]


def files_under(folder: Path) -> set[str]:
    """Return the files of a package, as paths in a wheel."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder.parent).as_posix()
        for path in paths
        if "__pycache__" not in path.parts
    }


def test_wheel_has_every_module_and_data_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert files_under(ROOT / "jacdiag") <= names
    assert files_under(ROOT / "cli" / "jacdiag_cli") <= names


def test_no_requirement_has_an_upper_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # What builds the site is never installed next to a run.
    extras = project["optional-dependencies"]
    groups = [project["dependencies"], *(extras[name] for name in extras if name != "docs")]
    capped = [
        line
        for group in groups
        for line in group
        if any(sign in line for sign in ("<", "==", "~=", "!="))
    ]
    assert not capped
    assert any(line.startswith("torch>=") for line in project["dependencies"])


def fake_torch(folder: Path, version: str) -> None:
    """Write a wheel that calls itself a newer torch."""
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
        )
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{info}/RECORD", "")


def pip_plan(wheel: Path, folder: Path, *more: str) -> dict[str, str]:
    """Return what pip would install, as {name: version}, without a network."""
    report = folder / "plan.json"
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--dry-run",
        "--no-index",
    ]
    command += ["--find-links", str(folder), "--report", str(report), "--quiet", *more, str(wheel)]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**clean, "PIP_CONFIG_FILE": os.devnull},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    plan = json.loads(report.read_text(encoding="utf-8"))
    return {item["metadata"]["name"]: item["metadata"]["version"] for item in plan["install"]}


def test_installing_does_not_replace_an_installed_torch(wheel: Path, tmp_path: Path) -> None:
    fake_torch(tmp_path, "99.0")
    plan = pip_plan(wheel, tmp_path)
    assert "torch" not in plan, f"would replace torch by {plan['torch']}"
    assert plan.keys() <= {"jacdiag"}, f"would install {plan}"


def test_fake_torch_is_taken_if_an_upgrade_is_asked_for(wheel: Path, tmp_path: Path) -> None:
    """Show that the test above can fail: pip does take the newer wheel."""
    fake_torch(tmp_path, "99.0")
    eager = pip_plan(wheel, tmp_path, "--upgrade", "--upgrade-strategy", "eager")
    assert eager.get("torch") == "99.0"


# -- types -----------------------------------------------------------------------------------------
CLIENT = """
from pathlib import Path

import torch
from torch import nn

import jacdiag
from jacdiag.gate import gate
from jacdiag.testing import assert_stable_init


def use(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> float:
    report = jacdiag.audit(model, x)
    norm = report.sublayers[0].branch_norm
    total: float = norm.upper if norm is not None else 0.0
    code: str = report.findings[0].code
    sites = jacdiag.sites(model, x)
    name: str = sites[0].name
    shortcut: torch.Tensor = sites[0].shortcut
    largest: torch.Tensor = jacdiag.spectral_norm(torch.tanh, x).upper
    with jacdiag.watch(model, optimizer, log_dir=Path("runs")) as watch:
        watch.step(largest.sum() + shortcut.sum(), lr=0.1)
    assert_stable_init(model, x)
    exit_code: int = gate(model, x).exit_code
    report.table()
    print(report, code, name)
    return total + exit_code
"""
MISUSE = """
import jacdiag

count: int = jacdiag.audit("model.pt").verdict
jacdiag.audit("model.pt", no_such_option=1)
jacdiag.audit("model.pt").no_such_attribute
jacdiag.spectral_norm("not a function", 3)
"""


def strictly_typed(program: str, wheel: Path, folder: Path) -> list[str]:
    """Check a program with mypy --strict against an installed wheel; return the lines that complain
    about it.
    """
    installed = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    client = folder / "client.py"
    client.write_text(program, encoding="utf-8")
    (folder / "mypy.ini").write_text("[mypy]\n", encoding="utf-8")

    # mypy reads a package on MYPYPATH whatever it ships; one in site-packages is typed only if it
    # ships py.typed.
    assert (installed / "jacdiag" / "py.typed").is_file()
    assert (installed / "jacdiag_cli" / "py.typed").is_file()
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--config-file",
        "mypy.ini",
    ]
    environment = {**os.environ, "MYPYPATH": str(installed), "PYTHONPATH": ""}
    done = subprocess.run(
        [*command, "--cache-dir", str(folder / "cache"), client.name],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=900,
    )
    assert not done.stderr, done.stderr
    return [
        line
        for line in done.stdout.splitlines()
        if line.startswith(client.name) and ": error:" in line
    ]


@pytest.mark.long
def test_client_code_is_type_checked_against_the_wheel(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "right").mkdir()
    (tmp_path / "wrong").mkdir()
    assert strictly_typed(CLIENT, wheel, tmp_path / "right") == []

    complaints = strictly_typed(MISUSE, wheel, tmp_path / "wrong")
    kinds = [line.rpartition("[")[2].rstrip("]") for line in complaints]
    assert kinds[:3] == ["assignment", "call-arg", "attr-defined"]
    assert kinds.count("arg-type") == 2
