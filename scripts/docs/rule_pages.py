"""The pages of the rules: those that `jacdiag explain` prints, with what the catalog knows."""

from __future__ import annotations

from jacdiag_cli.rules import applies_to

from jacdiag.rules import EVERY
from jacdiag.rules.rule import RuleInfo
from scripts.docs.repository_files import ROOT, RULE_PAGES

GROUPS = {
    "JD1": "The paper's conditions",
    "JD2": "Init",
    "JD3": "Forward pass",
    "JD4": "Backward pass",
    "JD5": "Training",
    "JD9": "The audit itself",
}


def rules_of(group: str) -> list[RuleInfo]:
    """Return the rules whose code begins with "JD1", "JD2" and so on."""
    return [rule for rule in EVERY if rule.code.startswith(group)]


def rule_page(rule: RuleInfo) -> str:
    """Return the page of a rule: its Markdown file, with level and scope under the title."""
    text = (ROOT / RULE_PAGES / f"{rule.code}.md").read_text(encoding="utf-8")
    title, _, body = text.partition("\n")
    facts = f"Highest level: **{rule.level}**. Applies to: {applies_to(rule)}."
    again = f"In the terminal: `jacdiag explain {rule.code}`"
    return f"{title}\n{body.rstrip()}\n\n---\n\n{facts}\n{again}\n"


def rules_table() -> str:
    """Return one table of rules for each group, with links to their pages."""
    parts = []
    for group, title in GROUPS.items():
        rows = [
            f"| [{rule.code}]({rule.code}.md) | {rule.name} | {rule.level} | {rule.summary} |"
            for rule in rules_of(group)
        ]
        head = "| code | name | level | what it says |\n|---|---|---|---|"
        parts.append("\n".join([f"## {title}: {group}xx", "", head, *rows]))
    return "\n\n".join(parts)


def navigation() -> list[dict[str, object]]:
    """Return the groups of rules as entries of the navigation."""
    return [
        {title: [{f"{r.code} {r.name}": f"rules/{r.code}.md"} for r in rules_of(group)]}
        for group, title in GROUPS.items()
    ]
