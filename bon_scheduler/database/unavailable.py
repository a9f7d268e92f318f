"""
Why a database cannot be had, one sentence for each reason, and its remedy.

Names the database and its servers, never a user, a password or what a server wrote. Whether PostgreSQL runs is asked
only where nothing answered.
"""

import errno
import os
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import asyncpg

from bon_scheduler.addresses import DatabaseAddress, TlsMode
from bon_scheduler.log import describe_error

__all__ = ["CertificateFileError", "DatabaseUnavailableError", "PoolerError", "explain_unavailable"]

UNSUPPORTED_STARTUP = "unsupported startup parameter"
NOTHING_ANSWERED = frozenset(
    getattr(errno, name)
    for name in ("ECONNREFUSED", "ETIMEDOUT", "EHOSTUNREACH", "ENETUNREACH", "EHOSTDOWN", "ENETDOWN", "ENOENT")
)
HOW = "docs/operations.md, The way to the database"
LOGIN = "refuses the user or the password of DATABASE_URL. Check both."
NO_ROLE = "refuses the role of DATABASE_URL: there is none of that name, or it may not log in. Create it with LOGIN."
MISSING = "does not exist. Create it, or correct DATABASE_URL."
ENDED = (
    "was answered for, and the connection was ended without a word. Either something other than PostgreSQL answers at "
    "that port, or a proxy does whose server is away: check host and port of DATABASE_URL."
)
TOO_OLD = (
    "ended the connection: a server before version 17, and many a proxy, cannot be addressed in TLS from the first "
    "byte. Take sslnegotiation=direct out of DATABASE_URL."
)
BY_STATE: Mapping[str, str] = {
    "28P01": LOGIN,
    "3D000": MISSING,
    "42501": "does not admit the role of DATABASE_URL. Have its owner run: grant connect on database … to that role.",
    "53300": (
        "takes no more connections: the server, the database or the role is at its limit. Raise that limit, or lower "
        "DATABASE_POOL_SIZE or the number of replicas."
    ),
    "55000": "is closed to everybody. Have its owner run: alter database … with allow_connections true.",
    "57P03": "is starting up, shutting down or recovering. Try again in a moment; its log says what it waits for.",
    "57P01": "is shutting down, or an operator ended the connection. Try again in a moment.",
    "57P02": "is restarting after a crash of one of its processes. Try again in a moment.",
}
POOLER_ALONE = (
    "is behind a pooler that has no connection to the server to give. Start the server, or raise default_pool_size of "
    "the pooler; its log says which."
)
BY_POOLERS_WORDS: Mapping[str, str] = {
    "no such database": MISSING,
    "no such user": LOGIN,
    "auth failed": LOGIN,
    "password authentication failed": LOGIN,
    "no more connections": BY_STATE["53300"],
    "server_login_retry": POOLER_ALONE,
    "cannot connect to server": POOLER_ALONE,
    "query_wait_timeout": POOLER_ALONE,
    "shutting down": "is behind a pooler that is shutting down. Try again in a moment.",
    "SSL required": "is behind a pooler that asks for encryption. Write sslmode=require in DATABASE_URL.",
}
"""PgBouncer has words of its own for most of this, and one SQLSTATE."""
OF_OPTIONS = frozenset({"22023", "42704", "42601"})
"""A setting that is none, one without that value, and what is no setting."""
WRONG_NAME = frozenset({62, 64})
"""OpenSSL's codes of a certificate that is another host's, and another number's."""


class DatabaseUnavailableError(Exception):
    """The database cannot be reached or refuses us; the message says where and what to do."""


class PoolerError(Exception):
    """An address leads through a pooler that breaks what it is needed for; the message says the remedy."""


class CertificateFileError(OSError):
    """A file that an address names could be read when the service started, and cannot be now."""


@contextmanager
def explain_unavailable(address: DatabaseAddress, setting: str = "DATABASE_URL") -> Iterator[None]:
    """Turn what asyncpg raises while connecting into DatabaseUnavailableError, without credentials."""
    try:
        yield
    except (OSError, UnicodeError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
        if UNSUPPORTED_STARTUP in str(error):
            raise PoolerError(
                f"{address} is behind a connection pooler (PgBouncer). Set DATABASE_LISTEN_URL to the "
                "server's own address as well; DATABASE_URL may then go through the pooler."
            ) from error
        raise DatabaseUnavailableError(_explain(error, address).replace("DATABASE_URL", setting)) from error


def _explain(error: Exception, address: DatabaseAddress) -> str:
    if isinstance(error, asyncpg.PostgresError):
        what = _server_said(error, address)
    elif isinstance(error, ssl.SSLError):
        what = _tls_failed(error)
    elif isinstance(error, UnicodeError):
        what = "cannot be found: a host's name is too long to be one. Correct it."
    elif isinstance(error, OSError):
        what = _network_said(error, address)
    elif isinstance(error, asyncpg.TargetServerAttributeNotMatched):
        what = "has no server that can be written to, as target_session_attrs asks. Name the primary in DATABASE_URL."
    else:
        what = None
    return f"Cannot connect: {address} {what or f'fails ({describe_error(error)}). Read its log.'}"


def _server_said(error: asyncpg.PostgresError, address: DatabaseAddress) -> str | None:
    state = error.sqlstate
    if isinstance(error, asyncpg.ConnectionDoesNotExistError):
        return ENDED
    if state == "28P01" and not address.has_password:
        return "asks for a password, and DATABASE_URL has none. Write it there, percent-encoded, or name a passfile."
    if state == "28000":
        return _not_admitted(error, address)
    if state in OF_OPTIONS and address.options:
        return "refuses what the parameter options of DATABASE_URL sets. Correct it, or leave it out."
    if state in BY_STATE:
        return BY_STATE[state]
    return next((what for words, what in BY_POOLERS_WORDS.items() if words in str(error)), None)


def _not_admitted(error: asyncpg.PostgresError, address: DatabaseAddress) -> str:
    """Say what is wrong with a role, a certificate or pg_hba.conf: one SQLSTATE for all, and texts in any language."""
    if error.server_source_function == "InitializeSessionUserId":
        return NO_ROLE
    if error.server_source_function == "ClientAuthentication":
        unencrypted = address.tls.mode is TlsMode.DISABLE
        encryption = (
            " If it asks for encryption there, take sslmode=disable out of DATABASE_URL." if unencrypted else ""
        )
        return (
            "does not admit this machine with the role and the database of DATABASE_URL. Add a line for them to "
            f"pg_hba.conf, or give sslcert and sslkey if it asks for a certificate.{encryption}"
        )
    return "refuses the login that pg_hba.conf asks for. Check the user, and sslcert and sslkey, in DATABASE_URL."


def _tls_failed(error: ssl.SSLError) -> str:
    if not isinstance(error, ssl.SSLCertVerificationError):
        return (
            "and this machine cannot agree on TLS. Check sslcert, sslkey, ssl_min_protocol_version and sslnegotiation "
            "of DATABASE_URL, and the server's own settings."
        )
    if error.verify_code in WRONG_NAME:
        return (
            "shows a certificate of another name. Name the server in DATABASE_URL as its certificate does, or write "
            "sslmode=verify-ca if its authority signs for nobody else."
        )
    return (
        f"shows a certificate that is not trusted ({error.verify_message}). Write sslrootcert with the file of the "
        f"authority that signed it, or renew it: {HOW}."
    )


def _network_said(error: OSError, address: DatabaseAddress) -> str | None:
    words = str(error)
    if isinstance(error, TimeoutError):
        return "does not answer in time. Is PostgreSQL running there, does DATABASE_URL name it, is a firewall between?"
    if isinstance(error, socket.gaierror):
        return f"cannot be found: a host's name does not resolve ({error.strerror}). Correct it, or mend the DNS."
    if isinstance(error, CertificateFileError):
        return f"cannot be asked: of DATABASE_URL the {error}. Mend the file."
    if isinstance(error, PermissionError):
        return "has a socket that this user may not open. Give it the right, or name a host in DATABASE_URL."
    if error.errno in NOTHING_ANSWERED or words.startswith("Multiple exceptions"):
        why = os.strerror(error.errno) if error.errno else "none of its addresses does"
        return f"does not answer ({why}). Is PostgreSQL running there, and does DATABASE_URL name it?"
    return _connection_said(words, address) if isinstance(error, ConnectionError) else None


def _connection_said(words: str, address: DatabaseAddress) -> str:
    if "error response during SSL exchange" in words:
        return "ends the connection before it is encrypted. Read the server's log: it may be full or starting up."
    if "rejected SSL upgrade" not in words:
        return TOO_OLD if address.tls.direct else ENDED
    if address.tls.mode is TlsMode.PREFER:
        return "is not there: what answers is not PostgreSQL. Correct host and port of DATABASE_URL."
    return (
        "offers no encryption, and DATABASE_URL does not say that it may go without. Turn on ssl in the server; on a "
        "private network only, write sslmode=disable in DATABASE_URL. If what answers is not PostgreSQL, correct host "
        f"and port. See {HOW}."
    )
