"""What `make docs` adds to the pages in `docs/`: hooks that mkdocs calls (see mkdocs.yml)."""

from __future__ import annotations

import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
for folder in (str(ROOT), str(ROOT / "cli")):
    if folder not in sys.path:
        sys.path.insert(0, folder)

from scripts.docs import (  # noqa: E402
    check_site,
    generated,
    glossary,
    llms_text,
    repository_files,
    rule_pages,
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the rules and the commands to the navigation."""
    for entry in config.nav:
        if "Rules" in entry:
            entry["Rules"] += rule_pages.navigation()
        for part in entry.get("Reference", []):
            if isinstance(part, dict) and "Command line" in part:
                part["Command line"] += generated.command_navigation()
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here, and the files of the repository that pages link to."""
    # 1. Pages that come from the code.
    for path, text in generated.pages().items():
        files.append(File.generated(config, path, content=text))

    # 2. Files of the repository.
    for path in generated.repository_pages():
        place = repository_files.site_path(path)
        if path == llms_text.LLMS_TEXT:
            files.append(File.generated(config, place, content=llms_text.llms_text()))
        else:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the tables that come from the code, and make links and notes those of the site."""
    place = page.file.src_uri
    if place.startswith("repository/"):
        page.meta.setdefault("search", {"exclude": True})
    if place in generated.pages():
        return markdown
    text = repository_files.on_the_site(markdown, repository_files.repository_path(place))
    return generated.with_notes_on_code(generated.filled(text))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Link the terms of the glossary and the codes of the rules, each at its first use."""
    depth = page.url.count("/")
    return glossary.link_terms(html, glossary.all_terms(), "../" * depth, page.url)


def on_post_build(config: MkDocsConfig) -> None:
    """Check what was built."""
    # The map of the site for search engines names no address that exists.
    folder = Path(config.site_dir)
    for name in ("sitemap.xml", "sitemap.xml.gz"):
        (folder / name).unlink(missing_ok=True)

    wrong = check_site.problems(folder)
    if wrong:
        raise PluginError("\n".join(wrong))
