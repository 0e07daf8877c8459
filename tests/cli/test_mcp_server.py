"""The server of the Model Context Protocol, with a client of the official SDK."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
import tomllib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from jacdiag_cli import mcp_server

import jacdiag

ROOT = Path(__file__).parents[2]
BUILD = """
import os
from jacdiag.sources.gpt import GPT, GPTConfig

def model():
    print("a model is built")
    os.write(1, b"and something else prints\\n")
    return GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=256, block_size=32))
"""


@pytest.fixture
def sdk() -> Any:
    """Return the SDK."""
    return pytest.importorskip("mcp", reason="needs the extra mcp: pip install 'jacdiag[mcp]'")


def with_client(sdk: Any, use: Callable[[Any], Awaitable[Any]]) -> Any:
    """Connect a client to the server in this process, use it, and return what that returns."""

    async def session() -> Any:
        async with sdk.Client(mcp_server.build_server()) as client:
            return await use(client)

    return asyncio.run(session())


def call(sdk: Any, name: str, **arguments: Any) -> Any:
    """Return the result of one tool."""
    return with_client(sdk, lambda client: client.call_tool(name, arguments))


def test_the_tools_are_listed_with_what_they_need(sdk: Any) -> None:
    listed = with_client(sdk, lambda client: client.list_tools())
    required = {tool.name: tool.input_schema.get("required") for tool in listed.tools}
    assert required == {
        "audit_model": ["source"],
        "explain_rule": ["code"],
        "read_run_log": ["path"],
    }
    assert all(tool.description for tool in listed.tools)


def test_explain_returns_the_page_of_the_rule(sdk: Any) -> None:
    result = call(sdk, "explain_rule", code="jd102")
    assert not result.is_error
    page = json.loads(result.content[0].text)
    assert page["name"] == "large-shortcut"
    assert page["remedy"]


def test_an_error_says_what_to_try(sdk: Any) -> None:
    result = call(sdk, "explain_rule", code="JD999")
    assert result.is_error
    assert "JD9" in result.content[0].text
    missing = call(sdk, "audit_model", source="gone.pt")
    assert missing.is_error
    assert "gone.pt" in missing.content[0].text


def test_a_pickle_does_not_run(sdk: Any, tmp_path: Path) -> None:
    import torch

    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"model": Payload()}, tmp_path / "evil.pt")
    result = call(sdk, "audit_model", source=str(tmp_path / "evil.pt"))
    assert result.is_error
    assert not (tmp_path / "owned").exists()


def test_a_run_log_is_summed_up(sdk: Any, tmp_path: Path) -> None:
    lines = [
        {"v": 1, "type": "run", "model": "GPT"},
        {"v": 1, "type": "step", "step": 1, "loss": 5.5},
        {"v": 1, "type": "step", "step": 2, "loss": 5.25},
    ]
    (tmp_path / "run.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    state = json.loads(call(sdk, "read_run_log", path=str(tmp_path)).content[0].text)
    assert state["model"] == "GPT"
    assert (state["last_step"]["step"], state["last_step"]["loss"]) == (2, 5.25)
    assert (state["alerts"], state["ended"]) == ([], None)


@pytest.mark.long
def test_an_audit_over_pipes_survives_a_model_that_prints(sdk: Any, tmp_path: Path) -> None:
    """A process of its own, whose stdout is the connection."""
    (tmp_path / "build.py").write_text(BUILD)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'cli'}"}
    server = sdk.StdioServerParameters(
        command=sys.executable,
        args=["-m", "jacdiag_cli.mcp_server"],
        env=environment,
        cwd=tmp_path,
    )

    async def session() -> tuple[Any, Any]:
        async with sdk.Client(server) as client:
            arguments = {"source": "build.py:model", "batch": 1, "seq": 8}
            return client.server_info, await client.call_tool("audit_model", arguments)

    info, result = asyncio.run(session())
    assert (info.name, info.version) == ("jacdiag", jacdiag.__version__)
    assert not result.is_error, result.content
    report = json.loads(result.content[0].text)
    assert report["state"] == "init"
    assert len(report["branch_norms"]) == 4
    for norm in report["branch_norms"]:
        assert 0 < norm["lower"] <= norm["upper"]


def test_without_the_sdk_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mcp.server", None)
    assert mcp_server.main() == 2
    assert "pip install 'jacdiag[mcp]'" in capsys.readouterr().err


def test_the_configuration_for_agents_names_a_command_that_is_installed() -> None:
    text = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
    block = text.partition("```json\n")[2].partition("```")[0]
    command = json.loads(block)["mcpServers"]["jacdiag"]["command"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["scripts"][command].partition(":")
    assert getattr(importlib.import_module(module), function) is mcp_server.main


def test_the_server_has_fewer_than_150_lines() -> None:
    text = Path(mcp_server.__file__).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
