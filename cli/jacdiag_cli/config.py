"""Settings from `[tool.jacdiag]` in pyproject.toml or from jacdiag.toml; a command-line option
wins.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from jacdiag.errors import UsageError
from jacdiag_cli.options import JsonObject

BUILT_IN = ("default", "paper")
PROFILE_KEYS = ("levels", "thresholds", "select", "ignore", "fail-on")
TABLES = ("thresholds", "profiles", "sites", "contract")
SWITCHES = ("allow-trust-pickle",)  # for what `gate` refuses in CI otherwise
# a file in somebody's repository must not switch a safeguard off
FROM_COMMAND_LINE_ONLY = ("trust-pickle",)
_FILES = ("tokens", "json", "plot", "baseline", "contract", "risk")
_FACTORIES = ("model", "inputs")


@dataclass(frozen=True)
class Config:
    """What a configuration file says: `options` by the name of their command-line option, and the
    tables.
    """

    path: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)
    thresholds: dict[str, Any] = field(default_factory=dict)
    profiles: dict[str, dict[str, Any]] = field(default_factory=dict)
    sites: dict[str, Any] = field(default_factory=dict)
    contract: dict[str, Any] = field(default_factory=dict)
    allow_trust_pickle: bool = False


def load(start: Path, known: list[str]) -> Config:
    """Reads the nearest configuration in `start` or its parents; jacdiag.toml goes before
    pyproject.toml.

    Args:
        start: the folder to begin at.
        known: option names that may be set.

    Raises:
        UsageError: the file is no TOML, or holds a key that no option has.
    """
    for folder in (start, *start.parents):
        for name in ("jacdiag.toml", "pyproject.toml"):
            path = folder / name
            settings = _read(path) if path.is_file() else None
            if settings is not None:
                return _checked(path, settings, known)
    return Config()


def _read(path: Path) -> dict[str, Any] | None:
    """The settings in a file; None where a pyproject.toml has none."""
    try:
        data = tomllib.loads(toml_text(path))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"cannot read '{path}'", got=str(error)) from error
    if path.name == "jacdiag.toml":
        return data
    tools = data.get("tool", {})
    settings = tools.get("jacdiag") if isinstance(tools, dict) else None
    if settings is not None and not isinstance(settings, dict):
        raise UsageError(
            f"'tool.jacdiag' in {path} must be a table", got=repr(settings), hint="[tool.jacdiag]"
        )
    return settings


def toml_text(path: Path) -> str:
    """Return the text of a TOML file.

    Raises:
        UsageError: it begins with a byte order mark, which TOML does not allow.
    """
    text = path.read_text(encoding="utf-8")
    if text.startswith("\ufeff"):
        hint = "save it as UTF-8 without BOM"
        raise UsageError(
            f"cannot read '{path}'", got="a byte order mark (BOM) at its beginning", hint=hint
        )
    return text


def _checked(path: Path, settings: Mapping[str, Any], known: list[str]) -> Config:
    options: dict[str, Any] = {}
    for key, value in settings.items():
        name = key.replace("_", "-")
        if name in FROM_COMMAND_LINE_ONLY:
            raise UsageError(
                f"'{name}' cannot be set in {path}", hint=f"give --{name} on the command line"
            )
        if name in TABLES:
            if not isinstance(value, dict):
                raise UsageError(f"'{name}' in {path} must be a table", got=repr(value))
        elif name in SWITCHES:
            if not isinstance(value, bool):
                raise UsageError(f"'{name}' in {path} must be true or false", got=repr(value))
        elif name == "tool" and isinstance(value, dict):
            raise UsageError(
                f"{path} has a table [tool]",
                hint="its settings stand at the top, without [tool.jacdiag]",
            )
        elif name not in known:
            close = get_close_matches(name, [*known, *TABLES, *SWITCHES], n=1, cutoff=0.0)
            raise UsageError(
                f"unknown key '{key}' in {path}", hint=f"the closest known one is '{close[0]}'"
            )
        else:
            options[name] = _anchored(name, value, path.parent)
    tables = {name: settings.get(name, {}) for name in TABLES}
    return Config(
        path, options, allow_trust_pickle=bool(settings.get("allow-trust-pickle", False)), **tables
    )


def _anchored(name: str, value: Any, folder: Path) -> Any:
    """A path in a configuration file is meant from where the file lies."""
    if name in _FILES and isinstance(value, str):
        return str(folder / value)
    if name in _FACTORIES and isinstance(value, str) and ".py:" in value:
        return str(folder / value)
    return value


class Configured(click.Command):
    """A command whose options take their defaults from the configuration; help works without
    one.
    """

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        names = {option.removeprefix("--"): param for param in self.params for option in param.opts}
        if {"-h", "--help"} & set(args):
            return super().make_context(info_name, args, parent, **extra)
        config = load(
            Path.cwd(), [name for name in all_options() if name not in FROM_COMMAND_LINE_ONLY]
        )
        own = {key: value for key, value in config.options.items() if key in names}
        defaults = {names[key].name: _given(names[key], value) for key, value in own.items()}
        try:
            context = super().make_context(info_name, args, parent, default_map=defaults, **extra)
        except click.BadParameter as error:
            raise _blamed(error, config) from error
        context.meta["jacdiag.config"] = config
        return context


def all_options() -> list[str]:
    """The names of every option that a command takes, for which a configuration may hold a
    value.
    """
    from jacdiag_cli import options

    groups = (
        options.SOURCE,
        options.PROBE,
        options.PROBES,
        options.SOLVER,
        options.TOGETHER,
        options.JUDGEMENT,
        options.OUTPUT,
        options.GATE,
    )
    command = click.command()(options.add(*groups)(lambda: None))
    opts = [
        option
        for param in command.params
        if isinstance(param, click.Option)
        for option in param.opts
    ]
    return [option.removeprefix("--") for option in opts if option.startswith("--")]


def _plain(value: Any) -> Any:
    """What the command line would have given: click's own conversion then says what is wrong with
    it.
    """
    return value if isinstance(value, dict) else str(value)


def _given(param: click.Parameter, value: Any) -> Any:
    """An option that may be given several times is given once by a value that is no list.

    Raises:
        UsageError: a list or a table where the option takes one value; click expects the right
            shape already.
    """
    several = isinstance(param, click.Option) and param.multiple
    items = value if several and isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, list) or (
            isinstance(item, dict) and not isinstance(param.type, JsonObject)
        ):
            got = f"a {'list' if isinstance(item, list) else 'table'}: {item!r}"
            raise UsageError(
                f"'{param.opts[0].removeprefix('--')}' in the configuration takes one value",
                got=got,
            )
    return [_plain(item) for item in items] if several else _plain(value)


def _blamed(error: click.BadParameter, config: Config) -> click.BadParameter:
    """Names the configuration file where a wrong value came from it and not from the command
    line.
    """
    name = error.param.name if error.param else None
    source = error.ctx.get_parameter_source(name) if error.ctx and name else None
    if source is not click.core.ParameterSource.DEFAULT_MAP:
        return error
    return click.BadParameter(
        f"{error.message} (from {config.path})", error.ctx, error.param, error.param_hint
    )


def current() -> Config:
    """The configuration of the command that runs."""
    config: Config = click.get_current_context().meta.get("jacdiag.config", Config())
    return config


@dataclass(frozen=True)
class Profile:
    """What `--profile` comes to: levels (a name, or a table by rule code), and what else the
    configuration sets.
    """

    levels: str | dict[str, Any]
    thresholds: dict[str, Any]
    select: tuple[tuple[str, ...], ...]
    ignore: tuple[tuple[str, ...], ...]
    fail_on: str


def resolve_profile(context: click.Context, config: Config) -> Profile:
    """Looks a profile up: `[profiles.NAME]` may hold what `PROFILE_KEYS` lists.

    Raises:
        UsageError: no profile of that name, or one that holds something else.
    """
    given, name = context.params, str(context.params["profile"])
    if name in BUILT_IN:
        return Profile(name, config.thresholds, given["select"], given["ignore"], given["fail_on"])
    if name not in config.profiles:
        known = ", ".join([*BUILT_IN, *config.profiles])
        add = (
            f"add [tool.jacdiag.profiles.{name}] to pyproject.toml, or [profiles.{name}] to "
            "jacdiag.toml"
        )
        raise UsageError(f"unknown profile '{name}'", got=f"the known ones are {known}", hint=add)
    table, where = config.profiles[name], f"profile '{name}' in {config.path}"
    _check_profile(table, where)
    values = dict(given)
    for param in context.command.params:
        key = (param.opts[0]).removeprefix("--")
        source = context.get_parameter_source(param.name or "")
        if key in table and param.name and source is not click.core.ParameterSource.COMMANDLINE:
            try:
                values[param.name] = param.type_cast_value(context, _given(param, table[key]))
            except click.BadParameter as error:
                raise UsageError(f"'{key}' of {where} has no meaning", got=error.message) from error
    thresholds = merged(config.thresholds, table.get("thresholds", {}))
    levels = {"name": name, "levels": table.get("levels", {})}
    return Profile(levels, thresholds, values["select"], values["ignore"], values["fail_on"])


def _check_profile(table: Any, where: str) -> None:
    if not isinstance(table, dict) or (unknown := sorted(set(table) - set(PROFILE_KEYS))):
        got = repr(table) if not isinstance(table, dict) else f"unknown key '{unknown[0]}'"
        raise UsageError(
            f"{where} cannot be used", got=got, hint=f"a table of {', '.join(PROFILE_KEYS)}"
        )
    for key in ("levels", "thresholds"):
        if not isinstance(table.get(key, {}), dict):
            raise UsageError(f"'{key}' of {where} must be a table", got=repr(table[key]))


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Tables within tables, the second over the first."""
    both = dict(under)
    for key, value in over.items():
        inner = both.get(key)
        both[key] = (
            merged(inner, value)
            if isinstance(inner, Mapping) and isinstance(value, Mapping)
            else value
        )
    return both
