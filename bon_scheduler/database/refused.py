"""
What a role may not do, told with the role's name and the way to what it lacks.

PostgreSQL's own words name the schema or table alone. The role is asked for over a connection of its own, because the
one that was refused is gone by then.
"""

import asyncpg

from bon_scheduler.config import Settings
from bon_scheduler.database.connections import Limits, connect
from bon_scheduler.database.unavailable import DatabaseUnavailableError

__all__ = ["RoleRefusedError", "explain_refused"]

LIMITS = Limits(3.0, 3.0)
WHO = """
    select quote_ident(current_user) as role, current_database() as database,
           quote_ident(current_database()) as quoted,
           (select quote_ident(pg_get_userbyid(nspowner)) from pg_namespace where nspname = 'bon_scheduler') as owner
"""


class RoleRefusedError(Exception):
    """The database's role lacks a privilege; the message says which role and what to do."""


async def explain_refused(settings: Settings, error: Exception, *, migrating: bool = False) -> RoleRefusedError:
    """Return what the role of these settings lacks, and the remedy; `migrating`: it is the schema's owner who may."""
    url = settings.listen_url if migrating else settings.database_url.get_secret_value()
    try:
        async with connect(url, pooled=True, limits=LIMITS) as connection:
            found = await connection.fetchrow(WHO)
    except (DatabaseUnavailableError, asyncpg.PostgresError, OSError):
        found = None
    role, where = (f"Role {found['role']}", f" in database {found['database']}") if found else ("The role", "")
    if not migrating:
        return RoleRefusedError(
            f"{role} lacks a privilege{where}: {error}. The GRANT lines for it are printed by: bon-scheduler check"
        )
    if found is None:
        remedy = "Migrate as the owner of the database."
    elif found["owner"] is None:
        remedy = f"Migrate as the database's owner, or have it run: grant create on database {found['quoted']} to "
        remedy += f"{found['role']};"
    else:
        remedy = f"Migrate as role {found['owner']}, which owns schema bon_scheduler."
    return RoleRefusedError(f"{role} may not migrate{where}: {error}. {remedy}")
