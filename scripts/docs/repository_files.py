"""Where a file of the repository stands on the site, and the links between such files.

Pages are written for both: a link such as `../benchmarks/results/coverage.md` works in the
repository. On the site the same file has another place, so the build rewrites the link.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
RULE_PAGES = "jacdiag/rules/pages"

# Files that have a place of their own on the site. The others are in `repository/`.
PLACES = {
    "README.md": "index.md",
    "AGENTS.md": "project/coding-agents.md",
    "llms.txt": "llms.txt",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "SECURITY.md": "project/security.md",
    "jacdiag/records/report.schema.json": "reference/report.schema.json",
    ".pre-commit-hooks.yaml": "repository/pre-commit-hooks.yaml",  # mkdocs leaves dotfiles out
}
FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})")
_CODE_SPAN = r"`[^`\n]*`"
_LINK = re.compile(rf"{_CODE_SPAN}|(?<=\])\(([^)\s]+)\)")
_ELSEWHERE = re.compile(r"^(?:[a-z][a-z0-9+.-]*:|#|/)", re.IGNORECASE)


def site_path(repository_path: str) -> str:
    """Return where a file of the repository stands on the site, relative to its root.

    >>> site_path("docs/glossary.md"), site_path("benchmarks/results/coverage.md")
    ('glossary.md', 'repository/benchmarks/results/coverage.md')
    """
    if repository_path in PLACES:
        return PLACES[repository_path]
    folder, name = posixpath.split(repository_path)
    if folder == RULE_PAGES:
        return f"rules/{name}"
    if repository_path.startswith("docs/"):
        return repository_path.removeprefix("docs/")
    return f"repository/{repository_path}"


def repository_path(site: str) -> str:
    """Return the file of the repository that a page of the site was made from."""
    for path, place in PLACES.items():
        if site == place:
            return path
    if re.fullmatch(r"rules/JD\d+\.md", site):
        return f"{RULE_PAGES}/{posixpath.basename(site)}"
    if site.startswith("repository/"):
        return site.removeprefix("repository/")
    return f"docs/{site}"


def target_of(link: str, page: str) -> tuple[str, str]:
    """Return the file of the repository that a relative link leads to, and its anchor.

    Args:
        link: as it stands in the page, such as `../README.md#install`.
        page: that it stands in, relative to the repository.
    """
    path, _, anchor = link.partition("#")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(page), path))
    is_folder_with_page = (ROOT / target).is_dir() and (ROOT / target / "README.md").is_file()
    if is_folder_with_page:
        target = f"{target}/README.md"
    return target, anchor


def replace_links(markdown: str, replace: Callable[[str], str]) -> str:
    """Return a page with each relative link replaced. Code is left alone.

    Args:
        markdown: the page.
        replace: from the link as written to the link that takes its place.
    """
    lines = []
    fence = ""
    for line in markdown.splitlines():
        opening = FENCE.match(line)
        if fence:
            is_end = opening is not None and line.strip().startswith(fence)
            fence = "" if is_end and line.strip().strip("`~") == "" else fence
        elif opening is not None:
            fence = opening[1]
        else:
            line = _LINK.sub(lambda match: _replaced(match, replace), line)
        lines.append(line)
    return "\n".join(lines) + "\n"


def _replaced(match: re.Match[str], replace: Callable[[str], str]) -> str:
    """Return what takes the place of a link, or of a piece of code, in a line."""
    link = match[1]
    if link is None or _ELSEWHERE.match(link):
        return match[0]
    return f"({replace(link)})"


def relative_links(markdown: str) -> list[str]:
    """Return the relative links of a page, as written."""
    links: list[str] = []

    def collect(link: str) -> str:
        links.append(link)
        return link

    replace_links(markdown, collect)
    return links


def on_the_site(markdown: str, page: str) -> str:
    """Return a page of the repository with its links as the site needs them.

    Args:
        markdown: the page.
        page: its path, relative to the repository.
    """
    here = posixpath.dirname(site_path(page)) or "."

    def replace(link: str) -> str:
        target, anchor = target_of(link, page)
        path = posixpath.relpath(site_path(target), here)
        return f"{path}#{anchor}" if anchor else path

    return replace_links(markdown, replace)


def linked_files(pages: list[str]) -> list[str]:
    """Return the files outside of `docs/` that pages link to, and that those link to.

    Args:
        pages: paths relative to the repository.
    """
    files: list[str] = []
    waiting = list(pages)
    while waiting:
        page = waiting.pop()
        for link in relative_links((ROOT / page).read_text(encoding="utf-8")):
            target, _ = target_of(link, page)
            is_new = not target.startswith("docs/") and target not in [*files, *pages]
            if is_new and (ROOT / target).is_file():
                files.append(target)
                if target.endswith(".md"):
                    waiting.append(target)
    return sorted(files)
