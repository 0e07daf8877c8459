"""The options of an audit: one record, checked when it is made, that every step reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn

from jacdiag.distributed import Ranks
from jacdiag.errors import UsageError
from jacdiag.records import FiguresRecord, Plan, Report
from jacdiag.records.option_ranges import DTYPES, REMEDY_CHOICES, STATES, check_ranges
from jacdiag.rules import checked_contract
from jacdiag.sources import Source
from jacdiag.sources.probe import check_one_probe
from jacdiag.sources.python_source import kind_of, path_text
from jacdiag.trace import Declaration
from jacdiag.trace.discovery.declarations import declarations

DEFAULT_CONFIDENCE = 0.999  # of each interval by itself

# Whatever a model can be opened from.
ModelSource = str | bytes | os.PathLike[str] | nn.Module | Callable[..., nn.Module] | Source

_NEVER_NONE = ("batch", "seed", "tol", "max_products", "probes")

# What may differ between the ranks that share an audit: where a rank runs, how it reports its
# progress, and what is compared in another way (the weights and the probe, to the bit).
_MAY_DIFFER_BY_RANK = (
    "model",
    "model_args",
    "key",
    "inputs",
    "tokens",
    "input_factory",
    "device",
    "progress",
    "ranks",
    "optimizer",
    "remedies",
    "baseline",
    "against",
    "replay",
)


class Progress(Protocol):
    """A display of the progress of a long audit."""

    def start(self, total: float, text: str) -> None:
        """Show a display of `total` units of work."""

    def advance(self, units: float, text: str) -> None:
        """Add units of work that were done, and say on what."""

    def stop(self) -> None:
        """Take the display away."""


@runtime_checkable
class FirstLookProgress(Progress, Protocol):
    """A display that also shows what is known before every norm is measured to its width."""

    def show_first_look(self, report: Report) -> None:
        """Show a judged report that is not complete: its norms are wide, or not measured yet."""


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """Options of an audit, complete and checked.

    The fields are the keyword arguments of `jacdiag.audit`, which describes each of them, with the
    same names and defaults. A record that exists is valid. `dataclasses.replace` checks again.

    After the check, some fields hold one form of what may be passed in several: paths and the
    device are text, `dtype` is its name, `select`, `ignore` and `declared` are tuples, `contract`
    maps text to text. `confidence` is None only if `confidence_all` is given.

    Raises:
        UsageError: an option has a wrong type or value, or two options contradict each other.

    Example:
        >>> options = AuditOptions(seq=16, dtype=torch.float64, select="JD1,JD2")
        >>> options.dtype, options.select, options.confidence
        ('float64', ('JD1', 'JD2'), 0.999)
        >>> AuditOptions(tol=0)
        Traceback (most recent call last):
        ...
        jacdiag.errors.UsageError: tol cannot be 0
        a number above 0
    """

    # How the source is opened.
    model: str | os.PathLike[str] | Callable[..., nn.Module] | None = None
    model_args: dict[str, Any] | None = None
    key: str | None = None
    trust_pickle: bool = False

    # The probe that the model runs on.
    inputs: Any = None
    tokens: str | os.PathLike[str] | None = None
    input_factory: str | os.PathLike[str] | Callable[..., Any] | None = None
    replay: str | os.PathLike[str] | None = None
    batch: int = 2
    seq: int | None = None
    seed: int = 0
    probes: int = 1

    # What is measured, where, and how precisely.
    device: str | torch.device | None = None
    dtype: Literal["float32", "float64"] | torch.dtype = "float32"
    products: bool = True
    tol: float = 0.05
    confidence: float | None = None
    confidence_all: float | None = None
    decide: bool = False
    max_products: int = 200
    declared: Iterable[Declaration] | Mapping[str, Any] = ()

    # What is known of the run.
    state: Literal["init", "trained"] | None = None
    optimizer: Any = None
    lr: float | None = None
    warmup: int | None = None
    clip: float | None = None
    beta2: float | None = None

    # How the report is judged.
    profile: str | Mapping[str, Any] = "default"
    select: Iterable[str] = ()
    ignore: Iterable[str] = ()
    thresholds: Mapping[str, Any] | None = None
    risk: str | os.PathLike[str] | None = None
    contract: Mapping[str, Any] | None = None
    baseline: FiguresRecord | None = None
    against: ModelSource | Report | None = None
    remedies: Literal["none", "first", "all", "begun"] = "none"

    # Who does the work, and who watches.
    ranks: Ranks | bool = False
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Check every option and bring it into one form."""
        # 1. Types, and one form for what may be written in several.
        _check_types(self)
        self._set(
            device=None if self.device is None else str(self.device),
            tokens=None if self.tokens is None else path_text(self.tokens),
            replay=None if self.replay is None else path_text(self.replay),
            select=codes_of("select", self.select),
            ignore=codes_of("ignore", self.ignore),
            dtype=_dtype_name(self.dtype),
        )

        # 2. Ranges of numbers.
        check_ranges(
            tol=self.tol,
            confidence=self.confidence,
            confidence_all=self.confidence_all,
            max_products=self.max_products,
            batch=self.batch,
            seq=self.seq,
            seed=self.seed,
            probes=self.probes,
            lr=self.lr,
            warmup=self.warmup,
            clip=self.clip,
            beta2=self.beta2,
        )
        self._set(seed=int(self.seed), probes=int(self.probes))

        # 3. Options that exclude each other.
        _check_combinations(self)

        # 4. Defaults and tables.
        if self.confidence_all is None and self.confidence is None:
            self._set(confidence=DEFAULT_CONFIDENCE)
        self._set(
            declared=tuple(declarations(self.declared)), contract=checked_contract(self.contract)
        )

    def _set(self, **values: Any) -> None:
        """Set fields of this frozen record while it is being made."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def plan(self) -> Plan:
        """The plan of the run."""
        return Plan(self.lr, self.warmup, self.clip, self.beta2)

    @property
    def precision(self) -> torch.dtype:
        """The dtype that products run in."""
        dtype: torch.dtype = getattr(torch, str(self.dtype))
        return dtype

    def split_level(self) -> tuple[float, float]:
        """Return the family-wise confidence of the model's own intervals, and that of all remedies.

        The chance of a miss is shared equally between the two. Without remedies the model has all
        of it.
        """
        assert self.confidence_all is not None
        if self.remedies == "none":
            return self.confidence_all, 1.0
        half = (1.0 + self.confidence_all) / 2
        return half, half

    def shared_by_ranks(self) -> dict[str, Any]:
        """Return the options that must be the same on every rank."""
        names = [field.name for field in fields(self) if field.name not in _MAY_DIFFER_BY_RANK]
        return {name: getattr(self, name) for name in names}


def codes_of(name: str, codes: Any) -> tuple[str, ...]:
    """Return rule codes or prefixes as a tuple.

    Args:
        name: of the option, for messages.
        codes: a list of codes, or text: one code, or several with commas.

    Raises:
        UsageError: something else was passed.

    Example:
        >>> codes_of("select", "JD1,JD2"), codes_of("select", ["JD1"])
        (('JD1', 'JD2'), ('JD1',))
    """
    what = f"{name} is a list of rule codes"
    hint = f'{name}=["JD1"]'

    # 1. Text is split at its commas; empty pieces count for nothing.
    if isinstance(codes, str):
        pieces = [piece.strip() for piece in codes.split(",")]
        codes = [piece for piece in pieces if piece]

    # 2. Whatever was passed, each code must be text.
    if not isinstance(codes, Iterable):
        raise UsageError(what, got=kind_of(codes), hint=hint)
    codes = tuple(codes)
    for code in codes:
        if not isinstance(code, str):
            raise UsageError(what, got=repr(code), hint=hint)
    return codes


def _check_types(options: AuditOptions) -> None:
    """Raise unless every option has a type that it may have."""
    # 1. Those that cannot be left open.
    for name in _NEVER_NONE:
        if getattr(options, name) is None:
            raise UsageError(f"{name} cannot be None", hint="leave it out for its default")

    def check(name: str, kinds: Any, expected: str, *, optional: bool = True) -> None:
        """Raise if an option is of none of these types."""
        value = getattr(options, name)
        is_left_open = value is None and optional
        if is_left_open:
            return
        if not isinstance(value, kinds):
            raise UsageError(f"{name} is of the wrong type", got=kind_of(value), hint=expected)

    # 2. Those with a type or a list of values of their own.
    check("key", str, "the dotted path of the weights in the file, as text")
    check("tokens", str | bytes | os.PathLike, "a path, as text or a pathlib.Path")
    if options.state is not None and options.state not in STATES:
        hint = f"one of {', '.join(STATES)}, or None"
        raise UsageError(f"state cannot be {options.state!r}", hint=hint)

    # 3. All others.
    check("device", str | torch.device, "a device by name, such as 'cpu' or 'cuda:1'")
    check("dtype", str | torch.dtype, "'float32' or 'float64'")
    check("remedies", str, "a way by name, such as 'first'", optional=False)
    check("profile", str | Mapping, "a profile by name, or a table of levels", optional=False)
    check("model_args", dict, "a dict of keyword arguments")
    check("baseline", FiguresRecord, "what jacdiag.gate.read_baseline(FILE) returns")
    check("contract", Mapping, "a dict, role or name pattern -> formula")
    check("declared", Iterable, "a list of jacdiag.declare(...)", optional=False)
    _check_progress(options.progress)
    _check_optimizer(options.optimizer)


def _check_progress(progress: Any) -> None:
    """Raise unless a display of progress has the three methods that are called."""
    if progress is None:
        return

    # Any object with these methods will do.
    for name in ("start", "advance", "stop"):
        if not hasattr(progress, name):
            raise UsageError("progress needs start, advance and stop", got=kind_of(progress))


def _check_optimizer(optimizer: Any) -> None:
    """Raise unless an optimizer has parameter groups, or is a list of them."""
    if optimizer is None:
        return
    if hasattr(optimizer, "param_groups"):
        return

    # Groups, as a torch optimizer takes them. A single one may stand by itself.
    groups = optimizer if isinstance(optimizer, list | tuple) else [optimizer]
    if all(_is_parameter_group(group) for group in groups):
        return
    hint = "a torch optimizer, or its param_groups"
    raise UsageError("optimizer is of the wrong type", got=kind_of(optimizer), hint=hint)


def _is_parameter_group(group: Any) -> bool:
    """Return whether something is a group of parameters, as a torch optimizer has them."""
    return isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple)


def _dtype_name(dtype: str | torch.dtype | None) -> str:
    """Return the name of a precision that products can run in."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        hint = f"by name or torch's own: {', '.join(DTYPES)}"
        raise UsageError("unknown dtype", got=str(dtype), hint=hint)
    return name


def _check_combinations(options: AuditOptions) -> None:
    """Raise if two options contradict each other."""
    _check_one_confidence(options)
    _check_probes(options)
    if options.remedies not in REMEDY_CHOICES:
        hint = f"one of {', '.join(REMEDY_CHOICES)}"
        raise UsageError("unknown way of trying remedies", got=options.remedies, hint=hint)
    _check_against(options)
    check_one_probe(
        tokens=options.tokens, input_factory=options.input_factory, inputs=options.inputs
    )
    if options.replay is not None:
        _check_replay(options)


def _check_one_confidence(options: AuditOptions) -> None:
    """Raise if both confidences are given: that of all intervals sets that of each."""
    if options.confidence is None or options.confidence_all is None:
        return
    got = f"--confidence {options.confidence:g} and --confidence-all {options.confidence_all:g}"
    hint = (
        "give one of them: --confidence is said of each interval, --confidence-all of all "
        "of them together"
    )
    raise UsageError("the confidence is given twice", got=got, hint=hint)


def _check_probes(options: AuditOptions) -> None:
    """Raise if several probes are requested and there can be only one."""
    if options.probes == 1:
        return
    if options.inputs is not None:
        got = f"--probes {options.probes} and one fixed batch (passed as inputs, or by --replay)"
        hint = (
            "leave --probes out; or give --tokens FILE, or --inputs with a factory that draws "
            "its input"
        )
        raise UsageError("--probes needs an input that varies", got=got, hint=hint)
    if not options.products:
        raise UsageError(
            "--probes has nothing to repeat: no norm is asked for", hint="leave --probes out"
        )


def _check_against(options: AuditOptions) -> None:
    """Raise if a comparison is requested twice, or without the norms that it needs."""
    if options.against is None:
        return
    if options.baseline is not None:
        raise UsageError(
            "against and baseline both say what to compare with", hint="give one of them"
        )

    # The comparison is one of norms.
    if not options.products:
        hint = "leave products=False out; `jacdiag diff --contract-only` compares weights"
        raise UsageError(
            "against compares norms", got="products=False, which measures none", hint=hint
        )


def _check_replay(options: AuditOptions) -> None:
    """Raise if another option gives the probe, too."""
    # `inputs` may be given as well: they take the place of the flight's batch.
    for name in ("tokens", "input_factory"):
        if getattr(options, name) is not None:
            raise UsageError(
                "the probe is given twice", got=f"replay and {name}", hint="give one of them"
            )
