"""A role that works with what it was granted and nothing else, as the one of a careful operator."""

from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from bon_scheduler.database.contract import USES, Privilege, privileges
from tests.conftest import Connection


@dataclass(frozen=True, slots=True)
class Role:
    """A role, as SQL writes it, and the address of the database for it."""

    name: str
    url: str


@asynccontextmanager
async def limited_role(connection: Connection, url: str, *, ours: bool = True) -> AsyncIterator[Role]:
    """Make a role that may log in and use both schemas, and where `ours` our tables and functions."""
    plain = f"Limited_{await connection.fetchval('select current_database()')}"
    name = f'"{plain}"'  # a name that must be quoted
    await connection.execute(
        f"create role {name} login; grant usage on schema public, bon_scheduler to {name};"
        f" alter role {name} set synchronous_commit to on"  # the server of the tests has it off
    )
    if ours:
        await connection.execute(
            f"grant select, insert, update, delete on all tables in schema bon_scheduler to {name};"
            f" grant execute on all functions in schema bon_scheduler to {name}"
        )
    parts = urlsplit(url)
    there = f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname
    try:
        yield Role(name, urlunsplit(parts._replace(netloc=f"{plain}@{there}")))
    finally:
        await connection.execute(f"drop owned by {name}; drop role {name}")


def what(privilege: Privilege) -> str:
    """A privilege as GRANT and REVOKE name it."""
    kind = "update" if privilege.kind == "lock" else privilege.kind
    column = f" ({privilege.column})" if privilege.column else ""
    return f"{kind}{column} on public.{privilege.table}"


async def grant(connection: Connection, role: Role, wanted: Iterable[Privilege]) -> None:
    for privilege in wanted:
        await connection.execute(f"grant {what(privilege)} to {role.name}")


async def revoke(connection: Connection, role: Role, privilege: Privilege) -> None:
    await connection.execute(f"revoke {what(privilege)} from {role.name}")


def all_privileges() -> list[Privilege]:
    """All that anything of ours needs, each once; no lock where a column is changed anyhow."""
    wanted = dict.fromkeys(privilege for user in USES for privilege in privileges(user))
    changed = {privilege.table for privilege in wanted if privilege.kind == "update"}
    return [each for each in wanted if each.kind != "lock" or each.table not in changed]


def columns(wanted: Iterable[Privilege]) -> Iterator[tuple[str, str]]:
    """The columns that privileges name."""
    return ((each.table, each.column) for each in wanted if each.column)
