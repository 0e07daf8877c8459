"""Check that a release may be made of the working tree; `make release-check`.

Prints one line for each check, and one sentence for each problem. The exit code is 1 if there is a
problem. A check whose tool is not installed is skipped, and the last line says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email import message_from_string
from pathlib import Path

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from scripts.docs.repository_files import FENCE, relative_links  # noqa: E402

_VERSION = r"(\d+\.\d+\.\d+[a-z0-9.]*)"
# Places that repeat the version: a pattern of files, and what stands around the version there.
REPEATED = (
    ("CITATION.cff", rf"^version: {_VERSION}$"),
    ("packaging/conda/recipe.yaml", rf'^  version: "{_VERSION}"$'),
    ("cli/jacdiag_cli/main.py", rf"^ +jacdiag, version {_VERSION}$"),
)
# Pages that may show output with the version.
SHOWN = (rf"\bjacdiag {_VERSION}\b", rf"\bjacdiag, version {_VERSION}$", rf"jacdiag@v{_VERSION}")
PAGES = ("README.md", "AGENTS.md", "docs/**/*.md")
INSTALLED = "tests/test_package.py::test_the_wheel_works_in_a_clean_environment"


class SkipCheck(Exception):
    """A check that cannot be made here; the message says why."""


@dataclass(frozen=True)
class Release:
    """What is checked.

    Attributes:
        root: the working tree.
        dist: the folder that sdist and wheel are built in.
    """

    root: Path
    dist: Path

    @property
    def version(self) -> str:
        """The version of the package."""
        return read_version(self.root)

    @property
    def sdist(self) -> Path:
        """The sdist that was built."""
        return self._built(f"jacdiag-{self.version}.tar.gz")

    @property
    def wheel(self) -> Path:
        """The wheel that was built."""
        return self._built(f"jacdiag-{self.version}-py3-none-any.whl")

    def _built(self, name: str) -> Path:
        path = self.dist / name
        if not path.is_file():
            raise SkipCheck(f"{name} was not built")
        return path


def read_version(root: Path) -> str:
    """Return the version that `jacdiag/_version.py` gives."""
    text = (root / "jacdiag" / "_version.py").read_text(encoding="utf-8")
    match = re.search(rf'__version__ = "{_VERSION}"', text)
    if match is None:
        raise ValueError("jacdiag/_version.py gives no version of the form 1.2.3")
    return match[1]


# -- the working tree ------------------------------------------------------------------------------
def check_versions(release: Release) -> list[str]:
    """Return the places that name another version than the package."""
    problems = []
    for name, pattern in REPEATED:
        text = (release.root / name).read_text(encoding="utf-8")
        versions = re.findall(pattern, text, re.MULTILINE)
        if not versions:
            problems.append(f"{name} names no version, where {release.version} is expected.")
        problems += _other_versions(name, versions, release.version)
    for pattern in PAGES:
        for page in sorted(release.root.glob(pattern)):
            text = page.read_text(encoding="utf-8")
            versions = [
                version for shown in SHOWN for version in re.findall(shown, text, re.MULTILINE)
            ]
            name = page.relative_to(release.root).as_posix()
            problems += _other_versions(name, versions, release.version)
    return problems


def _other_versions(name: str, versions: Sequence[str], version: str) -> list[str]:
    """Return a sentence for each version that is not the package's."""
    others = sorted(set(versions) - {version})
    return [f"{name} names version {other}, but the package is {version}." for other in others]


def check_changelog(release: Release) -> list[str]:
    """Return what CHANGELOG.md lacks: a dated section of this version that says something."""
    text = (release.root / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    own = [section for section in sections if section.startswith(f"[{release.version}]")]
    if not own:
        return [f"CHANGELOG.md has no section for version {release.version}."]

    problems = []
    heading, _, body = own[0].partition("\n")
    if not re.search(r" - \d{4}-\d{2}-\d{2}$", heading):
        problems.append(f"CHANGELOG.md gives no date for version {release.version}.")
    if not re.search(r"^- \S", body, re.MULTILINE):
        problems.append(f"CHANGELOG.md says nothing under version {release.version}.")
    for section in sections:
        if section.startswith("[Unreleased]") and re.search(r"^- \S", section, re.MULTILINE):
            problems.append(
                "CHANGELOG.md has entries under Unreleased that the release would omit."
            )
    return problems


def check_tree(release: Release) -> list[str]:
    """Return what differs between the working tree and its commit, and a tag that is elsewhere."""
    problems = []
    changed = _git(release.root, "status", "--porcelain").splitlines()
    if changed:
        first = changed[0][3:]
        problems.append(f"The working tree has changes that are not committed, such as {first}.")
    tag = f"v{release.version}"
    if _git(release.root, "tag", "--list", tag):
        head = _git(release.root, "rev-parse", "HEAD")
        if _git(release.root, "rev-list", "-n", "1", tag) != head:
            problems.append(f"The tag {tag} exists, but on another commit.")
    return problems


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    if done.returncode != 0:
        raise SkipCheck(f"git {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout.rstrip("\n")


def check_readme(release: Release) -> list[str]:
    """Return what would be wrong with the front page where it is shown."""
    text = (release.root / "README.md").read_text(encoding="utf-8")
    problems = []
    if not text.startswith("# "):
        problems.append("README.md does not begin with a title.")
    if sum(FENCE.match(line) is not None for line in text.splitlines()) % 2:
        problems.append("README.md has a code block that does not end.")
    for link in relative_links(text):
        path = link.partition("#")[0]
        if path and not (release.root / path).exists():
            problems.append(f"README.md links to {path}, which does not exist.")
    return problems


# -- what is built ---------------------------------------------------------------------------------
def check_build(release: Release) -> list[str]:
    """Build sdist and wheel; return what went wrong."""
    _needs("build")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(release.dist)]
    return _problems_of([*command, str(release.root)], release.root, "The package does not build")


def check_contents(release: Release) -> list[str]:
    """Return files that sdist or wheel lack, and files that they should not hold."""
    tracked = _git(release.root, "ls-files").splitlines()
    with tarfile.open(release.sdist) as archive:
        members = [member.name for member in archive.getmembers() if member.isfile()]
    source = {name.partition("/")[2] for name in members}
    wheel = set(zipfile.ZipFile(release.wheel).namelist())
    return missing_files(tracked, source, wheel) + surplus_files(tracked, source, wheel)


def missing_files(tracked: Sequence[str], source: set[str], wheel: set[str]) -> list[str]:
    """Return a sentence for each tracked file that the sdist lacks, or that the wheel lacks."""
    problems = []
    for name in tracked:
        if name not in source:
            problems.append(f"The sdist lacks {name}.")
        inside = name.removeprefix("cli/")
        if inside.startswith(("jacdiag/", "jacdiag_cli/")) and inside not in wheel:
            problems.append(f"The wheel lacks {inside}.")
    return problems


def surplus_files(tracked: Sequence[str], source: set[str], wheel: set[str]) -> list[str]:
    """Return a sentence for each file of sdist or wheel that is not in the repository."""
    packaged = {name.removeprefix("cli/") for name in tracked}
    in_wheel = {name for name in wheel if ".dist-info/" not in name}
    problems = [
        f"The sdist holds {name}, which is not in the repository."
        for name in sorted(source - set(tracked) - {"PKG-INFO"})
    ]
    problems += [
        f"The wheel holds {name}, which is not in the repository."
        for name in sorted(in_wheel - packaged)
    ]
    return problems


def check_metadata(release: Release) -> list[str]:
    """Return what is wrong with the metadata of the wheel."""
    name = f"jacdiag-{release.version}.dist-info/METADATA"
    fields = message_from_string(zipfile.ZipFile(release.wheel).read(name).decode())
    needed = ("License-Expression", "Requires-Python", "Author", "Project-URL", "Summary")
    return [f"The metadata lack {field}." for field in needed if not fields[field]]


def check_twine(release: Release) -> list[str]:
    """Return what twine says of the metadata and of how the front page renders."""
    _needs("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict"]
    files = [str(release.sdist), str(release.wheel)]
    return _problems_of([*command, *files], release.root, "twine check fails")


def check_installation(release: Release) -> list[str]:
    """Install the wheel in a clean environment and run its commands; return what went wrong."""
    _needs("pytest")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", INSTALLED]
    return _problems_of(command, release.root, "The installed wheel does not work")


def check_docs(release: Release) -> list[str]:
    """Build the site strictly; return what went wrong."""
    _needs("material")
    site = str(release.dist / "site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", site]
    return _problems_of(command, release.root, "The site does not build")


def _needs(module: str) -> None:
    """Skip a check whose tool is not installed."""
    if importlib.util.find_spec(module) is None:
        raise SkipCheck(f"{module} is not installed")


def _problems_of(command: Sequence[str], folder: Path, sentence: str) -> list[str]:
    """Run a command; if it fails, return a sentence with the last line that it printed."""
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return []
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    last = lines[-1].strip() if lines else f"exit code {done.returncode}"
    return [f"{sentence}: {last}"]


CHECKS: dict[str, Callable[[Release], list[str]]] = {
    "versions": check_versions,
    "changelog": check_changelog,
    "tree": check_tree,
    "readme": check_readme,
    "build": check_build,
    "contents": check_contents,
    "metadata": check_metadata,
    "twine": check_twine,
    "installation": check_installation,
    "docs": check_docs,
}


def run_checks(release: Release, names: Sequence[str]) -> int:
    """Run checks and print what each says.

    Args:
        release: what is checked.
        names: of the checks, in order.

    Returns:
        1 if there is a problem, else 0.
    """
    failed = []
    skipped = []
    for name in names:
        try:
            problems = CHECKS[name](release)
        except SkipCheck as reason:
            skipped.append(name)
            print(f"{name:13}skipped: {reason}", flush=True)
            continue
        if not problems:
            print(f"{name:13}ok", flush=True)
            continue
        failed.append(name)
        print(f"{name:13}FAILED", flush=True)
        for problem in problems:
            print(f"  {problem}", flush=True)

    # The last line is what a person reads first.
    if failed:
        print(f"\njacdiag {release.version} is not ready: {', '.join(failed)}")
        return 1
    if skipped:
        print(f"\nNo problem in jacdiag {release.version}. Not checked: {', '.join(skipped)}")
        return 0
    print(f"\njacdiag {release.version} is ready")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks that the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"of {', '.join(CHECKS)}")
    names = parser.parse_args(arguments).checks or list(CHECKS)
    unknown = sorted(set(names) - set(CHECKS))
    if unknown:
        parser.error(f"no such check: {', '.join(unknown)}")
    with tempfile.TemporaryDirectory() as folder:
        return run_checks(Release(ROOT, Path(folder)), names)


if __name__ == "__main__":
    sys.exit(main())
