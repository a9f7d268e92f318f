"""
What is wrong with an address: a database's, a web page's, a host's, a mailbox's. Never quotes any part of one.

A password in which `#`, `/`, `?` or `@` stands as it is takes a database's address apart in the wrong place; what
follows then passes for a port or a database, which messages name. Such an address is refused before anything reads
it. Whatever else asyncpg takes is taken: several servers, sockets, parameters.
"""

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

__all__ = [
    "Mailbox",
    "describe_database",
    "fault_of_database_url",
    "fault_of_host",
    "fault_of_web_address",
    "read_mailbox",
]

DATABASE_SCHEMES = ("postgresql://", "postgres://")
MAX_PORT = 65535
ENCODE = (
    "in the user, the password and the database's name write # as %23, / as %2F, ? as %3F, @ as %40, [ as %5B, ] as %5D"
)
BAD_PORT = f"has a port that is not a number from 1 to {MAX_PORT}"
NOT_IN_WEB_ADDRESS = re.compile(r'[\x00-\x20\x7f-\xa0"<>\\^`{|}]')
LONGEST_LOCAL, LONGEST_DOMAIN = 64, 255
"""In characters (RFC 5321 §4.5.3.1). Nothing longer is looked at."""
HOST_NAME = re.compile(r"[\w-]+(\.[\w-]+)*\.?")


def fault_of_database_url(url: str) -> str | None:
    """Return why asyncpg could not use a database's address, or could use it otherwise than was meant; else None."""
    if not url.startswith(DATABASE_SCHEMES):
        return "must begin with postgresql:// (for example postgresql://user@host:5432/bon)"
    try:
        parts = urlsplit(url)
        query = _parameters(parts)
    except ValueError:
        return f"cannot be taken apart; {ENCODE}"
    if _is_astray(parts, url):
        return f"can be read in more than one way; {ENCODE}"
    servers = _servers(parts, query)
    if any(not host for host, _ in servers):
        return "names no host before or after a comma"
    ports = [port for _, port in servers if port] + (query["port"].split(",") if "port" in query else [])
    return None if all(map(_is_port, ports)) else f"{BAD_PORT}; {ENCODE}"


def _parameters(parts: SplitResult) -> dict[str, str]:
    return dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}


def _is_astray(parts: SplitResult, url: str) -> bool:
    """Whether a separator stands where only a user, a password or a name that is not encoded can have brought it."""
    nobody = "@" not in parts.netloc and ":" in parts.netloc
    return (
        re.search(r"[#\t\r\n]", url) is not None  # urlsplit drops the last three
        or parts.netloc.count("@") > 1
        or "@" in parts.path
        or (nobody and not parts.path and "@" in parts.query)
    )


def _servers(parts: SplitResult, query: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return host and port (empty: the usual one) of each server that is named; none: this machine's socket."""
    named = parts.netloc.rpartition("@")[2]
    if named:
        return [(unquote(host), unquote(port)) for host, port in map(_part_port, named.split(","))]
    return [_part_port(server) for server in query["host"].split(",")] if "host" in query else []


def _part_port(server: str) -> tuple[str, str]:
    if server.startswith("/"):
        return server, ""
    if server.startswith("["):
        host, _, rest = server[1:].partition("]")
        return host, rest.removeprefix(":")
    host, _, port = server.partition(":")
    return host, port


def _is_port(text: str) -> bool:
    return re.fullmatch("[0-9]{1,5}", text) is not None and 1 <= int(text) <= MAX_PORT


def describe_database(url: str) -> str:
    """Name the database and the servers of an address that has no fault, and nothing else of it."""
    parts = urlsplit(url)
    query = _parameters(parts)
    name = unquote(parts.path.lstrip("/")) or query.get("dbname") or query.get("database") or "(default)"
    servers = ", ".join(
        f"{f'[{host}]' if ':' in host else host}{f':{port}' if port else ''}" for host, port in _servers(parts, query)
    )
    return f"the database {name} at {servers or 'the local socket'}"


def fault_of_web_address(url: str, *, begins: bool = False, secret: bool = False) -> str | None:
    """Return why an http(s) address is of no use, else None. One that `begins` others is added to; a secret logs in."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return "must be an http(s) address such as https://app.example.com, with a port up to 65535 if with any"
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0:
        return "must be an http(s) address such as https://app.example.com"
    if NOT_IN_WEB_ADDRESS.search(url):
        return "must be an http(s) address without spaces, quotes or brackets; percent-encode them"
    if "@" in parts.netloc and not secret:
        return "must be an http(s) address without a user or password"
    if begins and ("?" in url or "#" in url):
        return "must be an http(s) address without ? and #, because it is the beginning of others"
    return None


def fault_of_host(host: str) -> str | None:
    """Return why the name or number of a host is none, else None."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not HOST_NAME.fullmatch(host):
            return "must be a host's name or number alone, without scheme, port, brackets or spaces"
    return None


@dataclass(frozen=True, slots=True)
class Mailbox:
    """One mailbox, as MAIL, RCPT and headers write it."""

    address: str = field(repr=False)
    utf8: bool
    """Whether a server has to offer SMTPUTF8 for it (RFC 6531): its local part is not ASCII."""


def read_mailbox(text: str) -> Mailbox | None:
    """
    Return the one mailbox that a text names, white space around it aside; None where it names none.

    The rules are email-validator's (RFC 5321, RFC 6531, IDNA 2008); nothing is asked of DNS. A list, a display name,
    a comment, a quoted local part, an address literal and what holds a control or a mark of direction are none.
    A domain outside ASCII is written in Punycode, so that any server takes it, unless the local part needs SMTPUTF8
    anyway. A reserved domain (`localhost`, `.test`, `.invalid`) and one without a dot are taken: a server of one's
    own may know them.
    """
    import email_validator as rules  # noqa: PLC0415 - commands that only look at the ledger read no address

    local, _, domain = text.strip().rpartition("@")
    last = domain.rpartition(".")[2]
    if len(local) > LONGEST_LOCAL or len(domain) > LONGEST_DOMAIN or (last.isascii() and last.isdigit()):
        return None
    # The library refuses reserved names; below `.example` it checks the rest of the domain.
    below = ".example" if last.casefold() in rules.SPECIAL_USE_DOMAIN_NAMES else ""
    # Dots in odd places are left to the server: telephone companies have given out such addresses.
    checked = local.replace(".", "") if local.isascii() else local
    try:
        read = rules.validate_email(
            f"{checked}@{domain}{below}", check_deliverability=False, globally_deliverable=False
        )
    except rules.EmailNotValidError:
        return None
    if read.smtputf8:
        return Mailbox(read.normalized.removesuffix(below), utf8=True)
    return Mailbox(f"{local}@{read.ascii_domain.removesuffix(below)}", utf8=False)
