"""`jacdiag-mcp`: audits, rules and run logs as tools of a Model Context Protocol server.

It needs the extra `mcp` (`pip install 'jacdiag[mcp]'`), and talks over stdin and stdout. It never
allows a pickle to run code. A source that is a Python function is imported, and so runs code.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import jacdiag
from jacdiag.errors import JacdiagError

if TYPE_CHECKING:
    from mcp.server import MCPServer

P = ParamSpec("P")
R = TypeVar("R")
_INSTRUCTIONS = (
    "jacdiag measures how strongly each sub-layer of a PyTorch transformer amplifies a small "
    "change of the residual stream. A norm is an interval: quote both ends. null means not "
    "measured. "
    "A condition that is not met is a risk; it does not say that a run will spike."
)


def audit_model(
    source: str,
    model: str | None = None,
    against: str | None = None,
    batch: int = 2,
    seq: int | None = None,
) -> dict[str, Any]:
    """Audit a model and return its verdict, its findings and the norm of each sub-layer's branch.

    Args:
        source: a checkpoint file, a Hugging Face folder, file.py:function or hf:config.json. The
            file of a function is run.
        model: file.py:function that builds the model of a bare state dict.
        against: an earlier checkpoint to compare with, or its JSON report.
        batch: sequences of the probe.
        seq: tokens of each sequence.
    """
    report = jacdiag.audit(source, model=model, against=against, batch=batch, seq=seq).to_dict()
    short = {key: report[key] for key in ("verdict", "state", "conditions", "findings", "notes")}
    norms = []
    for row in report["sublayers"]:
        interval = row["branch_norm"] or {"lower": None, "upper": None}
        bounds = {"lower": interval["lower"], "upper": interval["upper"]}
        norms.append({"sublayer": row["name"], **bounds})
    undecided = [rule["code"] for rule in report["rules"] if rule["status"] == "unknown"]
    return {**short, "branch_norms": norms, "undecided_rules": undecided}


def explain_rule(code: str) -> dict[str, str]:
    """Return what a rule checks, why that matters, an example and the remedy.

    Args:
        code: such as JD102.
    """
    from jacdiag.rules import rule

    info = rule(code.strip())
    page = info.page
    sections = {"what": page.what, "why": page.why, "example": page.example, "remedy": page.remedy}
    return {"code": info.code, "name": info.name, "summary": info.summary, **sections}


def read_run_log(path: str) -> dict[str, Any]:
    """Return the state of a watched training run: its last step, its alerts and how it ended.

    Args:
        path: of run.jsonl, or of its folder.
    """
    from jacdiag.records.run_log import read_run

    run = read_run(path)
    return {
        "model": run.header.get("model"),
        "last_step": run.steps[-1] if run.steps else None,
        "alerts": run.alerts,
        "findings": run.findings,
        "faults": run.faults,
        "ended": run.ended,
    }


def build_server() -> MCPServer:
    """Return the server with its three tools.

    Raises:
        ImportError: the extra `mcp` is not installed.
    """
    from mcp.server import MCPServer
    from mcp.server.mcpserver.exceptions import ToolError

    def with_error_texts(tool: Callable[P, R]) -> Callable[P, R]:
        """Return a tool whose errors reach the client with what to try next."""

        @functools.wraps(tool)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return tool(*args, **kwargs)
            except JacdiagError as error:
                raise ToolError(str(error)) from error

        return call

    server = MCPServer("jacdiag", version=jacdiag.__version__, instructions=_INSTRUCTIONS)
    tools: tuple[Callable[..., Any], ...] = (audit_model, explain_rule, read_run_log)
    for tool in tools:
        server.tool()(with_error_texts(tool))
    return server


def main() -> int:
    """Serve on stdin and stdout until the client leaves; return the exit code."""
    try:
        server = build_server()
    except ImportError as error:
        print(f"error: {error}\n  try: pip install 'jacdiag[mcp]'", file=sys.stderr)
        return 2
    server.run("stdio")
    return 0


if __name__ == "__main__":
    sys.exit(main())
