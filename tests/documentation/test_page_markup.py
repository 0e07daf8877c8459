"""What the site makes of a page: notes on code blocks, and option tables in words."""

from __future__ import annotations

import click
import pytest

from scripts.docs.command_pages import command_page, limits
from scripts.docs.generated import with_notes_on_code


def test_reason_of_a_block_that_is_not_run_is_shown() -> None:
    page = with_notes_on_code("<!-- not run: it needs a cluster -->\n```bash\nsbatch a.sh\n```\n")
    assert page.startswith("Not run by the tests: it needs a cluster.\n{ .not-run }\n\n```bash\n")


def test_block_that_is_a_file_has_its_name_as_title() -> None:
    page = with_notes_on_code("<!-- file: train.py -->\n```python\npass\n```\n")
    assert page == '```python title="train.py"\npass\n```\n'


def test_other_blocks_and_comments_stay() -> None:
    page = "<!-- a comment -->\n```python\npass\n```\n"
    assert with_notes_on_code(page) == page


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (click.IntRange(min=1), "At least 1"),
        (click.IntRange(0, 2**62), "At least 0"),
        (click.IntRange(max=9), "At most 9"),
        (click.IntRange(2, 9), "From 2 to 9"),
        (click.FloatRange(0, min_open=True), "Above 0"),
        (click.FloatRange(0, 1, min_open=True, max_open=True), "Between 0 and 1"),
    ],
)
def test_limits_of_a_value_are_words(values: click.IntRange | click.FloatRange, words: str) -> None:
    assert limits(values) == words


def test_options_in_help_texts_are_code() -> None:
    page = command_page("audit")
    assert "findings at or above `--fail-on`" in page
    assert "``" not in page.replace("```", "")
    assert "&lt;=x" not in page
