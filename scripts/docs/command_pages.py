"""The pages of the commands, from their click definitions."""

from __future__ import annotations

import inspect
import re

import click
from jacdiag_cli.main import cli

_CODE = re.compile(r"(`[^`]*`)")
_OPTION = re.compile(r"(?<![\w-])(--[a-z][\w-]*)")
_LARGEST = 2**31


def commands() -> dict[str, click.Command]:
    """Return the commands by name, in the order in which they were registered."""
    return dict(cli.commands)


def command_page(name: str) -> str:
    """Return the page of a command: usage, help text, and a table of its options."""
    command = commands()[name]
    context = _context(name)
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    rows = [_row(param, context) for param in command.params if isinstance(param, click.Option)]
    parts = [f"# jacdiag {name}", f"```text\n{usage}\n```", _prose(command)]
    if rows:
        head = "| option | what it does | default |\n|---|---|---|"
        parts.append("\n".join(["## Options", "", head, *rows]))
    return "\n\n".join(parts) + "\n"


def commands_table() -> str:
    """Return the table of all commands, with links to their pages."""
    rows = [
        f"| [`jacdiag {name}`]({name}.md) | {command.get_short_help_str(200)} |"
        for name, command in commands().items()
    ]
    return "\n".join(["| command | what it does |", "|---|---|", *rows])


def options_table(names: list[str]) -> str:
    """Return a table of options of `audit` and `gate`, as keys of the configuration."""
    params: dict[str, click.Option] = {}
    for command in ("audit", "gate"):
        for param in commands()[command].params:
            if isinstance(param, click.Option):
                params.setdefault(param.opts[0].removeprefix("--"), param)
    rows = []
    for name in names:
        if name in params:
            context = _context("audit")
            _, text, default = _cells(params[name], context)
            rows.append(f"| `{name}` | {text} | {default} |")
    return "\n".join(["| key | what it does | default |", "|---|---|---|", *rows])


def _context(name: str) -> click.Context:
    """Return the context of a command below `jacdiag`, whose settings it has."""
    parent = click.Context(cli, info_name="jacdiag", **cli.context_settings)
    return click.Context(commands()[name], info_name=name, parent=parent)


def _prose(command: click.Command) -> str:
    """Return the help text as Markdown. click marks an example by a line with `\\b`."""
    parts = []
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        lines = paragraph.splitlines()
        if lines[0] == "\b":
            lines = lines[1:]
            title = "" if lines[0].startswith(" ") else f"{lines.pop(0)}\n\n"
            code = inspect.cleandoc("\n" + "\n".join(lines))
            parts.append(f"{title}```text\n{code}\n```")
        elif all(line.startswith("  ") for line in lines):
            parts.append("```text\n" + inspect.cleandoc("\n" + paragraph) + "\n```")
        else:
            parts.append(_escaped(paragraph))
    return "\n\n".join(parts)


def _row(param: click.Option, context: click.Context) -> str:
    """Return the row of an option in the table."""
    return "| " + " | ".join(_cells(param, context)) + " |"


def _cells(param: click.Option, context: click.Context) -> tuple[str, str, str]:
    """Return the cells of an option: its names with the value it takes, its help, its default."""
    # 1. The names. Choices and limits of a value follow the help.
    names = " ".join(f"`{name}`" for name in [*param.opts, *param.secondary_opts])
    extra = param.get_help_extra(context)
    text = _escaped(" ".join((param.help or "").split()))
    if isinstance(param.type, click.Choice):
        choices = ", ".join(f"`{choice}`" for choice in param.type.choices)
        text += f" One of {choices}."
    elif not param.is_flag:
        metavar = param.make_metavar(context).removesuffix(" RANGE")
        names += f" {metavar}"
    if isinstance(param.type, click.IntRange | click.FloatRange):
        text += f" {limits(param.type)}."

    # 2. The default. click writes one that is worked out later in parentheses.
    default = str(extra.get("default", "")).strip("()")
    return names, text, default


def limits(values: click.IntRange | click.FloatRange) -> str:
    """Return the limits of a value in words.

    >>> limits(click.IntRange(min=1)), limits(click.FloatRange(0, 1, min_open=True, max_open=True))
    ('At least 1', 'Between 0 and 1')
    """
    if values.min is None:
        return f"At most {values.max}"
    # A largest value that only says how many bits a number has is of no use to a reader.
    if values.max is None or values.max > _LARGEST:
        return f"Above {values.min}" if values.min_open else f"At least {values.min}"
    if values.min_open and values.max_open:
        return f"Between {values.min} and {values.max}"
    return f"From {values.min} to {values.max}"


def _escaped(text: str) -> str:
    """Return text for a Markdown table: options as code, and characters with a meaning escaped."""
    pieces = []
    for piece in _CODE.split(text):
        if piece.startswith("`"):
            pieces.append(piece.replace("|", "\\|"))
            continue
        plain = piece.replace("|", "\\|").replace("<", "&lt;")
        plain = plain.replace("*", "\\*").replace("[", "\\[")
        pieces.append(_OPTION.sub(r"`\1`", plain))
    return "".join(pieces)
