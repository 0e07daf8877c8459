"""From the options of a command, and its configuration, to the options of the library."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jacdiag.errors import UsageError
from jacdiag_cli.config import ResolvedProfile, current, resolve_profile, toml_text

if TYPE_CHECKING:
    from jacdiag.pipeline.options import AuditOptions

# Options of `AuditOptions` that a command takes by the same name.
_SAME_NAMES = (
    "model",
    "model_args",
    "key",
    "trust_pickle",
    "tokens",
    "replay",
    "batch",
    "seq",
    "seed",
    "probes",
    "device",
    "dtype",
    "tol",
    "confidence",
    "decide",
    "max_products",
    "state",
    "lr",
    "warmup",
    "clip",
    "beta2",
    "risk",
    "against",
    "remedies",
)


def audit_options(given: Mapping[str, Any], **others: Any) -> AuditOptions:
    """Return the options of an audit.

    Args:
        given: the options of the command; those that an audit does not have are left out.
        others: options of the audit that the command does not take by the same name.

    Raises:
        UsageError: two of them contradict each other.
    """
    from jacdiag.pipeline.options import AuditOptions

    values = {"input_factory": given["inputs"]}
    for name in _SAME_NAMES:
        if name in given:
            values[name] = given[name]
    return AuditOptions(**{**values, **others})


def read_profile(given: Mapping[str, Any]) -> ResolvedProfile:
    """Return what --profile and the configuration say, checked before anything is measured.

    Args:
        given: the options of the command.

    Raises:
        UsageError: levels, thresholds or curves without meaning.
    """
    from jacdiag.rules import RULES
    from jacdiag.rules.profile import profile_of
    from jacdiag.rules.thresholds import load_thresholds

    profile = resolve_profile(click.get_current_context(), current())
    profile_of(profile.levels, tuple(rule.code for rule in RULES))
    load_thresholds(profile.thresholds, given["risk"])
    return profile


def rule_options(profile: ResolvedProfile, contract: str | None) -> dict[str, Any]:
    """Return the options of an audit that --profile, --contract and the configuration decide.

    Args:
        profile: as it was read.
        contract: the path of --contract.
    """
    # Each use of --select and --ignore gives a group of codes.
    return {
        "profile": profile.levels,
        "select": list(chain.from_iterable(profile.select)),
        "ignore": list(chain.from_iterable(profile.ignore)),
        "thresholds": profile.thresholds or None,
        "declared": current().sites or (),
        "contract": _read_contract(contract),
    }


def _read_contract(path: str | None) -> dict[str, Any] | None:
    """Return the pinned contract: that of --contract, else the one in the configuration.

    Raises:
        UsageError: the file cannot be read, is no TOML, or holds no contract.
    """
    from jacdiag.rules import checked_contract

    # 1. The configuration.
    if path is None:
        return checked_contract(current().contract) or None

    # 2. A file of its own, with or without the table's name.
    try:
        data = tomllib.loads(toml_text(Path(path)))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"cannot read the contract '{path}'", got=str(error)) from error
    table = data.get("contract", data)
    is_table = isinstance(table, dict)
    if not is_table or not table:
        raise UsageError(f"'{path}' holds no contract", hint='for example: W_O = "0.02/sqrt(2*N)"')
    return checked_contract(table)
