"""Alerts by HTTP against a server on this machine: forms, time-outs, refusals, and a secret that
nobody repeats.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from monitor.rig import lines, plain_step, small, trained

from jacdiag.errors import UsageError
from jacdiag.monitor.alert_moment import AlertMoment
from jacdiag.monitor.log.sinks import open_alert_sinks
from jacdiag.monitor.log.webhooks import Webhook
from jacdiag.records.run_log import Alert

SECRET = "T0/B0/s3cr3t-token"
ALERT = Alert(
    1234,
    "JD501",
    "warning",
    "loss 9.1 <!channel> & @everyone",
    ["h.0.attn", "h.1.mlp"],
    {"z": float("inf")},
)
MOMENT = AlertMoment(
    step=1240, model=small(), log_dir=Path("runs/run-a"), flight=Path("runs/run-a/flight-1234")
)


class Server:
    """Keeps what is posted; answers with the codes given, the last one again and again."""

    def __init__(self) -> None:
        self.codes, self.headers, self.delay = [200], {}, 0.0
        self.posted: list[tuple[str, dict[str, Any]]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                owner.posted.append((self.path, json.loads(body)))
                assert self.headers["Content-Type"] == "application/json"
                time.sleep(owner.delay)
                code = owner.codes.pop(0) if len(owner.codes) > 1 else owner.codes[0]
                self.send_response(code)
                for name, value in owner.headers.items():
                    self.send_header(name, value)
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *args: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def url(self, form: str = "json") -> str:
        return f"{form}+http://127.0.0.1:{self.server.server_port}/services/{SECRET}"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.server.shutdown()
    made.server.server_close()


def sent(hook: Webhook, times: int = 1) -> list[str]:
    """Send an alert, close, and return the reasons for which the address was given up."""
    reasons: list[str] = []
    hook.failed = reasons.append
    for _ in range(times):
        hook.alert(ALERT, MOMENT)
    wait_for(lambda: hook._queue.empty() or bool(reasons))
    hook.close()
    return reasons


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)


def quick(server: Server, form: str = "json", **options: Any) -> Webhook:
    return Webhook(server.url(form), **{"timeout": 10.0, "pauses": (0.0, 0.0), **options})


def test_generic_webhook_payload_has_run_and_alert(server: Server) -> None:
    assert sent(quick(server)) == []
    [(path, data)] = server.posted
    assert path == f"/services/{SECRET}"
    assert data["source"] == "jacdiag" and data["schema_version"] == 1
    assert data["run"] == "run-a" and data["model"] == "GPT" and data["flight"] == "flight-1234"
    assert data["alert"]["code"] == "JD501" and data["alert"]["evidence"] == {"z": "inf"}
    assert data["title"] == "JD501 warning at step 1,234" and data["step"] == 1240
    assert ALERT.what in data["text"] and "jacdiag explain JD501" in data["text"]


def test_slack_payload_pings_no_user(server: Server) -> None:
    assert sent(quick(server, "slack")) == []
    [(_, data)] = server.posted
    assert set(data) == {"text"}
    assert "*JD501 warning at step 1,234* (run-a, GPT)" in data["text"]
    assert "loss 9.1 &lt;!channel&gt; &amp; @everyone" in data["text"] and "<" not in data["text"]
    assert "where: h.0.attn and 1 more" in data["text"] and "flight-1234" in data["text"]


def test_discord_payload_pings_no_user_and_fits_the_limit(server: Server) -> None:
    hook = quick(server, "discord")
    hook.alert(Alert(1, "JD501", "error", "x" * 9000, ["y" * 9000]), MOMENT)
    assert sent(hook) == []
    [(_, long), (_, data)] = server.posted
    assert data["allowed_mentions"] == {"parse": []} and "@everyone" in data["content"]
    assert len(long["content"]) <= 2000 and "next: jacdiag explain JD501" in long["content"]


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://hooks.slack.com/services/T/B/x", "slack at hooks.slack.com"),
        ("https://discord.com/api/webhooks/1/x", "discord at discord.com"),
        ("https://example.org/hook?key=x", "webhook at example.org"),
        ("https://hooks.slack.com.example.org/x", "webhook at hooks.slack.com.example.org"),
        ("slack+http://mattermost.local:8065/hooks/x", "slack at mattermost.local"),
    ],
)
def test_the_form_follows_from_the_host_or_is_named(url: str, name: str) -> None:
    hook = Webhook(url)
    assert hook.name == name and repr(hook) == f"Webhook({name})"


@pytest.mark.parametrize(
    "url",
    [
        f"ftp://example.org/{SECRET}",
        f"file:///etc/{SECRET}",
        f"https:///{SECRET}",
        f"https://example.org/{SECRET} x",
        f"https://user:{SECRET.replace('/', '')}@example.org/",
        f"https://example.org:port/{SECRET}",
        f"https://[::1/{SECRET}",
        f"https://example.org/{SECRET}\n",
        f"teams+https://example.org/{SECRET}",
    ],
)
def test_what_is_no_address_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(UsageError) as refused:
        open_alert_sinks(url, lambda name, reason: None)
    text = "".join(str(refused.value).split())
    assert "s3cr3t" not in text and refused.value.__cause__ is None


@pytest.mark.parametrize("given", ["slack", "", 3, [object()]])
def test_what_is_neither_an_address_nor_a_sink_is_refused(given: Any) -> None:
    with pytest.raises(UsageError, match="alerts_to"):
        open_alert_sinks(given, lambda name, reason: None)


def test_two_webhooks_of_one_host_are_distinguished(server: Server) -> None:
    failed: list[tuple[str, str]] = []
    sinks = open_alert_sinks(
        [server.url(), server.url("slack"), server.url()], lambda *given: failed.append(given)
    )
    assert [name for name, _ in sinks] == [
        "webhook at 127.0.0.1",
        "slack at 127.0.0.1",
        "webhook at 127.0.0.1 (2)",
    ]
    server.codes = [404]
    sinks[2][1].alert(ALERT, MOMENT)
    wait_for(lambda: bool(failed))
    assert failed == [("webhook at 127.0.0.1 (2)", "HTTP 404 Not Found")]


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410])
def test_a_refusal_is_final_and_asked_once(
    server: Server, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    server.codes = [code]
    hook = quick(server)
    [reason] = sent(hook)
    assert reason.startswith(f"HTTP {code}") and len(server.posted) == 1
    assert "s3cr3t" not in reason + caplog.text


def test_a_redirect_is_not_followed(server: Server) -> None:
    server.codes, server.headers = [302], {"Location": "/elsewhere"}
    assert sent(quick(server)) == ["HTTP 302 Found"]
    assert [path for path, _ in server.posted] == [f"/services/{SECRET}"]


def test_an_error_that_may_pass_is_tried_again(server: Server) -> None:
    server.codes, server.headers = [429, 503, 200], {"Retry-After": "0"}
    assert sent(quick(server, pauses=(0.0, 0.0, 0.0))) == []
    assert len(server.posted) == 3


def test_an_address_that_fails_three_times_is_given_up_and_not_before(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.codes = [500]
    with caplog.at_level(logging.WARNING):
        assert sent(quick(server), times=2) == []
    assert caplog.text.count("did not reach webhook at 127.0.0.1 (HTTP 500") == 2
    server.posted.clear()
    assert sent(quick(server), times=5) == ["HTTP 500 Internal Server Error"]
    assert len(server.posted) == 6 and "s3cr3t" not in caplog.text


def test_refused_connection_and_unknown_host_are_noted() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reasons = sent(Webhook(f"http://127.0.0.1:{port}/{SECRET}", pauses=(0.0,)), times=3)
    assert reasons == ["Connection refused"]


def test_unresponsive_webhook_server_does_not_block_training(server: Server) -> None:
    """The call returns at once, and the end of the run waits for one request at most."""
    server.delay = 5.0
    hook = quick(server, timeout=0.3, pauses=(0.0,))
    begun = time.monotonic()
    hook.alert(ALERT, MOMENT)
    assert time.monotonic() - begun < 0.2
    hook.close()
    assert time.monotonic() - begun < 3.0
    hook.alert(ALERT, MOMENT)  # after the end: nothing


def test_an_alert_more_than_can_wait_is_dropped_and_said(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.delay = 1.0
    hook = quick(server, timeout=0.2, pauses=(0.0,))
    begun = time.monotonic()
    with caplog.at_level(logging.WARNING):
        for _ in range(150):
            hook.alert(ALERT, MOMENT)
    assert time.monotonic() - begun < 1.0 and "100 wait already" in caplog.text
    hook.close()


def test_a_run_sends_its_alert_and_goes_on_when_the_address_is_dead(
    server: Server,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Bit-identical with and without, the secret in no file and no output."""

    def one(model: Any, optimizer: Any, step: int) -> tuple[Any, Any]:
        loss, norm = plain_step(model, optimizer, step)
        return (loss * float("nan") if step == 5 else loss), norm

    options = {"every": 4, "log_every": 2, "keep_batches": 2}
    dead = f"http://127.0.0.1:1/{SECRET}"
    addresses = [server.url("slack"), server.url(), dead]
    bare = trained(8, None)[1]
    with caplog.at_level(logging.DEBUG):
        state, watch = trained(
            8, {**options, "log_dir": tmp_path / "a", "alerts_to": addresses}, one=one
        )[1::2]
    assert watch.count == 8 and all((state[name] == value).all() for name, value in bare.items())
    bodies = [body for _, body in server.posted]
    assert len(bodies) == 2 and any(
        "JD505" in body.get("alert", {}).get("code", "") for body in bodies
    )
    assert any("*JD505 error at step 5* (a, GPT)" in body["text"] for body in bodies)
    everything = caplog.text + "".join(capfd.readouterr())
    everything += "".join(
        path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()
    )
    assert "s3cr3t" not in everything
    assert lines(tmp_path / "a", "alert")[0]["code"] == "JD505"


def test_an_address_that_refuses_is_noted_in_the_log_of_the_run(
    server: Server, tmp_path: Path
) -> None:
    server.codes = [403]

    def one(model: Any, optimizer: Any, step: int) -> tuple[Any, Any]:
        loss, norm = plain_step(model, optimizer, step)
        if step == 7:
            wait_for(lambda: bool(server.posted))
            time.sleep(0.2)
        return (loss * float("nan") if step == 3 else loss), norm

    trained(
        8,
        {"every": None, "log_every": 2, "log_dir": tmp_path, "alerts_to": server.url("slack")},
        one=one,
    )
    [fault] = lines(tmp_path, "fault")
    assert (
        fault["part"] == "alerts to slack at 127.0.0.1" and fault["error"] == "HTTP 403 Forbidden"
    )
