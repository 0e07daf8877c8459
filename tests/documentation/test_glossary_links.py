"""The site links terms of the glossary and codes of rules, each at its first use on a page."""

from __future__ import annotations

import pytest

from scripts.docs.glossary import GLOSSARY, Term, all_terms, link_terms, terms_of
from scripts.docs.repository_files import ROOT

TERMS = terms_of(
    "## Probe\n\nThe input.\n\n## Branch norm\n\n*Also: branch gain.*\n\nA norm.\n\n"
    "## Residual branch\n\n*Also: branch.*\n\nA function.\n"
)


def linked(target: str, words: str) -> str:
    """Return a link as the site has it."""
    return f'<a class="term" href="{target}">{words}</a>'


def test_a_term_is_linked_once_whatever_its_case_and_number() -> None:
    html = link_terms("<p>Probes cost time. A probe is an input.</p>", TERMS)
    link = linked("glossary.html#probe", "Probes")
    assert html == f"<p>{link} cost time. A probe is an input.</p>"


def test_the_longest_term_at_a_place_is_linked() -> None:
    html = link_terms("<p>The branch norm of a branch</p>", TERMS)
    assert linked("glossary.html#branch-norm", "branch norm") in html
    assert f"of a {linked('glossary.html#residual-branch', 'branch')}" in html


def test_a_term_that_a_line_end_divides_is_linked() -> None:
    html = link_terms("<p>the branch\nnorm</p>", TERMS)
    assert linked("glossary.html#branch-norm", "branch\nnorm") in html


@pytest.mark.parametrize(
    "html",
    [
        "<h2>Probe</h2>",
        "<pre><span>probe</span></pre>",
        "<p><code>probe</code></p>",
        '<p><a href="x.html">the <em>probe</em></a></p>',
        '<p><img alt="probe" src="x.png"></p>',
        "<p>a probe-like input, probed, unprobe</p>",
        "<!-- probe -->",
    ],
)
def test_headings_code_links_and_parts_of_words_stay(html: str) -> None:
    assert link_terms(html, TERMS) == html


def test_a_use_after_code_is_the_first_one() -> None:
    html = link_terms("<p><code>probe<br>x</code> is a probe</p>", TERMS)
    assert html.endswith(f"is a {linked('glossary.html#probe', 'probe')}</p>")


def test_a_page_in_a_folder_links_upward_and_none_links_to_itself() -> None:
    assert 'href="../glossary.html#probe"' in link_terms("<p>probe</p>", TERMS, "../", "a/b.html")
    assert link_terms("<p>probe</p>", TERMS, "", "glossary.html") == "<p>probe</p>"


def test_codes_of_rules_are_linked() -> None:
    html = link_terms("<p>JD102, JD102 and JD1xx</p>", all_terms(), "../", "how-to/a.html")
    assert html.count("<a ") == 1
    assert linked("../rules/JD102.html", "JD102") in html


def test_every_entry_of_the_glossary_is_a_term_with_a_definition() -> None:
    text = (ROOT / GLOSSARY).read_text(encoding="utf-8")
    terms = terms_of(text)
    assert [f"## {term.words[0]}" for term in terms] == [
        line for line in text.splitlines() if line.startswith("## ")
    ]
    assert len({term.target for term in terms}) == len(terms)
    words = [word.lower() for term in terms for word in term.words]
    assert len(set(words)) == len(words), "a word has one entry"
    for part in text.split("\n## ")[1:]:
        lines = [line for line in part.splitlines()[1:] if line and not line.startswith("*Also")]
        assert len(" ".join(lines).split()) >= 4


def test_a_term_knows_its_words() -> None:
    assert TERMS[1] == Term(("Branch norm", "branch gain"), "glossary.html#branch-norm")
