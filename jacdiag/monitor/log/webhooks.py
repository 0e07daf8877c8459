"""Alerts by HTTP: Slack, Discord, or any address that takes JSON.

An alert is sent by a thread that the training does not wait for. An address usually holds a secret:
messages and logs name its host alone.
"""

from __future__ import annotations

import http
import json
import queue
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from jacdiag._version import __version__
from jacdiag.errors import UsageError, clipped, printable
from jacdiag.monitor.alert_moment import AlertMoment
from jacdiag.monitor.fault_isolation import logger
from jacdiag.records.run_log import Alert, plain

_TIMEOUT = 5.0  # seconds for one request
_PAUSES = (0.0, 1.0, 5.0)  # seconds before each attempt
_LONGEST_PAUSE = 30.0  # seconds, if the server asks for more
_MOST_WAITING = 100  # alerts
_MOST_LOST = 3  # alerts in a row that did not arrive: then the address is given up
_REFUSED = (400, 401, 403, 404, 405, 410)  # to ask again will not help
# characters of an alert's sentence; Discord takes 2,000 in all, Slack 3,000 in a block
_LONGEST = 1500
_CALLED = {"slack": "slack", "discord": "discord", "json": "webhook"}
_HINT = (
    "such as https://hooks.slack.com/services/...; slack+https://, discord+https:// or "
    "json+https:// name the form"
)


class Webhook:
    """Sends alerts to one address.

    Args:
        url: https://... or http://... The form of the JSON follows from the host: Slack's,
            Discord's, or a generic one. A prefix `slack+`, `discord+` or `json+` names it for other
            hosts; Mattermost, for one, takes Slack's.
        timeout: seconds for one request.
        pauses: seconds before each attempt; their number is that of the attempts.

    Attributes:
        name: how messages call it: its form and host, never its path.
        failed: called once with the reason if the address is given up.

    Raises:
        UsageError: no address of the web. The message does not repeat the address.

    Example:
        >>> Webhook("https://hooks.slack.com/services/T0/B0/secret").name
        'slack at hooks.slack.com'
        >>> Webhook("json+http://localhost:9000/alerts").name
        'webhook at localhost'
    """

    def __init__(
        self, url: str, *, timeout: float = _TIMEOUT, pauses: tuple[float, ...] = _PAUSES
    ) -> None:
        form, address, host = _parsed(url)
        self._address, self._form = address, form
        self.name = f"{_CALLED[form]} at {host}"
        self.timeout, self.pauses = timeout, pauses
        self.failed: Callable[[str], None] = _ignore
        self._queue: queue.Queue[bytes | None] = queue.Queue(_MOST_WAITING)
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._lost = 0
        self._given_up = False

    def __repr__(self) -> str:
        return f"Webhook({self.name})"

    def alert(self, alert: Alert, moment: AlertMoment) -> None:
        """Hand an alert to the sending thread; never waits."""
        if self._given_up or self._closing.is_set():
            return
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._send_all, name="jacdiag-webhook", daemon=True
            )
            self._thread.start()
        data = json.dumps(_FORMS[self._form](alert, moment), allow_nan=False).encode()
        try:
            self._queue.put_nowait(data)
        except queue.Full:
            logger.warning(
                "jacdiag.watch: an alert was not sent to %s: %d wait already",
                self.name,
                _MOST_WAITING,
            )

    def close(self) -> None:
        """Send what waits, for the time of one request at most."""
        self._closing.set()
        if self._thread is not None:
            try:
                self._queue.put_nowait(None)
            except queue.Full:
                return
            self._thread.join(self.timeout)

    # -- the sending thread ------------------------------------------------------------------------
    def _send_all(self) -> None:
        while True:
            data = self._queue.get()
            if data is None:
                return
            if self._given_up:
                continue
            reason, final = self._send(data)
            if not reason:
                self._lost = 0
                continue
            self._lost += 1
            if final or self._lost >= _MOST_LOST:
                self._given_up = True
                self.failed(reason)
            else:
                logger.warning("jacdiag.watch: an alert did not reach %s (%s)", self.name, reason)

    def _send(self, data: bytes) -> tuple[str, bool]:
        """Try to send; return the reason of the failure, empty for none, and whether it is
        final.
        """
        reason, asked = "", 0.0
        for pause in self.pauses:
            self._closing.wait(max(pause, asked))  # returns at once when the run ends
            asked = 0.0
            try:
                self._post(data)
                return "", False
            except urllib.error.HTTPError as error:
                reason = _phrase(error.code)
                asked = _retry_after(error.headers)
                error.close()
                redirected = 300 <= error.code < 400
                if redirected or error.code in _REFUSED:
                    return reason, True
            except Exception as error:  # the training must not hear of it, whatever it is
                reason = _without_address(error)
        return reason, False

    def _post(self, data: bytes) -> None:
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"jacdiag/{__version__}",
        }
        request = urllib.request.Request(self._address, data=data, headers=headers, method="POST")
        opener = urllib.request.build_opener(_NoRedirect)
        with opener.open(request, timeout=self.timeout) as answer:
            answer.read(1024)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would send the alert, and the secret with it, to somebody else."""

    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        return None


def _ignore(_reason: str) -> None:
    return None


def is_address(text: str) -> bool:
    """Return whether a text is meant as the address of a webhook.

    >>> is_address("https://example.org/hook"), is_address("slack+http://chat/hook")
    (True, True)
    >>> is_address("wandb")
    False
    """
    return "://" in text


def _parsed(url: str) -> tuple[str, str, str]:
    """Return the form, the address and the host."""
    form, plus, rest = url.partition("+")
    named = bool(plus) and form in _FORMS
    address = rest if named else url
    try:
        parts = urlsplit(address)
        host = parts.hostname or ""
        _ = parts.port
    except ValueError:
        raise UsageError("the address of a webhook cannot be read", hint=_HINT) from None
    if parts.scheme not in ("http", "https") or not host:
        raise UsageError("a webhook needs an address of the web", hint=_HINT)
    if not address.isascii() or not address.isprintable() or " " in address:
        raise UsageError(
            f"the address of the webhook at {host} holds a character that no address may",
            hint=_HINT,
        )
    if parts.username is not None or parts.password is not None:
        raise UsageError(
            f"the address of the webhook at {host} holds a user name or a password",
            hint="use an address with its secret in the path or in the query",
        )
    if named:
        return form, address, host
    if host == "hooks.slack.com":
        return "slack", address, host
    if host in ("discord.com", "discordapp.com", "ptb.discord.com", "canary.discord.com"):
        return "discord", address, host
    return "json", address, host


def _phrase(code: int) -> str:
    try:
        return f"HTTP {code} {http.HTTPStatus(code).phrase}"
    except ValueError:
        return f"HTTP {code}"


def _retry_after(headers: Any) -> float:
    try:
        return min(float(headers.get("Retry-After", 0)), _LONGEST_PAUSE)
    except (AttributeError, TypeError, ValueError):  # a date
        return 0.0


def _without_address(error: Exception) -> str:
    """Say what went wrong; the text of an error may hold the address, its class and its system
    message do not.
    """
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        return "no answer in time"
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    return type(error).__name__


# -- the forms of the message ----------------------------------------------------------------------
def title_of(alert: Alert) -> str:
    """Return the head of a message, such as "JD501 warning at step 1,234"."""
    return f"{alert.code} {alert.level} at step {alert.step:,}"


def lines_of(alert: Alert, moment: AlertMoment) -> list[str]:
    """Return what a message says below its head: the sentence, the sub-layers, the flight, the next
    command.
    """
    lines = [clipped(printable(alert.what), _LONGEST)]
    if alert.where:
        line = f"where: {clipped(printable(alert.where[0]), 200)}"
        if len(alert.where) > 1:
            line += f" and {len(alert.where) - 1} more"
        lines.append(line)
    if moment.flight_name:
        lines.append(
            f"flight recorder: {clipped(printable(moment.flight_name), 100)} in the folder of the "
            "run"
        )
    lines.append(f"next: jacdiag explain {alert.code}")
    return lines


def _about(moment: AlertMoment) -> str:
    """Return the run and the model in brackets, as far as they have names."""
    names = ", ".join(name for name in (moment.run, moment.model_name) if name)
    if not names:
        return ""
    return f" ({clipped(printable(names), 100)})"


def _slack(alert: Alert, moment: AlertMoment) -> dict[str, Any]:
    sign = {"error": ":red_circle:"}.get(alert.level, ":warning:")
    head = f"{sign} *{title_of(alert)}*{_slack_escaped(_about(moment))}"
    return {"text": "\n".join([head, *(_slack_escaped(line) for line in lines_of(alert, moment))])}


def _slack_escaped(text: str) -> str:
    """Slack reads <...> as a link or a mention, also one of everybody."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _discord(alert: Alert, moment: AlertMoment) -> dict[str, Any]:
    head = f"**{title_of(alert)}**{_about(moment)}"
    text = clipped("\n".join([head, *lines_of(alert, moment)]), 2000)
    return {"content": text, "allowed_mentions": {"parse": []}}


def _generic(alert: Alert, moment: AlertMoment) -> dict[str, Any]:
    data = {
        "schema_version": 1,
        "source": "jacdiag",
        "version": __version__,
        "run": moment.run or None,
        "model": moment.model_name or None,
        "title": title_of(alert),
        "text": "\n".join(lines_of(alert, moment)),
        "alert": alert.to_dict(),
        "step": moment.step,
        "flight": moment.flight_name or None,
    }
    plain_data: dict[str, Any] = plain(data)
    return plain_data


_FORMS: Mapping[str, Callable[[Alert, AlertMoment], dict[str, Any]]] = {
    "slack": _slack,
    "discord": _discord,
    "json": _generic,
}
