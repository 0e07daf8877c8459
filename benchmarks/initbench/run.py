"""InitBench: how many init bugs of public trackers are found and located, and how many correct
inits are blamed.

    python -m benchmarks.initbench.run [CASE ...]

Each bug is rebuilt as a pair of models. A bug is found if the audit of the model with the bug has a
finding at warning or above that the mended model has not. It is located if the findings name the
right tensors and no other. A false alarm is a finding at warning or above on a mended model or on a
published recipe. JD101 to JD103 are conditions of a paper that a correct init may truly miss, and
JD901, JD902 and JD904 say that an audit is not complete: these are counted apart.

Without names it writes results/initbench.json and results/initbench.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tomllib
import warnings
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

# At the end, so that a jacdiag of PYTHONPATH comes first.
sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.initbench.catalogue import BUGS, RECIPES, SOURCES, load_cases
from benchmarks.initbench.judge import BugOutcome, RecipeOutcome, Remark, judge_bug, judge_recipe

RESULTS = Path(__file__).parents[1] / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help="names of cases; all of them if none is given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    load_cases()
    start = time.perf_counter()

    # 1. Pairs with a bug.
    bugs = []
    for name, case in BUGS.items():
        if not options.cases or name in options.cases:
            bugs.append(judge_bug(case, options.seed))
            print(line_of_bug(bugs[-1]), flush=True)

    # 2. Correct inits.
    recipes = []
    for name, recipe in RECIPES.items():
        if not options.cases or name in options.cases:
            recipes.append(judge_recipe(recipe, options.seed))
            print(line_of_recipe(recipes[-1]), flush=True)

    # 3. The sum.
    result = summary(bugs, recipes) | {
        "seconds": round(time.perf_counter() - start),
        "seed": options.seed,
    }
    print_summary(result)
    if not options.cases:
        write_results(options.out, result, bugs, recipes)


def line_of_bug(outcome: BugOutcome) -> str:
    """Return one line for a pair, with the details of what went wrong."""
    verdict = "located" if outcome.located else "found" if outcome.found else "MISSED"
    details = [f"{verdict:8s} {outcome.name}"]
    if outcome.found and not outcome.located:
        details.append(f"missing {shorten(outcome.missing)}, wrong {shorten(outcome.wrong)}")
        details.append(codes_of(outcome.remarks))
    if outcome.alarms:
        details.append(f"FALSE ALARM on the mended model: {codes_of(outcome.alarms)}")
    return "; ".join(details)


def line_of_recipe(outcome: RecipeOutcome) -> str:
    """Return one line for a correct init."""
    if outcome.alarms:
        return f"ALARM    {outcome.name}; {codes_of(outcome.alarms)}"
    return f"clean    {outcome.name}"


def codes_of(remarks: list[Remark]) -> str:
    """Return the codes of findings and the first name of each."""
    return (
        ", ".join(f"{remark.code} {shorten(list(remark.named))}" for remark in remarks) or "nothing"
    )


def shorten(names: list[str]) -> str:
    """Return the first two names and the number of the others."""
    more = f" +{len(names) - 2}" if len(names) > 2 else ""
    return "[" + ", ".join(names[:2]) + more + "]"


def summary(bugs: list[BugOutcome], recipes: list[RecipeOutcome]) -> dict[str, Any]:
    """Return the counts of a run."""
    return {
        "bugs": len(bugs),
        "found": sum(outcome.found for outcome in bugs),
        "located": sum(outcome.located for outcome in bugs),
        "mended_alarmed": sum(bool(outcome.alarms) for outcome in bugs),
        "recipes": len(recipes),
        "recipes_alarmed": sum(bool(outcome.alarms) for outcome in recipes),
        "apart": dict(Counter(code for outcome in [*bugs, *recipes] for code in outcome.apart)),
    }


def print_summary(result: dict[str, Any]) -> None:
    """Print the three numbers of the benchmark."""
    print(
        f"found {result['found']} of {result['bugs']}, located {result['located']} of "
        f"{result['bugs']}"
    )
    print(
        f"false alarms: {result['recipes_alarmed']} of {result['recipes']} published recipes, "
        f"{result['mended_alarmed']} of {result['bugs']} mended models"
    )
    print(f"counted apart, correct models with {counts_of(result)}")
    print(f"{result['seconds']} s")


def counts_of(result: dict[str, Any]) -> str:
    """Return the codes that are counted apart and how many correct models have them."""
    return ", ".join(f"{code} {count}" for code, count in sorted(result["apart"].items())) or "none"


def write_results(
    out: Path, result: dict[str, Any], bugs: list[BugOutcome], recipes: list[RecipeOutcome]
) -> None:
    """Write the results as JSON and as a page."""
    out.mkdir(exist_ok=True)
    details = {
        "bugs": [asdict(outcome) for outcome in bugs],
        "recipes": [asdict(outcome) for outcome in recipes],
    }
    text = json.dumps({"summary": result, **details}, indent=1)
    (out / "initbench.json").write_text(text + "\n", encoding="utf-8")
    (out / "initbench.md").write_text(page_of(result, bugs, recipes), encoding="utf-8")


def page_of(result: dict[str, Any], bugs: list[BugOutcome], recipes: list[RecipeOutcome]) -> str:
    """Return the page with every case, its verdict and its source."""
    undecidable = tomllib.loads(SOURCES.read_text(encoding="utf-8"))["undecidable"]
    lines = [
        "# InitBench",
        "",
        "Init bugs of public trackers, each rebuilt as a pair of small models, and correct inits "
        "of published",
        "recipes. The audit runs with its default options on a model that was just built.",
        "",
        "| | count | of |",
        "|---|---|---|",
        f"| bugs found | {result['found']} | {result['bugs']} |",
        f"| bugs located: the right tensors and no other | {result['located']} | {result['bugs']} "
        "|",
        f"| false alarms on published recipes | {result['recipes_alarmed']} | {result['recipes']} "
        "|",
        f"| false alarms on mended models | {result['mended_alarmed']} | {result['bugs']} |",
        "",
        "JD101 to JD103 are a paper's conditions on norms of sub-layers. A correct init may truly "
        "miss them, so",
        "they are no false alarm here. JD901, JD902 and JD904 say that an audit is not complete. "
        "Correct models",
        f"with these codes: {counts_of(result)}.",
        "",
        "The models have 3 to 4 layers and a width of 64. The size of a bug is that of its "
        "source: a factor that",
        "the source states, or the default that was left in place. No size was chosen by what the "
        "audit can see.",
        "",
        "## Bugs",
        "",
        "| case | kind | found | located | source |",
        "|---|---|---|---|---|",
    ]
    for outcome in bugs:
        verdicts = f"{mark(outcome.found)} | {mark(outcome.located)}"
        lines.append(
            f"| {outcome.name} | {outcome.kind} | {verdicts} | "
            f"{link_to(BUGS[outcome.name].source.url)} |"
        )
    lines += [
        "",
        "## Published recipes",
        "",
        "| case | alarms | apart | source |",
        "|---|---|---|---|",
    ]
    for recipe in recipes:
        codes = ", ".join(sorted({remark.code for remark in recipe.alarms})) or "none"
        apart = ", ".join(recipe.apart)
        lines.append(
            f"| {recipe.name} | {codes} | {apart} | {link_to(RECIPES[recipe.name].source.url)} |"
        )
    lines += ["", "## Bugs that do not count", ""]
    lines.append("These were real, and neither the weights nor the report can show them at init.")
    lines += ["", "| case | why | source |", "|---|---|---|"]
    for name, entry in undecidable.items():
        lines.append(f"| {name} | {entry['why']} | {link_to(entry['url'])} |")
    return "\n".join(lines) + "\n"


def mark(is_true: bool) -> str:
    """Return yes or no."""
    return "yes" if is_true else "**no**"


def link_to(url: str) -> str:
    """Return a short link to a source."""
    text = url.removeprefix("https://github.com/").replace("/issues/", "#").replace("/pull/", "#")
    return f"[{text}]({url})"


if __name__ == "__main__":
    main()
