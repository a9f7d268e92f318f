"""A PostgreSQL with TLS, for the whole session."""

import asyncio
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
import trustme

from bon_scheduler.demo.postgres import PostgresUnavailableError, find_binaries, running_postgres
from tests.strangers import HBA, TlsServer, make_roles, own_address


@pytest.fixture(scope="session")
def outside() -> str:
    """An address of this machine that a client cannot tell from another machine's."""
    return own_address()


@pytest.fixture(scope="session")
def certificates() -> trustme.CA:
    """The authority of the server's certificate."""
    return trustme.CA()


@pytest.fixture(scope="session")
def tls_server(tmp_path_factory: pytest.TempPathFactory, outside: str, certificates: trustme.CA) -> Iterator[TlsServer]:
    """Run it for the whole session."""
    directory = tmp_path_factory.mktemp("tls")
    certificates.cert_pem.write_to_path(directory / "root.pem")
    trustme.CA().cert_pem.write_to_path(directory / "other.pem")
    for name, issued in {
        "server": certificates.issue_cert(outside, "localhost"),
        "client": certificates.issue_cert(common_name="certified"),
    }.items():
        issued.cert_chain_pems[0].write_to_path(directory / f"{name}.pem")
        issued.private_key_pem.write_to_path(directory / f"{name}.key")
        (directory / f"{name}.key").chmod(0o600)
    (directory / "hba.conf").write_text(HBA)
    settings = {
        "listen_addresses": f"127.0.0.1,{outside}",
        "hba_file": str(directory / "hba.conf"),
        "ssl": "on",
        "ssl_cert_file": str(directory / "server.pem"),
        "ssl_key_file": str(directory / "server.key"),
        "ssl_ca_file": str(directory / "root.pem"),
    }
    try:
        binaries = find_binaries("system")  # the wheel's is built without TLS
    except PostgresUnavailableError:
        pytest.skip("needs a PostgreSQL with TLS: apt-get install postgresql")
    with running_postgres(binaries, settings=settings) as url:
        asyncio.run(make_roles(url))
        yield TlsServer(outside, urlsplit(url).port or 0, directory)
