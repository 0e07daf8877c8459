"""`make release-check`: each fault of a release is named, and a tree without fault passes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from scripts import release_check
from scripts.release_check import Release, SkipCheck

CHANGELOG = """# Changelog

## [Unreleased]

## [1.2.3] - 2026-01-31

### Added
- Something.

## [1.2.2] - 2025-01-31
- Something else.
"""
FILES = {
    "jacdiag/_version.py": '__version__ = "1.2.3"\n',
    "CITATION.cff": "version: 1.2.3\n",
    "packaging/conda/recipe.yaml": 'context:\n  version: "1.2.3"\n',
    "cli/jacdiag_cli/main.py": '    """\n        jacdiag, version 1.2.3\n    """\n',
    "README.md": "# jacdiag\n\n[Guide](docs/guide.md#start)\n\n```text\njacdiag 1.2.3\n```\n",
    "docs/guide.md": "Output of jacdiag 1.2.3, with torch 2.6.0.\n",
    "CHANGELOG.md": CHANGELOG,
}


@pytest.fixture
def release(tmp_path: Path) -> Release:
    """Return a tree without fault."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Release(tmp_path, tmp_path / "dist")


def replace(release: Release, name: str, old: str, new: str) -> None:
    """Change a file of the tree."""
    path = release.root / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_tree_without_fault_passes(release: Release) -> None:
    assert release.version == "1.2.3"
    assert release_check.check_versions(release) == []
    assert release_check.check_changelog(release) == []
    assert release_check.check_readme(release) == []


def test_this_tree_names_one_version_everywhere() -> None:
    release = Release(release_check.ROOT, Path("dist"))
    assert release_check.check_versions(release) == []
    assert release_check.check_readme(release) == []


@pytest.mark.parametrize("name", sorted(set(FILES) - {"jacdiag/_version.py", "CHANGELOG.md"}))
def test_a_place_with_another_version_is_named(release: Release, name: str) -> None:
    replace(release, name, "1.2.3", "1.2.2")
    sentence = f"{name} names version 1.2.2, but the package is 1.2.3."
    assert release_check.check_versions(release) == [sentence]


def test_a_place_that_lost_its_version_is_named(release: Release) -> None:
    replace(release, "CITATION.cff", "version: 1.2.3", "title: jacdiag")
    sentence = "CITATION.cff names no version, where 1.2.3 is expected."
    assert release_check.check_versions(release) == [sentence]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("[1.2.3]", "[1.2.4]", "CHANGELOG.md has no section for version 1.2.3."),
        (" - 2026-01-31", " - unreleased", "CHANGELOG.md gives no date for version 1.2.3."),
        ("- Something.", "", "CHANGELOG.md says nothing under version 1.2.3."),
        (
            "[Unreleased]\n",
            "[Unreleased]\n\n- New.\n",
            "CHANGELOG.md has entries under Unreleased that the release would omit.",
        ),
    ],
)
def test_a_fault_of_the_changelog_is_named(
    release: Release, old: str, new: str, sentence: str
) -> None:
    replace(release, "CHANGELOG.md", old, new)
    assert release_check.check_changelog(release) == [sentence]


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("# jacdiag", "jacdiag", "README.md does not begin with a title."),
        ("1.2.3\n```", "1.2.3\n", "README.md has a code block that does not end."),
        ("docs/guide", "docs/gone", "README.md links to docs/gone.md, which does not exist."),
    ],
)
def test_a_fault_of_the_front_page_is_named(
    release: Release, old: str, new: str, sentence: str
) -> None:
    replace(release, "README.md", old, new)
    assert release_check.check_readme(release) == [sentence]


def git(release: Release, *arguments: str) -> None:
    """Run git in the tree."""
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    command = ["git", *identity, *arguments]
    subprocess.run(command, cwd=release.root, check=True, capture_output=True)


def test_changes_and_a_tag_on_another_commit_are_named(release: Release) -> None:
    git(release, "init", "-q")
    git(release, "add", "-A")
    git(release, "commit", "-qm", "one")
    assert release_check.check_tree(release) == []
    git(release, "tag", "v1.2.3")
    assert release_check.check_tree(release) == []

    git(release, "commit", "-qm", "two", "--allow-empty")
    assert release_check.check_tree(release) == ["The tag v1.2.3 exists, but on another commit."]
    git(release, "tag", "-d", "v1.2.3")
    replace(release, "README.md", "Guide", "Book")
    sentence = "The working tree has changes that are not committed, such as README.md."
    assert release_check.check_tree(release) == [sentence]


def test_a_folder_without_git_is_skipped_with_a_reason(
    release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(release.root.parent))
    with pytest.raises(SkipCheck, match="git status failed"):
        release_check.check_tree(release)


def test_missing_and_surplus_files_are_named() -> None:
    tracked = ["README.md", "jacdiag/a.py", "cli/jacdiag_cli/main.py", "jacdiag/page.md"]
    source = {"PKG-INFO", *tracked}
    wheel = {"jacdiag/a.py", "jacdiag_cli/main.py", "jacdiag/page.md", "x.dist-info/RECORD"}
    assert release_check.missing_files(tracked, source, wheel) == []
    assert release_check.surplus_files(tracked, source, wheel) == []

    less = release_check.missing_files(tracked, source - {"README.md"}, wheel - {"jacdiag/page.md"})
    assert less == ["The sdist lacks README.md.", "The wheel lacks jacdiag/page.md."]
    more = release_check.surplus_files(tracked, source | {"key.txt"}, wheel | {"tests/x.py"})
    assert more == [
        "The sdist holds key.txt, which is not in the repository.",
        "The wheel holds tests/x.py, which is not in the repository.",
    ]


def test_the_end_says_what_failed_and_what_was_not_checked(
    release: Release, capsys: pytest.CaptureFixture[str]
) -> None:
    assert release_check.run_checks(release, ["versions", "changelog"]) == 0
    assert capsys.readouterr().out.endswith("\njacdiag 1.2.3 is ready\n")

    assert release_check.run_checks(release, ["versions", "metadata"]) == 0
    output = capsys.readouterr().out
    assert "metadata     skipped: jacdiag-1.2.3-py3-none-any.whl was not built\n" in output
    assert output.endswith("No problem in jacdiag 1.2.3. Not checked: metadata\n")

    replace(release, "CITATION.cff", "1.2.3", "1.2.2")
    assert release_check.run_checks(release, ["versions", "readme"]) == 1
    output = capsys.readouterr().out
    assert "versions     FAILED\n  CITATION.cff names version 1.2.2" in output
    assert output.endswith("\njacdiag 1.2.3 is not ready: versions\n")
