"""
Ask the probes of this machine's service, as an image's health check does.

Needs HEALTH_HOST and HEALTH_PORT alone, and imports next to nothing: it is run every few seconds.
"""

import http.client
import json
import os
import sys

from bon_scheduler.cli.usage import UsageError

__all__ = ["ask"]

TIMEOUT_SECONDS = 5.0
DEFAULT_PORT = "8080"
ANY_ADDRESS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}  # noqa: S104 - where it listens
LONGEST_ANSWER = 100_000


def ask(*, ready: bool, as_json: bool) -> int:
    """Print one line, what the probe says; return 0 when it is well, else 1. Raises UsageError for an unusable port."""
    path = "/readyz" if ready else "/livez"
    status, why = _get(_host(), _port(), path)
    well = status == http.client.OK
    if as_json:
        answer = {"healthy": well, "path": path, "status": status, "why": why}
        sys.stdout.write(f"{json.dumps(answer)}\n")
    else:
        told = f"{path} {status}" if status else path
        sys.stdout.write(f"{'ok' if well else 'not ok'}: {told}{f', {why}' if why else ''}\n")
    return 0 if well else 1


def _host() -> str:
    host = os.environ.get("HEALTH_HOST", "").strip()
    return ANY_ADDRESS.get(host, host)


def _port() -> int:
    text = os.environ.get("HEALTH_PORT", "").strip() or DEFAULT_PORT
    if not text.isascii() or not text.isdecimal() or not 0 < int(text) < 2**16:
        raise UsageError(
            f'HEALTH_PORT is "{text}", where nobody can be asked. Give serve and this command one from 1 to 65535.'
        )
    return int(text)


def _get(host: str, port: int, path: str) -> tuple[int | None, str | None]:
    """Return the status and, of one that is not well, the checks that are down; no status where nobody answers."""
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read(LONGEST_ANSWER)
    except TimeoutError:
        return None, f"no answer from {host}:{port} within {TIMEOUT_SECONDS:g} s"
    except (OSError, http.client.HTTPException) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        return None, f"nobody answers at {host}:{port}: {why}"
    finally:
        connection.close()
    return answer.status, None if answer.status == http.client.OK else _down(body)


def _down(body: bytes) -> str | None:
    try:
        checks = json.loads(body)["checks"]
        return ", ".join(name for name, check in checks.items() if check["status"] != "up") or None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
