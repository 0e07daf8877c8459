"""The options that several commands share, with the names and defaults that users depend on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from jacdiag.errors import UsageError
from jacdiag.records.option_ranges import DTYPES, RANGES, REMEDY_CHOICES, STATES

F = TypeVar("F", bound=Callable[..., Any])


class Number(click.FloatRange):
    """A finite number in a range: click's own lets nan through."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return a finite number in the range."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class JsonObject(click.ParamType):
    """A JSON object given as text."""

    name = "json"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, Any]:
        """Return the object; a default may be one already."""
        if isinstance(value, dict):
            return value
        try:
            read = json.loads(value)
        except json.JSONDecodeError as error:
            self.fail(f"{value!r} is no JSON: {error}. Example: '{{\"n_layer\": 4}}'", param, ctx)
        if not isinstance(read, dict):
            self.fail(f"{value!r} is no JSON object. Example: '{{\"n_layer\": 4}}'", param, ctx)
        return read


class Device(click.ParamType):
    """A device as torch names it: its kind, and a number if there are several.

    Any kind will do, because backends bring kinds of their own. Whether the device is there is
    found out when it is used, and the error says what is there.
    """

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the device's name, checked for its form alone."""
        if not re.fullmatch(r"[a-z]\w*(:\d+)?", str(value)):
            self.fail(f"{value!r} is no device. Examples: cpu, cuda, cuda:1", param, ctx)
        return str(value)


class Codes(click.ParamType):
    """Rule codes or their prefixes, comma separated."""

    name = "codes"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Return the codes in capitals, each the beginning of a rule's code."""
        from jacdiag.rules import RULES

        # 1. The codes; nothing stands for none.
        texts = [text.strip().upper() for text in str(value).split(",")]
        codes = tuple(filter(None, texts))

        # 2. Whether a rule begins with each.
        known_codes = [rule.code for rule in RULES]
        for code in codes:
            is_known = any(known_code.startswith(code) for known_code in known_codes)
            if not is_known:
                known = ", ".join(known_codes)
                self.fail(f"no rule begins with {code!r}. The rules are {known}.", param, ctx)
        return codes


def number(name: str) -> click.ParamType:
    """Return the click type of an option that is a number, with its range."""
    limits = RANGES[name]
    is_endless = math.isinf(limits.most)

    # 1. Counts.
    if limits.whole and is_endless:
        return click.IntRange(int(limits.least))
    if limits.whole:
        return click.IntRange(int(limits.least), int(limits.most))

    # 2. Other numbers.
    if is_endless:
        return Number(min=limits.least, min_open=limits.open)
    return Number(min=limits.least, min_open=limits.open, max=limits.most, max_open=limits.open)


SOURCE = [
    click.argument("source"),
    click.option(
        "--model",
        metavar="FACTORY",
        help="Builds the module that the weights of a file or a folder belong to; hf:CONFIG "
        "builds it from a config. "
        "A factory that loads its own weights is a SOURCE itself, with --state trained.",
    ),
    click.option(
        "--model-args",
        type=JsonObject(),
        metavar="JSON",
        help=(
            "Keyword arguments for the factory, or fields of the config of a Hugging Face folder "
            "or of hf:CONFIG."
        ),
    ),
    click.option(
        "--key",
        metavar="NAME",
        help="Which weights to read, if a file holds several sets: ema, model.net.",
    ),
    click.option(
        "--trust-pickle",
        is_flag=True,
        help="Let a file whose pickle holds more than tensors run code.",
    ),
]
PROBE = [
    click.option(
        "--tokens",
        metavar="FILE",
        help="Probe tokens (.npy, .bin in uint16, .pt), or text (.txt, .md, .jsonl) for the "
        "tokenizer in the model's "
        "folder; without one, bytes are ids for a vocabulary of bytes.",
    ),
    click.option(
        "--inputs",
        metavar="FACTORY",
        help="Builds the probe input of a model that takes no token ids.",
    ),
    click.option(
        "--batch",
        type=number("batch"),
        default=2,
        show_default=True,
        help="Sequences of the probe.",
    ),
    click.option(
        "--seq",
        type=number("seq"),
        show_default="128, or what the model allows",
        help="Tokens per sequence.",
    ),
    click.option(
        "--seed",
        type=number("seed"),
        default=0,
        show_default=True,
        help="Of the probe and the solver.",
    ),
    click.option(
        "--device",
        type=Device(),
        show_default="the accelerator if it has float64, else cpu",
        help="Where products run.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default="float32",
        show_default=True,
        help="Precision that products run in.",
    ),
]
REPLAY = [
    click.option(
        "--replay",
        metavar="DIR",
        help="Probe with the batch that a flight recorder kept (flight-STEP), and run all batches "
        "that it kept: was it "
        "the batch, or the weights?",
    ),
]
SOLVER = [
    click.option(
        "--tol",
        type=number("tol"),
        default=0.05,
        show_default=True,
        help="Relative width asked of an interval.",
    ),
    click.option(
        "--confidence",
        type=number("confidence"),
        default=0.999,
        show_default=True,
        help="Probability with which each interval holds, taken for itself.",
    ),
    click.option(
        "--decide/--no-decide",
        default=False,
        help="Stop each sub-layer as soon as its rules are decided.",
    ),
    click.option(
        "--max-products",
        type=number("max_products"),
        default=200,
        show_default=True,
        help="Budget of products with J per norm.",
    ),
]
TOGETHER = [
    click.option(
        "--confidence-all",
        type=number("confidence_all"),
        help="Probability with which all intervals of the report hold together, in place of "
        "--confidence. The chance "
        "of a miss is divided by the number of intervals (Bonferroni), so that each takes more "
        "products.",
    ),
]
PROBES = [
    click.option(
        "--probes",
        type=number("probes"),
        default=1,
        show_default=True,
        help="Repeat the audit on this many probes, other random tokens or the next parts of "
        "--tokens, and report the "
        "smallest and largest estimate of each norm. Each probe costs one more audit. Findings "
        "and verdict are those "
        "of the first.",
    ),
]
JUDGEMENT = [
    click.option(
        "--state",
        type=click.Choice(STATES),
        show_default="detected",
        help="Of the weights: decides which rules apply. Detected: what is built here is fresh; a "
        "file goes by its "
        "step, its optimizer or its name; what is left by the share of matrices that are no draw "
        "of an init. The "
        "header says why.",
    ),
    click.option("--lr", type=number("lr"), help="Plan of the run: learning rate."),
    click.option(
        "--warmup",
        type=number("warmup"),
        help="Plan of the run: warm-up steps; nothing without --lr.",
    ),
    click.option(
        "--clip",
        type=number("clip"),
        help=(
            "Plan of the run: gradient norm clipped at; JD105 gives no chance for one that was "
            "not run."
        ),
    ),
    click.option(
        "--beta2",
        type=number("beta2"),
        help="Plan of the run: Adam's beta2; JD105 gives no chance for one that was not run.",
    ),
    click.option(
        "--risk",
        metavar="FILE",
        help="Curves of the chance at --lr, from `jacdiag backtest --write-risk`.",
    ),
    click.option(
        "--profile",
        default="default",
        show_default=True,
        metavar="NAME",
        help="default, paper (the paper's conditions as errors), or one from the configuration.",
    ),
    click.option(
        "--select",
        type=Codes(),
        multiple=True,
        metavar="CODES",
        help="Only these rules or prefixes.",
    ),
    click.option(
        "--ignore",
        type=Codes(),
        multiple=True,
        metavar="CODES",
        help="Not these rules or prefixes.",
    ),
    click.option(
        "--contract",
        metavar="FILE",
        help="Pinned init contract: TOML, role or name pattern = formula.",
    ),
    click.option(
        "--fail-on",
        type=click.Choice(["info", "warning", "error", "never"]),
        default="error",
        show_default=True,
        help="Exit with 1 at a finding of this level or above.",
    ),
]
AGAINST = [
    click.option(
        "--against",
        metavar="EARLIER",
        help="Compare with an earlier checkpoint of the same model, measured with the same probe, "
        "or with its JSON "
        "report.",
    ),
]
OUTPUT = [
    click.option(
        "--format",
        "output_format",
        type=click.Choice(["pretty", "json", "markdown", "github", "sarif", "junit"]),
        default="pretty",
        show_default=True,
        help="Of what is printed.",
    ),
    click.option(
        "--json",
        "json_file",
        metavar="FILE",
        help="Write the JSON report too; - is stdout, and the table then goes to stderr.",
    ),
    click.option(
        "--plot",
        "plot_file",
        metavar="FILE",
        help="Write the picture too: .png, .svg or .pdf; - is stdout, as PNG.",
    ),
    click.option(
        "--html",
        "html_file",
        metavar="FILE",
        help="Write the report as one page for a browser too: .html; - is stdout.",
    ),
    click.option("--all", "all_rows", is_flag=True, help="Show every sub-layer of a long model."),
    click.option(
        "--sort",
        type=click.Choice(["depth", "worst"]),
        default="depth",
        show_default=True,
        help="Order of the rows.",
    ),
]


_WAYS = [choice for choice in REMEDY_CHOICES if choice != "none"]


def remedies(default: str) -> list[Callable[[F], F]]:
    """Return the options on remedies; a gate tries none by default."""
    return [
        click.option(
            "--remedies",
            type=click.Choice([*_WAYS, "none"]),
            default=default,
            show_default=True,
            help="What to try on copies of a model with findings: up to the first change "
            "that is enough, every one, those that a run that has begun can take, or none.",
        ),
        click.option(
            "--patch",
            "patch_file",
            metavar="FILE",
            help="Write the remedies, with the change as code: .md; - is stdout.",
        ),
    ]


GATE = [
    click.option(
        "--seeds",
        type=number("seeds"),
        default=3,
        show_default=True,
        help="How many initialisations.",
    ),
    click.option(
        "--budget",
        type=number("budget"),
        metavar="SECONDS",
        help="Stop, undecided, after this time.",
    ),
    click.option("--baseline", metavar="FILE", help="Recorded figures to compare with."),
    click.option(
        "--write-baseline",
        is_flag=True,
        help="Write the baseline instead of comparing with it; with --baseline - to stdout.",
    ),
    click.option(
        "--contract-only", is_flag=True, help="The init contract alone, tensor by tensor."
    ),
]
DECIDING = click.option(
    "--decide/--no-decide",
    default=True,
    show_default=True,
    help="Stop each sub-layer as soon as its rules are decided (without a baseline).",
)


def confidences(context: click.Context) -> dict[str, Any]:
    """Return --confidence and --confidence-all, of which at most one is given; the other is None.

    One on the command line wins over the other in the configuration.

    Raises:
        UsageError: both are given in the same place.
    """
    each, together = context.params["confidence"], context.params["confidence_all"]

    # 1. Where each value comes from.
    each_source = context.get_parameter_source("confidence")
    together_source = context.get_parameter_source("confidence_all")
    has_each = each_source is not ParameterSource.DEFAULT
    has_together = together_source is not ParameterSource.DEFAULT

    # 2. Of two values, the one on the command line counts.
    if has_each and has_together:
        if each_source is together_source:
            raise _both_confidences(each, together)
        has_each = each_source is ParameterSource.COMMANDLINE
        has_together = together_source is ParameterSource.COMMANDLINE

    # 3. What is not given is None.
    if not has_each:
        each = None
    if not has_together:
        together = None
    return {"confidence": each, "confidence_all": together}


def _both_confidences(confidence: float, confidence_all: float) -> UsageError:
    """Return the error of two confidences in the same place."""
    return UsageError(
        "the confidence is given twice",
        got=f"--confidence {confidence:g} and --confidence-all {confidence_all:g}",
        hint=(
            "give one: --confidence is said of each interval, --confidence-all of all of "
            "them together"
        ),
    )


def add(*groups: list[Callable[[F], F]]) -> Callable[[F], F]:
    """Return a decorator that gives a command groups of options, in reading order."""
    options = list(chain.from_iterable(groups))

    def decorate(function: F) -> F:
        # Of decorators the last one is applied first.
        for option in reversed(options):
            function = option(function)
        return function

    return decorate
