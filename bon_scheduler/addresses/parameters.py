"""
What becomes of each parameter of a database's address: used, ignored because nothing is lost, or refused.

The names are those of libpq (PostgreSQL 18) and those that clients of other languages add to the same address. What
asks for a protection that cannot be given is refused, never ignored. A fault names the parameter, never its value.
"""

import re
from collections.abc import Mapping

from bon_scheduler.addresses.tls import KNOWN_VERSIONS

__all__ = ["IGNORED", "fault_of_parameters"]

FREE = frozenset(
    {
        *("host", "port", "dbname", "database", "user", "password", "passfile", "options", "krbsrvname"),
        *("sslrootcert", "sslcert", "sslkey", "sslpassword", "sslcrl", "sslcrldir"),
    }
)
"""Used, whatever their values."""

VERSIONS = frozenset(KNOWN_VERSIONS)
UTF8 = frozenset({"auto", "utf8", "UTF8", "utf-8", "UTF-8", "unicode", "UNICODE"})
SCHEMA = (frozenset({"public"}), "must be public: BON's tables are looked for there and nowhere else; leave it out")
ONE_OF_THESE: Mapping[str, tuple[frozenset[str], str]] = {
    "sslmode": (
        frozenset({"disable", "allow", "prefer", "require", "verify-ca", "verify-full", "no-verify"}),
        "must be disable, allow, prefer, require, verify-ca or verify-full",
    ),
    "ssl": (
        frozenset({"true", "1", "require", "verify-ca", "verify-full", "no-verify"}),
        "must be true or require; to go without encryption write sslmode=disable",
    ),
    "sslaccept": (frozenset({"strict", "accept_invalid_certs"}), "must be strict or accept_invalid_certs"),
    "sslnegotiation": (frozenset({"postgres", "direct"}), "must be postgres or direct"),
    "sslcertmode": (
        frozenset({"disable", "allow"}),
        "must be disable or allow: whether the server asks for a certificate cannot be seen",
    ),
    "sslsni": (frozenset({"1"}), "must be 1: the server's name is always sent"),
    "sslcompression": (frozenset({"0", "1"}), "must be 0 or 1, and changes nothing: TLS does not compress any more"),
    "ssl_min_protocol_version": (VERSIONS, "must be TLSv1, TLSv1.1, TLSv1.2 or TLSv1.3"),
    "ssl_max_protocol_version": (VERSIONS, "must be TLSv1, TLSv1.1, TLSv1.2 or TLSv1.3"),
    "target_session_attrs": (
        frozenset({"any", "read-write", "primary"}),
        "must be any, read-write or primary: this service writes",
    ),
    "targetServerType": (frozenset({"any", "primary", "master"}), "must be any or primary: this service writes"),
    "load_balance_hosts": (frozenset({"disable", "random"}), "must be disable or random"),
    "gssencmode": (
        frozenset({"disable", "prefer"}),
        "must be disable or prefer: GSSAPI does not encrypt here, sslmode=verify-full does",
    ),
    "gssdelegation": (frozenset({"0"}), "must be 0: no credentials are delegated"),
    "gsslib": (frozenset({"gssapi"}), "must be gssapi"),
    "replication": (frozenset({"false", "off", "no", "0"}), "must be false: this service speaks SQL"),
    "client_encoding": (UTF8, "must be UTF8"),
    "encoding": (UTF8, "must be UTF8"),
    "keepalives": (frozenset({"0", "1"}), "must be 0 or 1"),
    "min_protocol_version": (frozenset({"3.0"}), "must be 3.0, the version of the protocol that is spoken"),
    "max_protocol_version": (frozenset({"3.0", "3.2", "latest"}), "must be 3.0, 3.2 or latest"),
    "schema": SCHEMA,
    "currentSchema": SCHEMA,
    "search_path": SCHEMA,
}
"""Used or of no effect with these values; with others refused, for the reason."""

NUMBERS: Mapping[str, tuple[int, str]] = {
    "connect_timeout": (2**31 - 1, "a whole number of seconds"),
    "keepalives_idle": (32_767, "a whole number of seconds up to 32767"),
    "keepalives_interval": (32_767, "a whole number of seconds up to 32767"),
    "keepalives_count": (127, "a whole number up to 127"),
    "tcp_user_timeout": (2**31 - 1, "a whole number of milliseconds"),
}

OUR_NAME = "the session has a name of ours, by which a successor ends the connections of a worker that died"
OUR_POOL = "DATABASE_POOL_SIZE and the service's own limits say it"
OUR_LIMITS = "each session sets limits of our own, whatever the address says"
FOUND_OUT = "whether a pooler lies in between is found out; DATABASE_LISTEN_URL says where the server is"
OTHER_DRIVER = "it tells another driver how to work; nothing of the server or the connection's protection"
IGNORED: Mapping[str, str] = {
    **dict.fromkeys(("application_name", "fallback_application_name", "ApplicationName"), OUR_NAME),
    **dict.fromkeys(
        (
            *("connection_limit", "pool_timeout", "max_connection_lifetime", "max_idle_connection_lifetime"),
            *("pool", "pool_size", "max_overflow", "checkout_timeout", "reaping_frequency", "idle_timeout"),
            *("pool_max_conns", "pool_min_conns", "pool_max_conn_lifetime", "pool_max_conn_idle_time"),
            *("pool_health_check_period", "max", "min", "max_lifetime", "idleTimeoutMillis"),
            *("conn_max_age", "conn_health_checks"),
        ),
        OUR_POOL,
    ),
    **dict.fromkeys(
        (
            *("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout", "query_timeout"),
            *("socket_timeout", "socketTimeout", "command_timeout", "loginTimeout", "connectionTimeoutMillis"),
            *("tcpKeepAlive", "timezone", "TimeZone"),
        ),
        OUR_LIMITS,
    ),
    "pgbouncer": FOUND_OUT,
    **dict.fromkeys(
        (
            *("uselibpqcompat", "prepareThreshold", "preparedStatementCacheQueries", "preparedStatementCacheSizeMiB"),
            *("preferQueryMode", "reWriteBatchedInserts", "stringtype", "binaryTransfer", "defaultRowFetchSize"),
            *("autosave", "loadBalanceHosts", "statement_cache_size", "statement_cache_capacity"),
            *("description_cache_capacity", "default_query_exec_mode", "binary_parameters"),
            *("prepared_statement_cache_size", "async_fallback", "prepared_statements", "statement_limit"),
            *("advisory_locks", "adapter", "prepare", "fetch_types", "debug"),
        ),
        OTHER_DRIVER,
    ),
}

NO_SUCH_PROOF = "cannot be kept here; leave it out, and write sslmode=verify-full with sslrootcert for as much"
VERIFY_INSTEAD = "is a Java class that decides what is verified; write sslmode and sslrootcert instead"
REFUSED: Mapping[str, str] = {
    "hostaddr": "is not used; write the number as the host, or leave the name alone",
    "service": "is not read; write what the service's file says into the address",
    "servicefile": "is not read; write what the service's file says into the address",
    "require_auth": NO_SUCH_PROOF,
    "requirepeer": "cannot be kept here; leave it out",
    "sslkeylogfile": "would write down the keys of every connection; leave it out",
    "sslidentity": "is a PKCS 12 file; write its halves as PEM files in sslcert and sslkey",
    **dict.fromkeys(("sslfactory", "sslhostnameverifier", "socketFactory"), VERIFY_INSTEAD),
    **dict.fromkeys(("scram_client_key", "scram_server_key"), "is not used; write the password"),
    **dict.fromkeys(
        ("oauth_issuer", "oauth_client_id", "oauth_client_secret", "oauth_scope"),
        "is not used: no OAuth here; write a password or a client certificate",
    ),
}
A_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{1,40}")


def fault_of_parameters(query: Mapping[str, str]) -> str | None:
    """Return the first parameter that is refused and why, else None."""
    for name, value in query.items():
        if what := _fault(name, value, query):
            return what
    return None


def _fault(name: str, value: str, query: Mapping[str, str]) -> str | None:
    if name in FREE or name in IGNORED:
        return None
    if name in REFUSED:
        return f"parameter {name} {REFUSED[name]}"
    if name in ONE_OF_THESE:
        values, must = ONE_OF_THESE[name]
        return None if value in values else f"parameter {name} {must}"
    if name in NUMBERS:
        highest, what = NUMBERS[name]
        usable = re.fullmatch("-?[0-9]{1,10}", value) is not None and int(value) <= highest
        return None if usable else f"parameter {name} must be {what}"
    if name == "channel_binding":
        # What it proves, that nobody stands in between, a verified certificate proves as well.
        verified = query.get("sslmode") == "verify-full" or query.get("sslrootcert") == "system"
        proven = value == "require" and verified
        must = "must be disable or prefer, or require beside sslmode=verify-full: there is no channel binding here"
        return None if value in {"disable", "prefer"} or proven else f"parameter {name} {must}"
    # An @ behind it may be what a password is torn apart by: then this is a piece of one.
    shown = f" {name}" if A_NAME.fullmatch(name) and not any("@" in text for text in query.values()) else ""
    return f"has a parameter{shown} that is neither libpq's nor one that is known to be of no effect; leave it out"
