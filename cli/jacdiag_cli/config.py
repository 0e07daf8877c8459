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

# A file in somebody's repository must not switch a safeguard off.
FROM_COMMAND_LINE_ONLY = ("trust-pickle",)

# Options whose values are paths, or may begin with one.
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
            if not path.is_file():
                continue
            # A pyproject.toml without our table is none: the search goes on.
            settings = _read(path)
            if settings is not None:
                return _checked(path, settings, known)
    return ConfigFile()


def _read(path: Path) -> dict[str, Any] | None:
    """Return the settings in a file; None if a pyproject.toml has none."""
    # 1. A file of this program alone.
    data = _parse(path)
    if path.name == "jacdiag.toml":
        return data

    # 2. The table of this program, in a file that belongs to all.
    tools = data.get("tool", {})
    if not isinstance(tools, dict):
        return None
    settings = tools.get("jacdiag")
    if settings is not None and not isinstance(settings, dict):
        raise UsageError(
            f"'tool.jacdiag' in {path} must be a table", got=repr(settings), hint="[tool.jacdiag]"
        )
    return settings


def _parse(path: Path) -> dict[str, Any]:
    """Return all that a TOML file holds.

    Raises:
        UsageError: it cannot be read, or is no TOML.
    """
    try:
        return tomllib.loads(toml_text(path))
    except UnicodeDecodeError as error:
        raise UsageError(
            f"cannot read '{path}'",
            got=f"it is no UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start}",
            hint="save it as UTF-8 without BOM",
        ) from error
    except (tomllib.TOMLDecodeError, OSError, RecursionError) as error:
        raise UsageError(f"cannot read '{path}'", got=str(error)) from error


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
    # 1. Options, by the names that the command line gives them.
    options: dict[str, Any] = {}
    for key, value in settings.items():
        name = key.replace("_", "-")
        if name in (*TABLES, *SWITCHES):
            _check_kind(path, name, value)
        elif name in known:
            options[name] = _anchored(name, value, path.parent)
        else:
            raise _unknown_key(path, key, value, known)

    # 2. Tables, and the switch.
    tables = {name: settings.get(name, {}) for name in TABLES}
    trust = bool(settings.get("allow-trust-pickle", False))
    return ConfigFile(path, options, allow_trust_pickle=trust, **tables)


def _check_kind(path: Path, name: str, value: Any) -> None:
    """Raise unless a table is a table, and a switch is true or false."""
    kind: type = dict
    words = "a table"
    if name in SWITCHES:
        kind, words = bool, "true or false"
    if not isinstance(value, kind):
        raise UsageError(f"'{name}' in {path} must be {words}", got=repr(value))


def _unknown_key(path: Path, key: str, value: Any, known: list[str]) -> UsageError:
    """Return the error of a key that may not be set, with what to do in its place."""
    # 1. An option that a file cannot set.
    name = key.replace("_", "-")
    if name in FROM_COMMAND_LINE_ONLY:
        return UsageError(
            f"'{name}' cannot be set in {path}", hint=f"give --{name} on the command line"
        )

    # 2. A table as pyproject.toml has it, in a file without it.
    if name == "tool" and isinstance(value, dict):
        return UsageError(
            f"{path} has a table [tool]",
            hint="its settings stand at the top, without [tool.jacdiag]",
        )

    # 3. A key that may be misspelt.
    close = get_close_matches(name, [*known, *TABLES, *SWITCHES], n=1, cutoff=0.0)
    return UsageError(
        f"unknown key '{key}' in {path}", hint=f"the closest known one is '{close[0]}'"
    )


def _anchored(name: str, value: Any, folder: Path) -> Any:
    """Return a value of an option; a path in a configuration file is relative to the file."""
    if not isinstance(value, str):
        return value

    # A factory is a path only if it names a file: file.py:callable.
    is_path = name in _FILES
    if name in _FACTORIES:
        is_path = ".py:" in value
    if not is_path:
        return value
    return str(folder / value)


class Configured(click.Command):
    """A command whose options take their defaults from the configuration.

    Its help works without one.
    """

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        config: ConfigFile | None = None,
        **extra: Any,
    ) -> click.Context:
        """Return the context of a call, with the configuration as its defaults.

        Args:
            info_name: of the command.
            args: of the command line.
            parent: of the new context.
            config: in place of the nearest configuration file.
            extra: as click takes it.
        """
        # 1. Help works with a configuration that is broken, too.
        if {"-h", "--help"} & set(args):
            return super().make_context(info_name, args, parent, **extra)

        # 2. The configuration's values are defaults of this command.
        if config is None:
            config = load(Path.cwd(), all_options())
        defaults = self._defaults_from(config)
        try:
            context = super().make_context(info_name, args, parent, default_map=defaults, **extra)
        except click.BadParameter as error:
            raise _blamed(error, config) from error
        context.meta["jacdiag.config"] = config
        return context

    def _defaults_from(self, config: ConfigFile) -> dict[str, Any]:
        """Return the values of a configuration, by the parameters of this command."""
        # 1. The parameters by the names of their options.
        by_option = {}
        for param in self.params:
            for option in param.opts:
                by_option[option.removeprefix("--")] = param

        # 2. A value for another command is left out.
        defaults = {}
        for name, value in config.options.items():
            option_param = by_option.get(name)
            if option_param is not None and option_param.name:
                defaults[option_param.name] = _as_typed(option_param, value)
        return defaults


def all_options() -> list[str]:
    """Return the names of all options that a configuration may set."""
    from jacdiag_cli import options

    # 1. A command that has them all.
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

    # 2. The long names of its options.
    names = []
    for param in command.params:
        if isinstance(param, click.Option):
            names += [option[2:] for option in param.opts if option.startswith("--")]

    # 3. Without those that only the person who runs the command may set.
    return [name for name in names if name not in FROM_COMMAND_LINE_ONLY]


def _as_typed(param: click.Parameter, value: Any) -> Any:
    """Return a value of the configuration as the command line would have given it.

    click's own conversion then says what is wrong with it. An option that may be given several
    times is given once by a value that is no list.

    Raises:
        UsageError: a list or a table for an option that takes one value; click expects the right
            shape already.
    """
    takes_several = isinstance(param, click.Option) and param.multiple
    if not takes_several:
        return _one_value(param, value)

    # Each item is one use of the option.
    items = [value]
    if isinstance(value, list):
        items = value
    return [_one_value(param, item) for item in items]


def _one_value(param: click.Parameter, value: Any) -> Any:
    """Return one value as text, or as the table that a JSON option takes."""
    # 1. What click takes.
    is_table = isinstance(value, dict)
    if is_table and isinstance(param.type, JsonObject):
        return value

    # A number or a switch is what its text says.
    if not isinstance(value, (list, dict)):
        return str(value)

    # 2. What it would take for something else.
    kind = "list"
    if is_table:
        kind = "table"
    raise UsageError(
        f"'{param.opts[0].removeprefix('--')}' in the configuration takes one value",
        got=f"a {kind}: {value!r}",
    )


def _blamed(error: click.BadParameter, config: ConfigFile) -> click.BadParameter:
    """Return an error that names the configuration file, if the wrong value came from it."""
    # 1. Where the value came from. An error may lack its parameter or its context.
    if error.param is None or error.ctx is None or not error.param.name:
        return error
    source = error.ctx.get_parameter_source(error.param.name)
    if source is not click.core.ParameterSource.DEFAULT_MAP:
        return error

    # 2. The same error with the path.
    message = f"{error.message} (from {config.path})"
    return click.BadParameter(message, error.ctx, error.param, error.param_hint)


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
    params, name = context.params, str(context.params["profile"])
    if name in BUILT_IN:
        return ResolvedProfile(
            name, config.thresholds, params["select"], params["ignore"], params["fail_on"]
        )

    # 2. A profile of the configuration.
    if name not in config.profiles:
        raise _unknown_profile(name, config)
    table, where = config.profiles[name], f"profile '{name}' in {config.path}"
    _check_profile(table, where)

    # 3. Its options, unless the command line gives them.
    values = {**params, **_options_of_profile(context, table, where)}

    # 4. Its thresholds and levels.
    thresholds = merged(config.thresholds, table.get("thresholds", {}))
    levels = {"name": name, "levels": table.get("levels", {})}
    return ResolvedProfile(
        levels, thresholds, values["select"], values["ignore"], values["fail_on"]
    )


def _unknown_profile(name: str, config: ConfigFile) -> UsageError:
    """Return the error of a profile that no configuration has, with how to add it."""
    known = ", ".join([*BUILT_IN, *config.profiles])
    add = (
        f"add [tool.jacdiag.profiles.{name}] to pyproject.toml, or [profiles.{name}] to "
        "jacdiag.toml"
    )
    return UsageError(f"unknown profile '{name}'", got=f"the known ones are {known}", hint=add)


def _options_of_profile(
    context: click.Context, table: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Return the options that a profile sets and the command line does not.

    Args:
        context: of the command.
        table: of the profile.
        where: what the profile is called in messages.

    Raises:
        UsageError: a value that the option does not take.
    """
    values = {}
    for param in context.command.params:
        key = param.opts[0].removeprefix("--")
        if key not in table or not param.name:
            continue

        # The command line wins.
        source = context.get_parameter_source(param.name)
        if source is click.core.ParameterSource.COMMANDLINE:
            continue
        try:
            values[param.name] = param.type_cast_value(context, _as_typed(param, table[key]))
        except click.BadParameter as error:
            raise UsageError(f"'{key}' of {where} has no meaning", got=error.message) from error
    return values


def _check_profile(table: Any, where: str) -> None:
    """Raise unless a profile is a table of `PROFILE_KEYS`."""
    # 1. Its keys.
    problem = ""
    if not isinstance(table, dict):
        problem = repr(table)
    elif unknown := set(table) - set(PROFILE_KEYS):
        problem = f"unknown key '{min(unknown)}'"
    if problem:
        hint = f"a table of {', '.join(PROFILE_KEYS)}"
        raise UsageError(f"{where} cannot be used", got=problem, hint=hint)

    # 2. Its own tables.
    for key in ("levels", "thresholds"):
        value = table.get(key, {})
        if not isinstance(value, dict):
            raise UsageError(f"'{key}' of {where} must be a table", got=repr(value))


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return two tables within tables as one; values of the second win."""
    both = dict(under)
    for key, value in over.items():
        # 1. A table in both goes on as a table.
        inner = both.get(key)
        if isinstance(inner, Mapping) and isinstance(value, Mapping):
            both[key] = merged(inner, value)
            continue

        # 2. Anything else is replaced.
        both[key] = value
    return both
