"""Settings from `[tool.jacdiag]` in pyproject.toml or from jacdiag.toml.

An option on the command line wins.
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
class ConfigFile:
    """The contents of a configuration file.

    Attributes:
        path: of the file; None if there is none.
        options: by the name of their command-line option.
        thresholds, profiles, sites, contract: its tables.
        allow_trust_pickle: whether `gate` takes --trust-pickle in CI.
    """

    path: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)
    thresholds: dict[str, Any] = field(default_factory=dict)
    profiles: dict[str, dict[str, Any]] = field(default_factory=dict)
    sites: dict[str, Any] = field(default_factory=dict)
    contract: dict[str, Any] = field(default_factory=dict)
    allow_trust_pickle: bool = False


def load(start: Path, known: list[str]) -> ConfigFile:
    """Read the nearest configuration in a folder or its parents.

    jacdiag.toml goes before pyproject.toml.

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
    return ConfigFile()


def _read(path: Path) -> dict[str, Any] | None:
    """Return the settings in a file; None if a pyproject.toml has none."""
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


def _checked(path: Path, settings: Mapping[str, Any], known: list[str]) -> ConfigFile:
    """Return the configuration that a file holds.

    Args:
        path: of the file, for messages.
        settings: its contents.
        known: option names that may be set.

    Raises:
        UsageError: a key that no option has, or a value of another kind.
    """
    options: dict[str, Any] = {}
    for key, value in settings.items():
        name = key.replace("_", "-")
        if name in TABLES or name in SWITCHES:
            _check_kind(path, name, value)
        elif name in known:
            options[name] = _anchored(name, value, path.parent)
        else:
            raise _unknown_key(path, key, value, known)
    tables = {name: settings.get(name, {}) for name in TABLES}
    trust = bool(settings.get("allow-trust-pickle", False))
    return ConfigFile(path, options, allow_trust_pickle=trust, **tables)


def _check_kind(path: Path, name: str, value: Any) -> None:
    """Raise unless a table is a table, and a switch is true or false."""
    if name in TABLES and not isinstance(value, dict):
        raise UsageError(f"'{name}' in {path} must be a table", got=repr(value))
    if name in SWITCHES and not isinstance(value, bool):
        raise UsageError(f"'{name}' in {path} must be true or false", got=repr(value))


def _unknown_key(path: Path, key: str, value: Any, known: list[str]) -> UsageError:
    """Return the error of a key that may not be set, with what to do in its place."""
    name = key.replace("_", "-")
    if name in FROM_COMMAND_LINE_ONLY:
        return UsageError(
            f"'{name}' cannot be set in {path}", hint=f"give --{name} on the command line"
        )
    if name == "tool" and isinstance(value, dict):
        return UsageError(
            f"{path} has a table [tool]",
            hint="its settings stand at the top, without [tool.jacdiag]",
        )
    close = get_close_matches(name, [*known, *TABLES, *SWITCHES], n=1, cutoff=0.0)
    return UsageError(
        f"unknown key '{key}' in {path}", hint=f"the closest known one is '{close[0]}'"
    )


def _anchored(name: str, value: Any, folder: Path) -> Any:
    """Return a value of an option; a path in a configuration file is relative to the file."""
    if not isinstance(value, str):
        return value
    if name in _FILES or (name in _FACTORIES and ".py:" in value):
        return str(folder / value)
    return value


class Configured(click.Command):
    """A command whose options take their defaults from the configuration.

    Its help works without one.
    """

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Return the context of a call, with the configuration as its defaults."""
        if {"-h", "--help"} & set(args):
            return super().make_context(info_name, args, parent, **extra)

        # 1. The parameters by the names of their options.
        config = load(Path.cwd(), all_options())
        by_name = {}
        for param in self.params:
            for option in param.opts:
                by_name[option.removeprefix("--")] = param

        # 2. The configuration's values, where this command has the option.
        defaults = {}
        for name, value in config.options.items():
            if name in by_name:
                defaults[by_name[name].name] = _as_typed(by_name[name], value)
        try:
            context = super().make_context(info_name, args, parent, default_map=defaults, **extra)
        except click.BadParameter as error:
            raise _blamed(error, config) from error
        context.meta["jacdiag.config"] = config
        return context


def all_options() -> list[str]:
    """Return the names of all options that a configuration may set."""
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
    names = []
    for param in command.params:
        if isinstance(param, click.Option):
            names += [option.removeprefix("--") for option in param.opts if option[:2] == "--"]
    return [name for name in names if name not in FROM_COMMAND_LINE_ONLY]


def _as_typed(param: click.Parameter, value: Any) -> Any:
    """Return a value of the configuration as the command line would have given it.

    click's own conversion then says what is wrong with it. An option that may be given several
    times is given once by a value that is no list.

    Raises:
        UsageError: a list or a table for an option that takes one value; click expects the right
            shape already.
    """
    if not isinstance(param, click.Option) or not param.multiple:
        return _one_value(param, value)
    items = value if isinstance(value, list) else [value]
    return [_one_value(param, item) for item in items]


def _one_value(param: click.Parameter, value: Any) -> Any:
    """Return one value as text, or as the table that a JSON option takes."""
    kind = ""
    if isinstance(value, list):
        kind = "list"
    elif isinstance(value, dict):
        if isinstance(param.type, JsonObject):
            return value
        kind = "table"
    if kind:
        raise UsageError(
            f"'{param.opts[0].removeprefix('--')}' in the configuration takes one value",
            got=f"a {kind}: {value!r}",
        )
    return str(value)


def _blamed(error: click.BadParameter, config: ConfigFile) -> click.BadParameter:
    """Return an error that names the configuration file, if the wrong value came from it."""
    name = error.param.name if error.param else None
    source = error.ctx.get_parameter_source(name) if error.ctx and name else None
    if source is not click.core.ParameterSource.DEFAULT_MAP:
        return error
    return click.BadParameter(
        f"{error.message} (from {config.path})", error.ctx, error.param, error.param_hint
    )


def current() -> ConfigFile:
    """Return the configuration of the command that runs."""
    config: ConfigFile = click.get_current_context().meta.get("jacdiag.config", ConfigFile())
    return config


@dataclass(frozen=True)
class ResolvedProfile:
    """What `--profile` means, together with the configuration.

    Attributes:
        levels: a name, or a table by rule code.
        thresholds: of the configuration, and of the profile over them.
        select, ignore: groups of rule codes.
        fail_on: the least level that fails.
    """

    levels: str | dict[str, Any]
    thresholds: dict[str, Any]
    select: tuple[tuple[str, ...], ...]
    ignore: tuple[tuple[str, ...], ...]
    fail_on: str


def resolve_profile(context: click.Context, config: ConfigFile) -> ResolvedProfile:
    """Look a profile up: `[profiles.NAME]` may hold what `PROFILE_KEYS` lists.

    Args:
        context: of the command.
        config: its configuration.

    Raises:
        UsageError: no profile of that name, or one that holds something else.
    """
    # 1. A built-in profile is a name; the options stand as they are.
    values, name = dict(context.params), str(context.params["profile"])
    if name in BUILT_IN:
        select, ignore, fail_on = (values[key] for key in ("select", "ignore", "fail_on"))
        return ResolvedProfile(name, config.thresholds, select, ignore, fail_on)

    # 2. A profile of the configuration.
    if name not in config.profiles:
        known = ", ".join([*BUILT_IN, *config.profiles])
        add = (
            f"add [tool.jacdiag.profiles.{name}] to pyproject.toml, or [profiles.{name}] to "
            "jacdiag.toml"
        )
        raise UsageError(f"unknown profile '{name}'", got=f"the known ones are {known}", hint=add)
    table, where = config.profiles[name], f"profile '{name}' in {config.path}"
    _check_profile(table, where)

    # 3. Its options, unless the command line gives them.
    for param in context.command.params:
        key = param.opts[0].removeprefix("--")
        source = context.get_parameter_source(param.name or "")
        on_command_line = source is click.core.ParameterSource.COMMANDLINE
        if key in table and param.name and not on_command_line:
            try:
                values[param.name] = param.type_cast_value(context, _as_typed(param, table[key]))
            except click.BadParameter as error:
                raise UsageError(f"'{key}' of {where} has no meaning", got=error.message) from error

    # 4. Its thresholds and levels.
    thresholds = merged(config.thresholds, table.get("thresholds", {}))
    levels = {"name": name, "levels": table.get("levels", {})}
    return ResolvedProfile(
        levels, thresholds, values["select"], values["ignore"], values["fail_on"]
    )


def _check_profile(table: Any, where: str) -> None:
    """Raise unless a profile is a table of `PROFILE_KEYS`."""
    problem = ""
    if not isinstance(table, dict):
        problem = repr(table)
    elif set(table) - set(PROFILE_KEYS):
        problem = f"unknown key '{min(set(table) - set(PROFILE_KEYS))}'"
    if problem:
        hint = f"a table of {', '.join(PROFILE_KEYS)}"
        raise UsageError(f"{where} cannot be used", got=problem, hint=hint)
    for key in ("levels", "thresholds"):
        if not isinstance(table.get(key, {}), dict):
            raise UsageError(f"'{key}' of {where} must be a table", got=repr(table[key]))


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return two tables within tables as one; values of the second win."""
    both = dict(under)
    for key, value in over.items():
        inner = both.get(key)
        if isinstance(inner, Mapping) and isinstance(value, Mapping):
            both[key] = merged(inner, value)
        else:
            both[key] = value
    return both
