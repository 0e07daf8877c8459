"""The `jacdiag` command: its group, and how everything that can go wrong becomes a message and an exit code.

Exit codes: 0 clean, 1 findings at or above --fail-on, 2 cannot run, 130 after Ctrl-C; 70 is a bug in jacdiag.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

import jacdiag
from jacdiag.errors import JacdiagError
from jacdiag_cli.audit import audit
from jacdiag_cli.explain import explain
from jacdiag_cli.output import Invocation, complain, forgive_streams, stop_writing
from jacdiag_cli.rules import rules
from jacdiag_cli.sites import sites

CANNOT_RUN, BUG, INTERRUPTED = 2, 70, 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(jacdiag.__version__, prog_name="jacdiag")
def cli() -> None:
    """Jacobian and gradient-norm diagnostics for transformer pre-training.

    Start with: jacdiag audit checkpoint.pt
    """


for _command in (audit, sites, rules, explain):
    cli.add_command(_command)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; never raises.

    Args:
        argv: arguments without the program's name; those of the process if not given.

    Example:
        >>> main(["--version"])                                   # doctest: +SKIP
        jacdiag, version 0.1.0
        0
    """
    args = list(sys.argv[1:] if argv is None else argv)
    forgive_streams()
    try:
        result = cli.main(args=args, prog_name="jacdiag", standalone_mode=False, obj=Invocation(args))
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except (click.Abort, KeyboardInterrupt):
        complain("interrupted: nothing was written that was not whole")
        return INTERRUPTED
    except BrokenPipeError:  # a reader such as `head` has had enough
        stop_writing(sys.stdout)
        return 0
    except Exception as error:
        return _refuse(error)
    except SystemExit as leaving:  # the model's own code: its exit code must not pass for ours
        complain(f"the model's code called sys.exit({leaving.code!r})", hint="guard its script with if __name__ == ...")
        return CANNOT_RUN


def _refuse(error: Exception) -> int:
    if isinstance(error, JacdiagError):
        complain(error.what, got=error.got, hint=error.hint)
    elif isinstance(error, click.ClickException):
        error.show(sys.stderr)
    elif _out_of_memory(error):
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        complain("out of memory", got=first, hint="a smaller probe: --batch 1, or a shorter --seq")
    else:
        traceback.print_exception(error)
        complain("this is a bug in jacdiag; please report it with the lines above")
        return BUG
    return CANNOT_RUN


def _out_of_memory(error: Any) -> bool:
    """Whether memory ran out. Torch is not imported for it: its errors are told by name (CUDA) and by text (CPU)."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
