"""`jacdiag demo`: an audit of an example that needs no file."""

from __future__ import annotations

import click

from jacdiag_cli.audit import audit
from jacdiag_cli.config import ConfigFile, Configured
from jacdiag_cli.streams import CommandInvocation, emit

_INTRODUCTION = """\
This is an example: a GPT of 4 layers and width 112 (0.64M parameters) with random weights, as
before the first training step. It has the init that the paper calls vanilla: the embedding is as
small as the other matrices.

"""
_OWN_MODEL = """
For a model of your own:
  jacdiag audit checkpoint.pt                 a checkpoint, or a Hugging Face folder
  jacdiag audit build.py:model                a function in build.py that returns the model
  jacdiag explain columns                     what each column of the table means
"""


@click.command(short_help="Audits a small example model; needs no file.")
@click.pass_obj
def demo(invocation: CommandInvocation) -> int:
    """Audits a small GPT that is made on the spot, and prints the screen of `jacdiag audit`.

    It takes a few seconds, writes no file, and reads no configuration. The last lines say what to
    type for a model of your own. The exit code is 0.

    \b
    Example:
      jacdiag demo
    """
    from jacdiag.sources.demo_model import DEMO_SOURCE

    # 1. What is shown.
    if invocation.heard:
        emit(_INTRODUCTION)

    # 2. The audit, as its own command would run it in a folder without a configuration.
    arguments = [DEMO_SOURCE]
    of_audit = CommandInvocation(["audit", *arguments], invocation.interrupts, invocation.team)
    assert isinstance(audit, Configured)
    parent = click.get_current_context().parent  # its settings are those of every command
    with audit.make_context(
        "audit", arguments, parent, config=ConfigFile(), obj=of_audit
    ) as context:
        audit.invoke(context)

    # 3. What comes next.
    if invocation.heard:
        emit(_OWN_MODEL)
    return 0
