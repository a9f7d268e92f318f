"""
How a connection to a database is protected: by its address, and by libpq's variables where these ask for more.

Off this machine it is encrypted unless the address says `sslmode=disable` in so many words, so that neither a server
nor whoever stands before it can talk a client out of encryption and be handed the password.
"""

import os
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

__all__ = ["Protection", "Tls", "TlsMode", "read_tls"]

SYSTEM = "system"
FILES = ("sslrootcert", "sslcert", "sslkey", "sslpassword", "sslcrl", "sslcrldir")
VERSIONS = {"ssl_min_protocol_version": "minimum_version", "ssl_max_protocol_version": "maximum_version"}
KNOWN_VERSIONS = ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")
ENCRYPTED = ("require", "verify-ca", "verify-full")
AT_HOME = {
    "sslrootcert": "root.crt",
    "sslcrl": "root.crl",
    "sslcert": "postgresql.crt",
    "sslkey": "postgresql.key",
}
"""Where libpq looks, in ~/.postgresql, for what nobody names."""
VARIABLES = {
    "sslrootcert": "PGSSLROOTCERT",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
    "sslcrl": "PGSSLCRL",
    "sslcrldir": "PGSSLCRLDIR",
    "sslnegotiation": "PGSSLNEGOTIATION",
    "ssl_min_protocol_version": "PGSSLMINPROTOCOLVERSION",
    "ssl_max_protocol_version": "PGSSLMAXPROTOCOLVERSION",
}
"""libpq's, for what the address does not say."""
HOW = "see docs/operations.md, The way to the database"


class TlsMode(StrEnum):
    """What is asked of a connection, from nothing to everything."""

    DISABLE = "disable"
    PREFER = "prefer"
    REQUIRE = "require"
    VERIFY_CA = "verify-ca"
    VERIFY_FULL = "verify-full"


class Protection(NamedTuple):
    """What a connection is safe from, in words, and the remedy where that is not enough."""

    what: str
    remedy: str | None


@dataclass(frozen=True, slots=True)
class Tls:
    """The protection that one address asks for. `local`: each of its servers is this machine."""

    mode: TlsMode
    local: bool
    direct: bool
    files: Mapping[str, str] = field(repr=False)
    """By parameter. Without `sslrootcert` nothing is verified."""
    versions: Mapping[str, str]

    @property
    def protection(self) -> Protection:
        """Say what the connection is safe from."""
        root = self.files.get("sslrootcert")
        if self.local:
            return Protection("the connection stays on this machine", None)
        if self.mode is TlsMode.DISABLE:
            what = "the connection is not encrypted: whoever is on its way reads the password and every row"
            remedy = f"Unless the network is private, write sslmode=verify-full and sslrootcert in the address; {HOW}."
            return Protection(what, remedy)
        if root is None:
            what = "the connection is encrypted, but who answers is not verified: whoever is on its way can pose as it"
            return Protection(what, f"Write sslmode=verify-full and sslrootcert in the address; {HOW}.")
        verified = "and its name" if self.mode is TlsMode.VERIFY_FULL else "but not its name"
        return Protection(f"the connection is encrypted, and the server's certificate {verified} verified", None)

    def context(self) -> ssl.SSLContext | str | bool:
        """Return what asyncpg takes for `ssl`; raise ValueError naming the parameter whose file is of no use."""
        if self.mode is TlsMode.DISABLE:
            return False
        if self.mode is TlsMode.PREFER:
            return "prefer"
        root = self.files.get("sslrootcert")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = self.mode is TlsMode.VERIFY_FULL
        context.verify_mode = ssl.CERT_NONE if root is None else ssl.CERT_REQUIRED
        if root == SYSTEM:
            context.load_default_certs()
        elif root is not None:
            _load("sslrootcert", lambda: context.load_verify_locations(cafile=root))
        crl, crldir = self.files.get("sslcrl"), self.files.get("sslcrldir")
        if root is not None and (crl or crldir):
            name = "sslcrl" if crl else "sslcrldir"
            _load(name, lambda: context.load_verify_locations(cafile=crl, capath=crldir))
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_CHAIN
        if cert := self.files.get("sslcert"):
            key, password = self.files.get("sslkey"), self.files.get("sslpassword", "")
            _load("sslcert or sslkey", lambda: context.load_cert_chain(cert, key, lambda: password))
        for name, version in self.versions.items():
            setattr(context, VERSIONS[name], ssl.TLSVersion[version.replace(".", "_")])
        context.set_alpn_protocols(["postgresql"])  # a server asks for it that is addressed in TLS from the first byte
        return context


def _load(name: str, load: Callable[[], None]) -> None:
    try:
        load()
    except (OSError, ValueError) as error:
        # An ssl.SSLError is an OSError, and its words are OpenSSL's.
        why = error.strerror if isinstance(error, OSError) and not isinstance(error, ssl.SSLError) else None
        why = why or "no certificate or key in PEM, or the wrong one"
        raise ValueError(f"parameter {name} names a file that is of no use ({why})") from None


def read_tls(query: Mapping[str, str], *, local: bool) -> Tls:
    """Return the protection that an address's parameters ask for; raise ValueError naming what contradicts itself."""
    said = _said(query)
    files = {name: text for name in FILES if (text := _told(name, query))}
    if query.get("sslrootcert") == SYSTEM and said not in {None, "verify-full"}:
        raise ValueError("parameter sslrootcert=system goes with sslmode=verify-full only")
    mode = _mode(said, files, local=local)
    direct = _told("sslnegotiation", query) == "direct"
    if direct and mode not in ENCRYPTED and query.get("sslnegotiation"):
        raise ValueError("parameter sslnegotiation=direct needs sslmode=require, verify-ca or verify-full")
    if mode in ENCRYPTED:
        files = {**_at_home(), **files}
    if said == "no-verify" or (query.get("sslaccept") == "accept_invalid_certs" and mode is TlsMode.REQUIRE):
        files.pop("sslrootcert", None)
    if query.get("sslaccept") == "strict":
        files.setdefault("sslrootcert", SYSTEM)
    if query.get("sslcertmode") == "disable":
        files.pop("sslcert", None)
    if mode in {TlsMode.VERIFY_CA, TlsMode.VERIFY_FULL} and "sslrootcert" not in files:
        raise ValueError(
            f"parameter sslmode={mode} needs sslrootcert: the file of the authority's certificate, or system for those "
            "that this machine trusts"
        )
    if mode is TlsMode.REQUIRE and "sslrootcert" in files:
        mode = TlsMode.VERIFY_CA  # as libpq does
    versions = {name: text for name in VERSIONS if (text := _told(name, query)) in KNOWN_VERSIONS}
    return Tls(mode, local, direct and mode in ENCRYPTED, files, versions)


def _said(query: Mapping[str, str]) -> str | None:
    """Return the mode that the address says in libpq's word or another client's."""
    said = query.get("sslmode") or query.get("ssl")
    if said == "disable":
        return said
    if "sslaccept" in query:
        return "verify-full" if query["sslaccept"] == "strict" else said or "no-verify"
    return "require" if said in {"true", "1"} else said


def _mode(said: str | None, files: Mapping[str, str], *, local: bool) -> TlsMode:
    if said == "disable":
        return TlsMode.DISABLE
    if said in ENCRYPTED:
        return TlsMode(said)
    if said == "no-verify":
        return TlsMode.REQUIRE
    if said is None and files.get("sslrootcert") == SYSTEM:
        return TlsMode.VERIFY_FULL
    outside = os.environ.get("PGSSLMODE", "")
    if said is None and outside in ENCRYPTED:
        return TlsMode(outside)
    return TlsMode.PREFER if local else TlsMode.REQUIRE


def _told(name: str, query: Mapping[str, str]) -> str | None:
    """Return what the address says, else what libpq's variable does."""
    return query.get(name) or os.environ.get(VARIABLES.get(name, ""))


def _at_home() -> dict[str, str]:
    try:
        directory = Path.home() / ".postgresql"
        return {name: str(path) for name, file in AT_HOME.items() if (path := directory / file).is_file()}
    except (RuntimeError, OSError):
        return {}  # nobody's home, or none that may be entered
