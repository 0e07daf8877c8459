"""Every part of the site that comes from the code: whole pages, and tables within pages."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

from scripts.docs import command_pages, record_tables, rule_pages
from scripts.docs.repository_files import PLACES, ROOT, linked_files

# A line of its own in a page: the part that is put in its place.
MARKER = re.compile(r"^<!-- generated: (.+) -->$", re.MULTILINE)
# What stands before a code block for the tests, and is shown to readers as well.
_NOT_RUN = re.compile(r"^( *)<!-- not run: (.+) -->\n", re.MULTILINE)
_FILE = re.compile(r"^( *)<!-- file: (\S+) -->\n *(`{3,}\w+)$", re.MULTILINE)
PARTS: dict[str, Callable[[], str]] = {
    "rules": rule_pages.rules_table,
    "commands": command_pages.commands_table,
    "configuration options": record_tables.configuration_options,
    "thresholds": record_tables.thresholds,
    "report fields": record_tables.report_fields,
}


@cache
def pages() -> dict[str, str]:
    """Return the pages that come from the code: path on the site -> Markdown."""
    texts = {}
    for rule in rule_pages.EVERY:
        texts[f"rules/{rule.code}.md"] = rule_pages.rule_page(rule)
    for name in command_pages.commands():
        texts[f"reference/cli/{name}.md"] = command_pages.command_page(name)
    return texts


def docs_pages() -> list[str]:
    """Return the pages in `docs/`, relative to the repository."""
    return sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))


@cache
def repository_pages() -> list[str]:
    """Return the files outside of `docs/` that are on the site, without the pages of the rules."""
    with_a_place = [path for path in PLACES if path.endswith(".md")]
    linked = linked_files([*docs_pages(), *with_a_place])
    files = {*PLACES, *linked}
    return sorted(path for path in files if not path.startswith(rule_pages.RULE_PAGES))


def filled(markdown: str) -> str:
    """Return a page with each marker replaced by its part."""
    return MARKER.sub(lambda match: PARTS[match[1]](), markdown)


def with_notes_on_code(markdown: str) -> str:
    """Return a page that says which code blocks no test runs, and which ones are files.

    >>> print(with_notes_on_code("<!-- file: a.py -->\\n```python\\npass\\n```"))
    ```python title="a.py"
    pass
    ```
    """
    text = _NOT_RUN.sub(r"\1Not run by the tests: \2.\n\1{ .not-run }\n\n", markdown)
    return _FILE.sub(r'\1\3 title="\2"', text)


def command_navigation() -> list[dict[str, str]]:
    """Return the commands as entries of the navigation."""
    return [{f"jacdiag {name}": f"reference/cli/{name}.md"} for name in command_pages.commands()]
