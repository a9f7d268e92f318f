"""How many connections the role, the database and the server have for us, and how many others use of them."""

from dataclasses import dataclass

from bon_scheduler.jobs import Connection

__all__ = ["Room", "how_much_room"]

# The role that logged in counts, whatever it became. Superusers are exempt from the limits of role and database, and
# the server keeps some connections for them. Connections of ours are those with our name.
ROOM = """
      with others as (
               select a.usesysid, a.datid
                 from pg_stat_activity a
                where a.usesysid is not null
                  and a.datid is not null
                  and a.application_name not like 'bon\\_scheduler%'
           )
    select 'role ' || quote_ident(r.rolname) as of,
           nullif(r.rolconnlimit, -1) as most,
           (select count(*) from others o where o.usesysid = r.oid) as others,
           format('alter role %I connection limit ', r.rolname) as remedy
      from pg_roles r
     where r.rolname = session_user and not r.rolsuper
     union all
    select 'database ' || quote_ident(d.datname),
           nullif(d.datconnlimit, -1),
           (select count(*) from others o where o.datid = d.oid),
           format('alter database %I connection limit ', d.datname)
      from pg_database d
     where d.datname = current_database()
       and not (select r.rolsuper from pg_roles r where r.rolname = session_user)
     union all
    select 'the server',
           current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
           - coalesce(current_setting('reserved_connections', true)::int, 0),
           (select count(*) from others),
           null
"""


@dataclass(frozen=True, slots=True)
class Room:
    """A limit of connections."""

    of: str
    most: int | None
    """None: as many as the server takes."""
    others: int
    """Connections within it that are not ours."""
    remedy: str | None
    """The statement that sets another limit, without the number; None: the server's configuration."""


async def how_much_room(connection: Connection) -> list[Room]:
    """Return the limits that apply to the connection's role, its database and the server, in this order."""
    return [Room(**row) for row in await connection.fetch(ROOM)]
