"""The shape of the code: floors of folders, circles of files, names of files, and `make check`.

What users may rely on is in `test_public_names.py`; what is packaged is in `test_package.py`.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import jacdiag

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jacdiag"
CLI = ROOT / "cli"

# Data flows one way, from a model to a verdict. A folder imports only folders on lower floors.
FLOORS = {
    "records": 1,
    "devices": 1,
    "sources": 2,
    "spectra": 3,
    "trace": 3,
    "measure": 4,
    "rules": 5,
    "detectors": 5,
    "comparison": 5,
    "remedies": 6,
    "render": 6,
    "distributed": 6,
    "pipeline": 7,
    "monitor": 7,
    "watching": 7,
    "backtest": 7,
    "gate": 8,
    "testing": 9,
    "jacdiag_cli": 9,
}
# A live rule has the record, the profile and the documentation page of a rule.
# `watching` is the old name of `monitor`.
ON_THE_SAME_FLOOR = {("detectors", "rules"), ("watching", "monitor")}
# Upwards, but inside a function: a sub-layer asks which dimensions are independent when it is
# measured, and a report imports the renderer when it is asked to print itself.
UPWARDS = {
    ("jacdiag/trace/sublayer.py", "spectra"),
    ("jacdiag/records/report.py", "render"),
}
# The renderer imports the report; see above.
CLOSES_A_CIRCLE = {
    ("jacdiag.records.report", "jacdiag.render.terminal.report"),
    ("jacdiag.records.report", "jacdiag.render.html.pages"),
}
ABOVE_ALL_FLOORS = {"__init__", "_version", "errors"}

WITHOUT_TORCH = ("records", "rules", "detectors", "render")

# A file name that occurs twice means the same subject at two steps: measured, recorded, judged,
# printed, or made a command.
SUBJECTS = {
    "audit",
    "backtest",
    "batch_values",
    "computed_tables",
    "diff",
    "flight_replay",
    "gate",
    "huggingface",
    "init_contract",
    "lightning",
    "low_rank_adapters",
    "options",
    "report",
    "state_space_rates",
    "structure",
    "tied_weights",
}


def python_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


PRODUCT_FILES = [*python_files(PACKAGE), *python_files(CLI)]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def dotted_name(path: Path) -> str:
    base = CLI if path.is_relative_to(CLI) else ROOT
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def nodes_of(source: str) -> list[ast.AST]:
    """Return all nodes of a file, which several tests walk through."""
    return list(ast.walk(ast.parse(source)))


@functools.cache
def imported_modules(path: Path) -> list[tuple[str, int]]:
    """Return each module that a file imports, and the line.

    Imports inside functions and under `if TYPE_CHECKING` count, too.
    """
    modules: list[tuple[str, int]] = []
    for node in nodes_of(path.read_text(encoding="utf-8")):
        if isinstance(node, ast.Import):
            for alias in node.names:
                modules.append((alias.name, node.lineno))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: relative import"
            modules.append((node.module or "", node.lineno))
            for alias in node.names:
                modules.append((f"{node.module}.{alias.name}", node.lineno))

    return modules


def folder_of_module(module: str) -> str | None:
    """Return the folder of the product that a module belongs to.

    Returns:
        None for a module of another package and for what every folder may import.
    """
    parts = module.split(".")
    if parts[0] == "jacdiag_cli":
        return "jacdiag_cli"
    if parts[0] == "jacdiag" and len(parts) > 1 and parts[1] in FLOORS:
        return parts[1]
    return None


def folder_of_file(path: Path) -> str:
    base = PACKAGE if path.is_relative_to(PACKAGE) else CLI
    return path.relative_to(base).with_suffix("").parts[0]


def run_python(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    search_path = os.pathsep.join([str(ROOT), str(CLI)])
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": search_path},
        timeout=120,
    )


# -- floors ----------------------------------------------------------------------------------------
def imports_between_folders() -> Iterator[tuple[Path, int, str, str]]:
    """Yield (file, line, its folder, the folder that it imports) for each such import."""
    for path in PRODUCT_FILES:
        folder = folder_of_file(path)
        if folder in ABOVE_ALL_FLOORS:
            continue
        assert folder in FLOORS, f"{relative(path)}: give '{folder}' a floor in this file"
        for module, line in imported_modules(path):
            other = folder_of_module(module)
            if other is not None and other != folder:
                yield path, line, folder, other


def test_folders_import_only_lower_floors() -> None:
    wrong = []
    for path, line, folder, other in imports_between_folders():
        is_lower = FLOORS[other] < FLOORS[folder]
        is_exempt = (folder, other) in ON_THE_SAME_FLOOR or (relative(path), other) in UPWARDS
        if not is_lower and not is_exempt:
            wrong.append(f"{relative(path)}:{line}: {folder} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_every_exemption_from_the_floors_is_used() -> None:
    folders, files = set(), set()
    for path, _, folder, other in imports_between_folders():
        folders.add((folder, other))
        files.add((relative(path), other))
    assert folders >= ON_THE_SAME_FLOOR
    assert files >= UPWARDS
    assert all(FLOORS[folder] == FLOORS[other] for folder, other in ON_THE_SAME_FLOOR)


def test_errors_imports_nothing_of_the_package() -> None:
    modules = [module for module, _ in imported_modules(PACKAGE / "errors.py")]
    assert not [module for module in modules if module.startswith("jacdiag")]


# -- circles ---------------------------------------------------------------------------------------
def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of nodes that reach each other, each in order of names."""
    # 1. What each node reaches.
    reach: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            fresh = graph[waiting.pop()] - seen
            seen |= fresh
            waiting += fresh
        reach[start] = seen

    # 2. A node that reaches itself is in a circle with all that reach it back.
    groups = set()
    for node in graph:
        if node in reach[node]:
            groups.add(tuple(sorted(other for other in reach[node] if node in reach[other])))
    return [list(group) for group in sorted(groups)]


def test_import_circles_are_detected() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def import_graph() -> dict[str, set[str]]:
    """Return which file of the product imports which, by dotted names."""
    files = {dotted_name(path): path for path in PRODUCT_FILES}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        others = {module for module, _ in imported_modules(path) if module in files} - {name}
        # `from a.b import c` names a.b and a.b.c. If c is a file, it is the one that is meant.
        packages = {other for other in others if any(m.startswith(f"{other}.") for m in others)}
        graph[name] = others - packages
    return graph


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = import_graph()
    for name, other in CLOSES_A_CIRCLE:
        assert other in graph[name], f"{name} needs no exemption any more"
        graph[name] = graph[name] - {other}
    assert circles(graph) == []


# -- names of files --------------------------------------------------------------------------------
def test_a_file_name_occurs_twice_only_for_one_subject() -> None:
    by_name: dict[str, list[str]] = defaultdict(list)
    for path in PRODUCT_FILES:
        if not path.stem.startswith("__"):
            by_name[path.stem].append(relative(path))
    repeated = {name: paths for name, paths in by_name.items() if len(paths) > 1}
    unknown = {name: paths for name, paths in repeated.items() if name not in SUBJECTS}
    assert not unknown, "rename one, or list the subject that they share"
    assert repeated.keys() == SUBJECTS


def test_names_of_test_files_are_unique() -> None:
    """Files of tests stand in folders without `__init__.py`, so their names are their modules."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


# -- names of classes ------------------------------------------------------------------------------
# The callbacks of Hugging Face and of Lightning do the same for two trainers.
SAME_CLASS_NAME_IN_TWO_INTEGRATIONS = {"WatchCallback"}


def public_classes(source: str) -> Iterator[tuple[str, int]]:
    """Yield the name and the line of each class of a file that has no leading underscore."""
    for node in nodes_of(source):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node.lineno


def repeated_class_names(sources: dict[str, str]) -> dict[str, list[str]]:
    """Return each name of several public classes, and where they are defined.

    Args:
        sources: the text of each file, by its path.
    """
    places: dict[str, list[str]] = defaultdict(list)
    for path, source in sources.items():
        for name, line in public_classes(source):
            places[name].append(f"{path}:{line}")
    return {name: where for name, where in places.items() if len(where) > 1}


def test_repeated_class_names_are_found_and_private_ones_are_allowed() -> None:
    first = "class Curve: ...\nclass _Flow: ...\nclass Point: ..."
    second = "class _Flow: ...\nif True:\n    class Curve: ..."
    assert repeated_class_names({"a.py": first, "b.py": second}) == {"Curve": ["a.py:1", "b.py:3"]}


def test_no_name_stands_for_two_public_classes() -> None:
    sources = {relative(path): path.read_text(encoding="utf-8") for path in PRODUCT_FILES}
    repeated = repeated_class_names(sources)
    offenders = [
        f"{name}: {', '.join(where)}"
        for name, where in repeated.items()
        if name not in SAME_CLASS_NAME_IN_TWO_INTEGRATIONS
    ]
    assert not offenders, "rename one of the two classes:\n" + "\n".join(offenders)


# -- what importing loads --------------------------------------------------------------------------
@pytest.mark.parametrize("folder", WITHOUT_TORCH)
def test_folder_without_torch_does_not_name_it(folder: str) -> None:
    files = python_files(PACKAGE / folder)
    assert files
    for path in files:
        modules = [module for module, _ in imported_modules(path)]
        assert not [module for module in modules if module.split(".")[0] == "torch"], relative(path)


def test_folders_without_torch_do_not_load_it_by_other_modules() -> None:
    """One process for all folders: it names the module after which torch was loaded."""
    modules = [
        dotted_name(path) for folder in WITHOUT_TORCH for path in python_files(PACKAGE / folder)
    ]
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
    assert "torch" not in sys.modules, name
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_import_is_silent_light_and_fast() -> None:
    heavy = ("torch", "numpy", "scipy", "matplotlib", "rich", "click")
    code = f"""
import sys, time
begun = time.perf_counter()
import jacdiag
print(time.perf_counter() - begun)
print([name for name in {heavy} if name in sys.modules])
"""
    runs = [run_python(code, "-W", "error") for _ in range(3)]
    seconds = []
    for done in runs:
        elapsed, loaded = done.stdout.splitlines()
        assert (done.returncode, loaded, done.stderr) == (0, "[]", "")
        seconds.append(float(elapsed))
    assert min(seconds) < 0.2


@pytest.mark.parametrize(
    "arguments", [["-h"], ["--version"], ["rules"], ["explain", "JD102"], ["audit", "-h"]]
)
def test_light_command_does_not_load_torch(arguments: list[str]) -> None:
    code = f"""
import sys
from jacdiag_cli.main import main
code = main({arguments!r})
heavy = {{"torch", "numpy", "scipy", "matplotlib"}} & set(sys.modules)
sys.exit(f"loaded {{heavy}}" if heavy else code)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout


# -- what stands next to the code ------------------------------------------------------------------
def test_benchmarks_folder_is_not_importable_in_tests() -> None:
    """Folders of tests and modules of benchmarks share names: the wrong one could be imported."""
    assert str(ROOT / "benchmarks") not in sys.path


def test_citation_names_the_version_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == jacdiag.__version__
    assert citation["license"] == "Apache-2.0"


def test_workflows_run_targets_and_scripts_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w./-]+):", makefile, re.MULTILINE))
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
    folders = FLOORS.keys() - {"jacdiag_cli"}
    assert not [folder for folder in folders if f"`{folder}/`" not in text]


# -- make check ------------------------------------------------------------------------------------
def check_marks() -> Iterator[tuple[str, str]]:
    """Yield each file with a `check` mark, and each folder or command that the mark names."""
    for path in python_files(ROOT / "tests"):
        text = path.read_text(encoding="utf-8")
        if "mark.check" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.check":
                where = f"{relative(path)}:{node.lineno}"
                assert node.args, f"{where}: the mark names what the test covers"
                for argument in node.args:
                    yield relative(path), ast.literal_eval(argument)


def test_make_check_covers_every_folder_and_every_command() -> None:
    from jacdiag_cli.main import cli

    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"watching"}
    commands = {f"jacdiag {name}" for name in cli.commands}
    assert {covered for _, covered in check_marks()} == folders | commands


def test_make_check_reads_every_file_that_has_the_mark() -> None:
    """`make` passes the files that grep finds: to collect all tests takes longer than these run."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "grep -rl --include='test_*.py' 'mark.check(' tests" in makefile
    with_text = {
        relative(path)
        for path in (ROOT / "tests").rglob("test_*.py")
        if "mark.check(" in path.read_text(encoding="utf-8")
    }
    assert {path for path, _ in check_marks()} == with_text - {"tests/test_house.py"}
