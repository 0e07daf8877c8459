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
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from jacdiag._version import __version__
from jacdiag.errors import UsageError, clipped, printable
from jacdiag.monitor.alert_moment import AlertMoment
from jacdiag.monitor.guards import logger
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
_FORM_OF_HOST = {
    "hooks.slack.com": "slack",
    "discord.com": "discord",
    "discordapp.com": "discord",
    "ptb.discord.com": "discord",
    "canary.discord.com": "discord",
}
_HINT = (
    "such as https://hooks.slack.com/services/...; slack+https://, discord+https:// or "
    "json+https:// name the form"
)


@dataclass(frozen=True)
class SendFailure:
    """Why an alert did not arrive.

    Attributes:
        reason: in a few words, without the address.
        is_final: whether another attempt cannot help.
    """

    reason: str
    is_final: bool = False


class Webhook:
    """An address that alerts are sent to.

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
        """Check the address; nothing is sent. See the class for the arguments."""
        address = _parse_address(url)
        self._address = address.url
        self._form = address.form
        self.name = f"{_CALLED[address.form]} at {address.host}"
        self.timeout = timeout
        self.pauses = pauses
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
        # 1. Most runs have no alert, and need no thread.
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._send_all, name="jacdiag-webhook", daemon=True
            )
            self._thread.start()

        # 2. Hand the message over.
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
        if self._thread is None:
            return
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(self.timeout)

    # -- the sending thread ------------------------------------------------------------------------
    def _send_all(self) -> None:
        """Work off the queue until `close`, in the sending thread."""
        while True:
            # 1. Take the next message.
            data = self._queue.get()
            if data is None:
                return
            if self._given_up:
                continue

            # 2. Send it.
            failure = self._send(data)
            if failure is None:
                self._lost = 0
                continue

            # 3. Give the address up if that will not get better.
            self._lost += 1
            is_hopeless = failure.is_final or self._lost >= _MOST_LOST
            if is_hopeless:
                self._given_up = True
                self.failed(failure.reason)
            else:
                logger.warning(
                    "jacdiag.watch: an alert did not reach %s (%s)", self.name, failure.reason
                )

    def _send(self, data: bytes) -> SendFailure | None:
        """Try to send a few times; return why it failed, or None."""
        reason = ""
        server_pause = 0.0
        for pause in self.pauses:
            self._closing.wait(max(pause, server_pause))  # returns at once when the run ends
            server_pause = 0.0
            try:
                self._post(data)
                return None
            except urllib.error.HTTPError as error:
                reason = _phrase(error.code)
                server_pause = _retry_after(error.headers)
                error.close()
                is_redirect = 300 <= error.code < 400
                if is_redirect or error.code in _REFUSED:
                    return SendFailure(reason, is_final=True)
            except Exception as error:  # the training must not hear of it, whatever it is
                reason = _without_address(error)
        if not reason:  # no attempt was made
            return None
        return SendFailure(reason)

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


@dataclass(frozen=True, kw_only=True)
class WebhookAddress:
    """Where and how a webhook is sent.

    Attributes:
        form: of the JSON, a key of `_FORMS`.
        url: the address, without a prefix that names the form.
        host: the name of the server.
    """

    form: str
    url: str
    host: str


def _parse_address(text: str) -> WebhookAddress:
    """Return the address that a user passed.

    Raises:
        UsageError: it is no address of the web; the message does not repeat it.
    """
    # 1. A prefix may name the form of the JSON.
    prefix, plus, address = text.partition("+")
    has_form = plus != "" and prefix in _FORMS
    if has_form:
        return WebhookAddress(form=prefix, url=address, host=_host_of(address))

    # 2. Else the host says which it is.
    host = _host_of(text)
    return WebhookAddress(form=_FORM_OF_HOST.get(host, "json"), url=text, host=host)


def _host_of(address: str) -> str:
    """Return the host of an address, after checking the address."""
    # 1. Take it apart.
    try:
        parts = urlsplit(address)
        host = parts.hostname or ""
        _ = parts.port  # raises ValueError for a port that is no number
    except ValueError:
        raise UsageError("the address of a webhook cannot be read", hint=_HINT) from None

    # 2. Check what a request would fail at, or would send to the wrong place.
    is_of_the_web = parts.scheme in ("http", "https")
    if not is_of_the_web or not host:
        raise UsageError("a webhook needs an address of the web", hint=_HINT)
    if not _is_plain(address):
        raise UsageError(
            f"the address of the webhook at {host} holds a character that no address may",
            hint=_HINT,
        )
    has_user = parts.username is not None or parts.password is not None
    if has_user:
        raise UsageError(
            f"the address of the webhook at {host} holds a user name or a password",
            hint="use an address with its secret in the path or in the query",
        )
    return host


def _is_plain(address: str) -> bool:
    """Return whether an address has only characters that an address may have."""
    if " " in address:
        return False
    if not address.isascii():
        return False
    return address.isprintable()


def _phrase(code: int) -> str:
    """Return a status of HTTP with its meaning: "HTTP 404 Not Found"."""
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
    """Return what went wrong.

    The text of an error may hold the address; its class and its system message do not.
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
    """Return the lines of a message after its head.

    These are the sentence, the sub-layers, the flight and the command that helps.
    """
    # 1. The sentence, and the first sub-layer of those that it is about.
    lines = [clipped(printable(alert.what), _LONGEST)]
    if alert.where:
        line = f"where: {clipped(printable(alert.where[0]), 200)}"
        if len(alert.where) > 1:
            line += f" and {len(alert.where) - 1} more"
        lines.append(line)

    # 2. Where to look next.
    if moment.flight_name:
        flight = clipped(printable(moment.flight_name), 100)
        lines.append(f"flight recorder: {flight} in the folder of the run")
    lines.append(f"next: jacdiag explain {alert.code}")
    return lines


def _about(moment: AlertMoment) -> str:
    """Return the run and the model in brackets, as far as they have names."""
    names = list(filter(None, (moment.run, moment.model_name)))
    if not names:
        return ""
    text = printable(", ".join(names))
    return f" ({clipped(text, 100)})"


def _slack(alert: Alert, moment: AlertMoment) -> dict[str, Any]:
    sign = {"error": ":red_circle:"}.get(alert.level, ":warning:")
    head = f"{sign} *{title_of(alert)}*{_slack_escaped(_about(moment))}"
    lines = [_slack_escaped(line) for line in lines_of(alert, moment)]
    return {"text": "\n".join([head, *lines])}


def _slack_escaped(text: str) -> str:
    """Escape what Slack reads as a link or a mention, also one of everybody."""
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
    # JSON has no nan and no infinity.
    plain_data: dict[str, Any] = plain(data)
    return plain_data


_FORMS: Mapping[str, Callable[[Alert, AlertMoment], dict[str, Any]]] = {
    "slack": _slack,
    "discord": _discord,
    "json": _generic,
}
