"""What is packaged and what it needs: sdist, wheel, requirements, and types for a client."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
import yaml
from jacdiag_cli.main import main

import jacdiag
from jacdiag.rules import EVERY
from scripts.docs.repository_files import relative_links

ROOT = Path(__file__).parent.parent
FOR_DEVELOPERS = ("dev", "docs")  # extras that no user needs
IMPORT = re.compile(
    r"^\s*(?:from (\w+)[\w.]* import |import (\w+)[\w.]*(?: as \w+)?\s*(?:#.*)?$)", re.MULTILINE
)
# Packages whose module has another name.
PACKAGE_NAMES = {
    "huggingface_hub": "huggingface-hub",
    "markdown_it": "markdown-it-py",
    "mlflow": "mlflow-skinny",
}
# Used only if the user's own program has them.
NOT_REQUIRED = {"pytest"}
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = SETTINGS["project"]
BUILD = SETTINGS["build-system"]


def requirement_name(line: str) -> str:
    """Return the package that a requirement such as `mkdocstrings[python]>=0.29` names."""
    return re.split(r"[\[ >=<]", line)[0]


@dataclass(frozen=True)
class Distributions:
    """The two files of a release.

    Attributes:
        sdist: made from the working tree.
        wheel: made from the sdist, so that it shows that the sdist holds what a wheel needs.
    """

    sdist: Path
    wheel: Path


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,) = folder.glob("*.tar.gz")
    (built,) = folder.glob("*.whl")
    return Distributions(sdist, built)


@pytest.fixture(scope="session")
def wheel(distributions: Distributions) -> Path:
    return distributions.wheel


@pytest.fixture(scope="session")
def sdist_names(distributions: Distributions) -> set[str]:
    """Return the files of the sdist, without the folder that they are in."""
    with tarfile.open(distributions.sdist) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


# -- contents --------------------------------------------------------------------------------------
def test_wheel_has_two_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = f"jacdiag-{jacdiag.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"jacdiag", "jacdiag_cli", info}
    assert f"{info}/licenses/LICENSE" in names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".png")]


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


def test_wheel_has_what_the_commands_read(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    needed = {
        "jacdiag/render/html/templates/report.html.j2",
        "jacdiag/render/html/templates/page.js",
        "jacdiag/render/html/templates/page.css",
        "jacdiag/rules/thresholds.toml",
        "jacdiag/rules/init/schemes.toml",
        "jacdiag/records/report.schema.json",
        *(f"jacdiag/rules/pages/{rule.code}.md" for rule in EVERY),
    }
    assert needed <= names


def test_sdist_has_what_the_tests_and_the_documentation_need(sdist_names: set[str]) -> None:
    needed = {
        "Makefile",
        "constraints.txt",
        "mkdocs.yml",
        "action.yml",
        "tests/test_package.py",
        "scripts/docs/site.py",
        "examples/checkpoints/vanilla-step0.pt",
        "packaging/conda/recipe.yaml",
        "CHANGELOG.md",
    }
    assert needed <= sdist_names
    assert not [name for name in sdist_names if "__pycache__" in name]


def test_links_of_the_front_page_lead_to_files_of_the_sdist(sdist_names: set[str]) -> None:
    links = relative_links((ROOT / "README.md").read_text(encoding="utf-8"))
    files = {link.partition("#")[0] for link in links} - {""}
    assert len(files) > 10
    assert files <= sdist_names


# -- metadata --------------------------------------------------------------------------------------
def wheel_metadata(wheel: Path) -> Message:
    """Return the metadata of a wheel, as pip reads them."""
    info = f"jacdiag-{jacdiag.__version__}.dist-info"
    text = zipfile.ZipFile(wheel).read(f"{info}/METADATA").decode()
    return message_from_string(text)


def test_metadata_names_version_licence_links_and_python(wheel: Path) -> None:
    fields = wheel_metadata(wheel)
    assert fields["Version"] == jacdiag.__version__
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == PROJECT["requires-python"]
    assert fields["Description-Content-Type"] == "text/markdown"
    assert str(fields.get_payload()).strip() == (ROOT / "README.md").read_text().strip()
    links = dict(line.split(", ") for line in fields.get_all("Project-URL", []))
    assert links == PROJECT["urls"]


def test_classifiers_name_the_python_versions_that_are_tested() -> None:
    prefix = "Programming Language :: Python :: 3."
    named = [
        line.removeprefix("Programming Language :: Python :: ")
        for line in PROJECT["classifiers"]
        if line.startswith(prefix)
    ]
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    assert named == workflow["jobs"]["pinned"]["strategy"]["matrix"]["python"]
    assert PROJECT["requires-python"] == f">={named[0]}"


def third_party_imports(folder: Path) -> set[str]:
    """Return the packages that a folder's modules import, without the standard library's."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        for match in IMPORT.finditer(path.read_text(encoding="utf-8")):
            names.add(match[1] or match[2])
    return names - set(sys.stdlib_module_names) - {"jacdiag", "jacdiag_cli"}


def test_every_import_is_a_requirement_or_an_extra() -> None:
    imported = third_party_imports(ROOT / "jacdiag") | third_party_imports(ROOT / "cli")
    assert {"torch", "click", "rich"} <= imported
    optional = PROJECT["optional-dependencies"]
    extras = [
        line for name, lines in optional.items() if name not in FOR_DEVELOPERS for line in lines
    ]
    lines = [*PROJECT["dependencies"], *extras]
    declared = {requirement_name(line) for line in lines}
    packages = {PACKAGE_NAMES.get(name, name) for name in imported}
    assert packages - NOT_REQUIRED <= declared


def test_no_requirement_of_a_user_has_an_upper_bound() -> None:
    optional = PROJECT["optional-dependencies"]
    groups = [lines for name, lines in optional.items() if name not in FOR_DEVELOPERS]
    capped = [
        line
        for group in [PROJECT["dependencies"], *groups]
        for line in group
        if any(sign in line for sign in ("<", "==", "~=", "!="))
    ]
    assert not capped
    assert any(line.startswith("torch>=") for line in PROJECT["dependencies"])


# -- conda -----------------------------------------------------------------------------------------
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}


def conda_name(line: str) -> str:
    """Return a requirement of pip as conda writes it: `torch>=2.6` is `pytorch >=2.6`."""
    name = requirement_name(line)
    return f"{CONDA_NAMES.get(name, name)} {line.removeprefix(name)}"


def test_the_conda_recipe_agrees_with_the_project() -> None:
    recipe = yaml.safe_load((ROOT / "packaging/conda/recipe.yaml").read_text(encoding="utf-8"))
    python = f"python {PROJECT['requires-python']}"
    expected = {python, *(conda_name(line) for line in PROJECT["dependencies"])}
    assert set(recipe["requirements"]["run"]) == expected
    [backend] = BUILD["requires"]
    assert set(recipe["requirements"]["host"]) == {python, "pip", conda_name(backend)}

    assert recipe["context"]["version"] == jacdiag.__version__
    entry_points = [f"{name} = {target}" for name, target in PROJECT["scripts"].items()]
    assert recipe["build"]["python"]["entry_points"] == entry_points
    assert recipe["about"]["license"] == PROJECT["license"]
    for test in recipe["tests"]:
        for command in test.get("script", []):
            program, *arguments = shlex.split(command)
            assert program == "jacdiag"
            assert main(arguments) == 0


# -- installing ------------------------------------------------------------------------------------
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


@dataclass(frozen=True)
class CleanEnvironment:
    """A virtual environment that holds the wheel, and sees the libraries of this one.

    Attributes:
        folder: of the environment.
    """

    folder: Path

    def run(self, program: str, *arguments: str, cwd: Path) -> str:
        """Run a program of the environment and return what it printed.

        Args:
            program: its name, such as `jacdiag`.
            arguments: that it gets.
            cwd: where it runs; not the checkout, whose packages would take precedence.
        """
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [str(self.folder / "bin" / program), *arguments]
        done = subprocess.run(
            command, cwd=cwd, env=clean, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture
def environment(wheel: Path, tmp_path: Path) -> CleanEnvironment:
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python3*/site-packages")

    # Libraries are seen, and the editable install of this project is not: a folder that a .pth file
    # names is searched, but its own .pth files are not read.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    command += ["--python", str(folder / "bin" / "python"), "install"]
    command += ["--quiet", "--no-index", "--no-deps", "--force-reinstall", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return CleanEnvironment(folder)


@pytest.mark.long
def test_the_wheel_works_in_a_clean_environment(
    environment: CleanEnvironment, tmp_path: Path
) -> None:
    # 1. The package is the installed one.
    show = "import jacdiag, jacdiag_cli; print(jacdiag.__file__); print(jacdiag_cli.__file__)"
    for file in environment.run("python", "-c", show, cwd=tmp_path).splitlines():
        assert Path(file).is_relative_to(environment.folder)
    versions = environment.run("jacdiag", "--version", cwd=tmp_path)
    assert versions.startswith(f"jacdiag, version {jacdiag.__version__}\ntorch 2.")

    # 2. It finds its files: checkpoint builder, thresholds, rule pages, templates, schema.
    checkpoint = str(ROOT / "examples" / "checkpoints" / "vanilla-step0.pt")
    small = ["--batch", "1", "--seq", "8"]
    files = ["--json", "report.json", "--html", "report.html"]
    table = environment.run("jacdiag", "audit", checkpoint, *small, *files, cwd=tmp_path)
    assert "Large shortcut not met" in table
    assert json.loads((tmp_path / "report.json").read_text())["jacdiag"] == jacdiag.__version__
    assert "</html>" in (tmp_path / "report.html").read_text()
    assert "JD102" in environment.run("jacdiag", "explain", "JD102", cwd=tmp_path)
    environment.run("python", "-m", "jacdiag.render", "report.json", "sarif", cwd=tmp_path)


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
