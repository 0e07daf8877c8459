"""The house keeps its shape: floors, what is imported, what is packaged, what users may rely on."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

import jacdiag

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jacdiag"

# Data flows one way, from a model to a verdict: a room imports only rooms with a smaller number, or
# itself.
FLOORS = {
    "records": 1,
    "sources": 2,
    "trace": 3,
    "spectra": 3,
    "measure": 4,
    "rules": 5,
    "comparison": 5,
    "distributed": 5,
    "detectors": 6,
    "remedies": 6,
    "render": 7,
    "pipeline": 8,
    "monitor": 8,
    "backtest": 8,
    "gate": 9,
    "watching": 9,
    "testing": 10,
    "jacdiag_cli": 10,
}
# These are not at once: a sub-layer asks which dimensions are independent when it is first asked,
# not when imported.
# A report prints itself as the table when it is asked to: the renderer is imported then, not
# before.
EXEMPT = {("jacdiag/trace/sublayer.py", "spectra"), ("jacdiag/records/report.py", "render")}
# A report prints itself as the table, and the package hands out its public names, when first asked.
EXEMPT_FROM_CIRCLES = {
    "jacdiag.records.report": {"jacdiag.render.terminal.table"},
}
EVERYBODY = {"errors", "__init__", "_version"}
WITHOUT_TORCH = ("records", "rules", "detectors", "render")

COMMANDS = {
    "audit": {
        "--key",
        "--model",
        "--model-args",
        "--trust-pickle",
        "--tokens",
        "--inputs",
        "--batch",
        "--seq",
        "--seed",
        "--device",
        "--dtype",
        "--tol",
        "--confidence",
        "--decide",
        "--no-decide",
        "--max-products",
        "--state",
        "--lr",
        "--warmup",
        "--clip",
        "--beta2",
        "--profile",
        "--select",
        "--ignore",
        "--fail-on",
        "--format",
        "--json",
        "--plot",
        "--all",
        "--sort",
        "--replay",
        "--contract",
        "--remedies",
        "--patch",
        "--risk",
        "--against",
        "--confidence-all",
        "--probes",
    },
    "gate": {
        "--key",
        "--model",
        "--model-args",
        "--trust-pickle",
        "--tokens",
        "--inputs",
        "--batch",
        "--seq",
        "--seed",
        "--device",
        "--dtype",
        "--tol",
        "--confidence",
        "--decide",
        "--no-decide",
        "--max-products",
        "--state",
        "--lr",
        "--warmup",
        "--clip",
        "--beta2",
        "--profile",
        "--select",
        "--ignore",
        "--fail-on",
        "--format",
        "--json",
        "--plot",
        "--all",
        "--sort",
        "--contract",
        "--seeds",
        "--budget",
        "--baseline",
        "--write-baseline",
        "--contract-only",
        "--remedies",
        "--patch",
        "--risk",
        "--confidence-all",
    },
    "sites": {
        "--key",
        "--model",
        "--model-args",
        "--trust-pickle",
        "--tokens",
        "--inputs",
        "--batch",
        "--seq",
        "--seed",
        "--device",
        "--dtype",
        "--format",
    },
    "diff": {
        "--key",
        "--model",
        "--contract-only",
        "--all",
        "--tokens",
        "--inputs",
        "--batch",
        "--seq",
        "--seed",
        "--device",
        "--dtype",
        "--tol",
        "--confidence",
        "--decide",
        "--no-decide",
        "--max-products",
        "--format",
    },
    "rules": {"--format"},
    "explain": set(),
    "backtest": {
        "--column",
        "--figure",
        "--stratum",
        "--peers",
        "--bad",
        "--false-alarms",
        "--lead",
        "--resamples",
        "--format",
        "--all",
        "--json",
        "--markdown",
        "--plot",
        "--hold-out",
        "--worse",
        "--write-risk",
        "--pack",
        "--rejudge",
        "--risk",
    },
    "live": {"--once", "--refresh", "--lines"},
    "plot": {"-o", "--output", "--figures", "--from", "--to", "--smooth", "--size"},
}
DEFAULTS = {
    "batch": 2,
    "seq": None,
    "seed": 0,
    "device": None,
    "dtype": "float32",
    "tol": 0.05,
    "confidence": 0.999,
    "decide": False,
    "profile": "default",
    "fail_on": "error",
    "output_format": "pretty",
    "state": None,
}
PUBLIC = [
    "JacdiagError",
    "Report",
    "__version__",
    "audit",
    "declare",
    "sites",
    "skipping",
    "spectral_norm",
    "watch",
]
JSON_KEYS = {
    "schema_version",
    "jacdiag",
    "torch",
    "created",
    "source",
    "tier",
    "state",
    "probe",
    "plan",
    "conditions",
    "verdict",
    "model",
    "sublayers",
    "network",
    "findings",
    "rules",
    "cost",
    "settings",
    "ladder",
    "notes",
    "contract",
    "figures",
    "baseline",
    "remedies",
    "risk",
    "against",
    "state_reason",
    "state_basis",
    "replay",
}


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """The modules that a file imports, at its top or inside a function, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{shown(path)}:{node.lineno}: relative import"
            yield node.module or "", node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def room(module: str) -> str | None:
    """The room of a dotted name of ours; None for anything else, and for what is free for all."""
    first, _, rest = module.partition(".")
    if first == "jacdiag_cli":
        return first
    name = rest.partition(".")[0]
    return name if first == "jacdiag" and name in FLOORS else None


def home(path: Path) -> str:
    parts = (
        path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT / "cli")
        .with_suffix("")
        .parts
    )
    return parts[0]


def run(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "cli")])
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        timeout=120,
    )


def test_floors() -> None:
    wrong = []
    for path in [*sources(PACKAGE), *sources(ROOT / "cli")]:
        own = home(path)
        if own in EVERYBODY:
            continue
        assert own in FLOORS, f"{shown(path)} is in no room: give '{own}' a floor in this file"
        for module, line in imported(path):
            other = room(module)
            allowed = other is None or other == own or FLOORS[other] < FLOORS[own]
            if not allowed and (shown(path), other) not in EXEMPT:
                wrong.append(f"{shown(path)}:{line}: {own} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_errors_import_nothing_of_ours() -> None:
    assert [
        module for module, _ in imported(PACKAGE / "errors.py") if module.startswith("jacdiag")
    ] == []


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_rooms_that_know_no_torch(name: str) -> None:
    files = sources(PACKAGE / name)
    assert files
    for path in files:
        found = [module for module, _ in imported(path) if module.split(".")[0] == "torch"]
        assert not found, f"{shown(path)} imports {found}"


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_rooms_do_not_load_torch_by_a_side_door(name: str) -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources(PACKAGE / name)
    ]
    names = ", ".join(module.removesuffix(".__init__") for module in modules)
    done = run(f"import {names}\nimport sys\nassert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_import_is_silent_and_light() -> None:
    heavy = ("torch", "numpy", "scipy", "matplotlib", "rich", "click")
    done = run(
        f"import jacdiag, sys; print([name for name in {heavy} if name in sys.modules])",
        "-W",
        "error",
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_import_is_fast() -> None:
    code = "import time; t = time.perf_counter(); import jacdiag; print(time.perf_counter() - t)"
    assert min(float(run(code).stdout) for _ in range(3)) < 0.2


@pytest.mark.parametrize(
    "args", [["-h"], ["--version"], ["rules"], ["explain", "JD102"], ["audit", "-h"]]
)
def test_light_commands_load_no_torch(args: list[str]) -> None:
    code = (
        f"import sys; from jacdiag_cli.main import main; code = main({args!r}); "
        "heavy = {'torch', 'numpy', 'scipy', 'matplotlib'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else code)"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_frozen_commands() -> None:
    from jacdiag_cli.main import cli

    found = {
        name: {
            option for param in command.params for option in (*param.opts, *param.secondary_opts)
        }
        - {"source"}
        for name, command in cli.commands.items()
    }
    found["explain"].discard("code")
    found["live"].discard("run")
    found["backtest"].discard("runs")
    found["diff"] -= {"a", "b"}
    assert found == COMMANDS


def test_frozen_defaults() -> None:
    from jacdiag_cli.main import cli

    # a command keeps the help option of its first context
    parent = click.Context(cli, **cli.context_settings)
    found = cli.commands["audit"].make_context("audit", ["checkpoint.pt"], parent=parent).params
    assert {name: found[name] for name in DEFAULTS} == DEFAULTS


def test_frozen_python_names() -> None:
    assert sorted(jacdiag.__all__) == PUBLIC
    assert all(getattr(jacdiag, name) is not None for name in PUBLIC)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = jacdiag.nothing


def test_frozen_json_keys() -> None:
    import dataclasses

    schema = json.loads(
        (ROOT / "tests" / "data" / "report.schema.json").read_text(encoding="utf-8")
    )
    assert {field.name for field in dataclasses.fields(jacdiag.Report)} == JSON_KEYS
    assert set(schema["required"]) <= JSON_KEYS == set(schema["properties"])


# -- the package -----------------------------------------------------------------------------------


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


def test_wheel_has_every_module_and_data_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [
        path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert {path.relative_to(ROOT).as_posix() for path in files} <= names
    assert {path.relative_to(ROOT / "cli").as_posix() for path in sources(ROOT / "cli")} <= names


def test_no_requirement_has_an_upper_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    capped = [
        line
        for group in groups
        for line in group
        if any(sign in line for sign in ("<", "==", "~=", "!="))
    ]
    assert not capped
    assert any(line.startswith("torch>=") for line in project["dependencies"])


def fake_torch(folder: Path, version: str) -> None:
    """A wheel that calls itself a newer torch: an installer that wants the newest would take it."""
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


def planned(wheel: Path, folder: Path, *more: str) -> dict[str, str]:
    """What pip would install, by its own resolver, without a network: {name: version}."""
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


def test_installing_replaces_no_torch_that_is_there(wheel: Path, tmp_path: Path) -> None:
    fake_torch(tmp_path, "99.0")
    plan = planned(wheel, tmp_path)
    assert "torch" not in plan, f"would replace torch by {plan['torch']}"
    assert plan.keys() <= {"jacdiag"}, f"would install {plan}"


def test_the_fake_torch_would_be_taken_by_who_asks_for_it(wheel: Path, tmp_path: Path) -> None:
    """Proves that the test above can fail: where an upgrade is asked for, pip does take the newer
    wheel.
    """
    fake_torch(tmp_path, "99.0")
    eager = planned(wheel, tmp_path, "--upgrade", "--upgrade-strategy", "eager")
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
def test_a_client_is_type_checked_against_the_wheel(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "right").mkdir()
    (tmp_path / "wrong").mkdir()
    assert strictly_typed(CLIENT, wheel, tmp_path / "right") == []

    complaints = strictly_typed(MISUSE, wheel, tmp_path / "wrong")
    kinds = [line.rpartition("[")[2].rstrip("]") for line in complaints]
    assert kinds[:3] == ["assignment", "call-arg", "attr-defined"]
    assert kinds.count("arg-type") == 2


def test_no_test_leaves_the_benchmarks_folder_importable() -> None:
    """Folders of tests and modules of benchmarks share names: the wrong one would be imported, and
    only at times.
    """
    assert str(ROOT / "benchmarks") not in sys.path


def test_the_citation_names_the_version_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == jacdiag.__version__
    assert citation["license"] == "Apache-2.0"


def test_the_workflows_run_targets_and_files_that_exist() -> None:
    """Every `make` target, and every script, that a workflow names."""
    targets = set(
        re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert workflows
    for path in workflows:
        jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
        commands = "\n".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
        assert set(re.findall(r"\bmake ([\w./-]+)", commands)) <= targets
        for script in re.findall(r"(?:scripts|benchmarks)/\w+\.py", commands):
            assert (ROOT / script).is_file(), f"{path.name}: {script}"


def test_contributing_lists_every_folder_of_the_package() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    missing = [
        folder for folder in FLOORS if folder != "jacdiag_cli" and f"`{folder}/`" not in text
    ]
    assert missing == []


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of nodes that reach each other, each in order of names."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            fresh = graph[waiting.pop()] - seen
            seen |= fresh
            waiting += fresh
        reach[start] = seen
    groups = {
        tuple(sorted(other for other in graph if other in reach[node] and node in reach[other]))
        for node in graph
        if node in reach[node]
    }
    return [list(group) for group in sorted(groups)]


def test_cycles_are_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]
    assert cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    """Imports inside functions and imports for types count, too."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sources(PACKAGE)
    }
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        others = {module for module, _ in imported(path) if module in files}
        # `from a.b import c` names a.b and a.b.c; where c is a file, it is the one that is meant.
        packages = {other for other in others if any(o.startswith(f"{other}.") for o in others)}
        exempt = EXEMPT_FROM_CIRCLES.get(name, set())
        graph[name] = others - packages - exempt - {name}
    assert cycles(graph) == []


# -- the quick selection ---------------------------------------------------------------------------
def check_marks() -> Iterator[tuple[str, str]]:
    """Yield each file with a test of `make check`, and a name of what its mark says that it
    covers.
    """
    for path in sources(ROOT / "tests"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.check":
                assert node.args, (
                    f"{shown(path)}:{node.lineno}: the mark names what the test covers"
                )
                yield from ((shown(path), ast.literal_eval(argument)) for argument in node.args)


def test_make_check_covers_every_folder_and_every_command() -> None:
    """The quick selection has a test for each folder of the package and for each command."""
    from jacdiag_cli.main import cli

    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"watching"}
    commands = {f"jacdiag {name}" for name in cli.commands}
    assert {name for _, name in check_marks()} == folders | commands


def test_make_check_reads_every_file_that_has_the_mark() -> None:
    """`make` passes the files that hold the text of the mark: to collect all tests takes longer
    than to run these.
    """
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "grep -rl --include='test_*.py' 'mark.check(' tests" in makefile
    files = {path for path, _ in check_marks()}
    assert files == {
        shown(p) for p in sources(ROOT / "tests") if "mark.check(" in p.read_text(encoding="utf-8")
    } - {"tests/test_house.py"}
