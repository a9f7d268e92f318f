"""
A database's address: taken apart once, as libpq takes it apart, so that what messages name is what is connected to.

A password in which `#`, `/`, `?` or `@` stands as it is takes an address apart in the wrong place; what follows then
passes for a port or a database, which messages name. Such an address is refused before anything reads it.
"""

import ipaddress
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from bon_scheduler.addresses.parameters import fault_of_parameters
from bon_scheduler.addresses.tls import Tls, read_tls
from bon_scheduler.addresses.web import fault_of_host

__all__ = ["DatabaseAddress", "describe_database", "read_database_address"]

SCHEME = re.compile(r"postgres(ql)?(\+[a-z0-9_]{1,30})?://")
"""SQLAlchemy names its driver behind a plus."""
MAX_PORT = 65535
DEFAULT_PORT = 5432
LONGEST_CONNECT_SECONDS = 60
ENCODE = (
    "in the user, the password and the database's name write # as %23, / as %2F, ? as %3F, @ as %40, [ as %5B, ] as %5D"
)
SOCKET = "the local socket"
BAD_PORT = f"has a port that is not a number from 1 to {MAX_PORT}"
KEEPALIVE = {
    "keepalives": "SO_KEEPALIVE",
    "keepalives_idle": "TCP_KEEPIDLE",
    "keepalives_interval": "TCP_KEEPINTVL",
    "keepalives_count": "TCP_KEEPCNT",
    "tcp_user_timeout": "TCP_USER_TIMEOUT",
}


@dataclass(frozen=True, slots=True)
class DatabaseAddress:
    """Where a database is and how it is reached."""

    servers: tuple[tuple[str, str], ...]
    """Host (empty: this machine's socket) and port (empty: the usual one) of each; none: this machine's socket."""
    database: str | None
    tls: Tls
    keepalive: Mapping[str, int]
    """Options of the socket by name, as `socket` names them; 0 leaves one as the system has it."""
    connect_seconds: int | None
    """How long an attempt may take, where the address says so."""
    options: str | None = field(repr=False)
    """What the server is told when a session begins."""
    login: Mapping[str, str] = field(repr=False)

    @property
    def has_password(self) -> bool:
        """Whether there is one to log in with, or a file that may hold it."""
        return "password" in self.login or "passfile" in self.login or bool(os.environ.get("PGPASSWORD"))

    def arguments(self) -> dict[str, Any]:
        """Return what asyncpg takes, all of it; raise ValueError where a certificate's file is of no use."""
        hosts = [host for host, _ in self.servers if host]
        outside = os.environ.get("PGPORT", "")
        usual = outside if _is_port(outside) else DEFAULT_PORT
        ports = [int(port or usual) for _, port in self.servers]
        return {
            "host": hosts or None,
            "port": ports if any(port for _, port in self.servers) else None,
            "database": self.database,
            "ssl": self.tls.context(),
            "direct_tls": self.tls.direct,
            **self.login,
        }

    def __str__(self) -> str:
        """Name the database and its servers, and nothing else."""
        servers = ", ".join(
            f"{f'[{host}]' if _is_number(host) and ':' in host else host or SOCKET}{f':{port}' if port else ''}"
            for host, port in self.servers
        )
        return f"the database {self.database or '(default)'} at {servers or SOCKET}"


def describe_database(url: str) -> str:
    """Name the database and the servers of an address that has no fault, and nothing else of it."""
    return str(read_database_address(url))


def read_database_address(url: str) -> DatabaseAddress:
    """Take an address apart; raise ValueError saying what is wrong with it, without quoting any value."""
    url = url.strip().removeprefix("\ufeff")
    if not SCHEME.match(url):
        raise ValueError("must begin with postgresql:// (for example postgresql://user@host:5432/bon)")
    try:
        parts = urlsplit(SCHEME.sub("postgresql://", url, count=1))
        # A plus is a plus in libpq's addresses, and no space as in a form.
        query = dict(parse_qsl(parts.query.replace("+", "%2B"), strict_parsing=True)) if parts.query else {}
    except ValueError:
        raise ValueError(f"cannot be taken apart; {ENCODE}") from None
    if _is_astray(parts, url):
        raise ValueError(f"can be read in more than one way; {ENCODE}")
    text = unquote(url)
    if "\0" in text or "\ufffd" in text:
        raise ValueError("holds %00, or a percent-encoding that is not UTF-8; encode it anew")
    servers = _servers(parts, query)
    if any(fault_of_host(host) for host, _ in servers if host and not host.startswith("/")):
        raise ValueError("names a host that is neither a name nor a number")
    if what := fault_of_parameters(query):
        raise ValueError(what)
    keepalive = {KEEPALIVE[name]: max(0, int(query[name])) for name in KEEPALIVE if name in query}
    seconds = min(int(query.get("connect_timeout", "0")), LONGEST_CONNECT_SECONDS)
    return DatabaseAddress(
        servers=servers,
        database=query.get("dbname") or query.get("database") or unquote(parts.path.removeprefix("/")) or None,
        tls=read_tls(query, local=all(_is_here(host) for host, _ in servers)),
        keepalive=keepalive,
        connect_seconds=seconds if seconds > 0 else None,
        options=query.get("options"),
        login=_login(parts, query),
    )


def _is_astray(parts: SplitResult, url: str) -> bool:
    """Whether a separator stands where only a user, a password or a name that is not encoded can have brought it."""
    nobody = "@" not in parts.netloc and ":" in parts.netloc
    return (
        re.search(r"[#\t\r\n]", url) is not None  # urlsplit drops the last three
        or parts.netloc.count("@") > 1
        or "@" in parts.path
        or (nobody and not parts.path and "@" in parts.query)
    )


def _servers(parts: SplitResult, query: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return host and port (empty: the usual one) of each server; what parameters say wins, as in libpq."""
    named = parts.netloc.rpartition("@")[2]
    if "host" in query:
        servers = [_part_port(server) for server in query["host"].split(",")]
    elif named:
        servers = [(unquote(host), unquote(port)) for host, port in map(_part_port, named.split(","))]
    else:
        servers = [_part_port(server) for server in os.environ.get("PGHOST", "").split(",") if server]
    ports = query["port"].split(",") if "port" in query else []
    if any(not host for host, _ in servers):
        raise ValueError("names no host before or after a comma")
    if not all(map(_is_port, [*ports, *(port for _, port in servers if port)])):
        raise ValueError(f"{BAD_PORT}; {ENCODE}")
    servers = servers or [("", "") for _ in ports[:1]]
    if len(ports) not in {0, 1, len(servers)}:
        raise ValueError("names more or fewer ports than hosts")
    if ports:
        each = ports * len(servers) if len(ports) == 1 else ports
        servers = [(host, port) for (host, _), port in zip(servers, each, strict=True)]
    return tuple(servers)


def _part_port(server: str) -> tuple[str, str]:
    if server.startswith("/") or _is_number(server):
        return server, ""
    if server.startswith("["):
        host, _, rest = server[1:].partition("]")
        return host, rest.removeprefix(":")
    host, _, port = server.partition(":")
    return host, port


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_port(text: str) -> bool:
    return re.fullmatch("[0-9]{1,5}", text) is not None and 1 <= int(text) <= MAX_PORT


def _is_here(host: str) -> bool:
    """Whether a host is this machine, whoever answers questions about names: its sockets, its numbers, `localhost`."""
    return (
        host in {"", "localhost"}
        or host.startswith("/")
        or (_is_number(host) and ipaddress.ip_address(host).is_loopback)
    )


def _login(parts: SplitResult, query: Mapping[str, str]) -> dict[str, str]:
    """Return who logs in, and what else of it asyncpg takes; what parameters say wins, as in libpq."""
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    login = {"user": unquote(user), "password": unquote(password)}
    login |= {name: query[name] for name in ("user", "password", "passfile", "krbsrvname", "gsslib") if name in query}
    primary = "primary" if query.get("targetServerType") in {"primary", "master"} else ""
    login["target_session_attrs"] = query.get("target_session_attrs", primary)
    return {name: value for name, value in login.items() if value}
