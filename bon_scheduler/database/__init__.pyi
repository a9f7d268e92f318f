# What other packages may use. Each name is imported when it is first asked for.

from .connections import (
    Limits as Limits,
    Pool as Pool,
    Pools as Pools,
    TRANSIENT_ERRORS as TRANSIENT_ERRORS,
    connect as connect,
    connect_worker as connect_worker,
    migrating as migrating,
    open_control_pool as open_control_pool,
    open_pool as open_pool,
)
from .contract import (
    COLUMNS as COLUMNS,
    USES as USES,
    tables_of as tables_of,
)
from .endpoints import (
    OtherDatabaseError as OtherDatabaseError,
    protections as protections,
    require_endpoints as require_endpoints,
    require_same_database as require_same_database,
    require_sessions as require_sessions,
)
from .exact_json import (
    UnreadableJsonError as UnreadableJsonError,
    read_json as read_json,
    write_json as write_json,
)
from .indexes import (
    Advice as Advice,
    costs_of_marking as costs_of_marking,
    missing_indexes as missing_indexes,
    unindexed_searches as unindexed_searches,
)
from .migrations import (
    SchemaBehindError as SchemaBehindError,
    migration_sql as migration_sql,
    require_schema as require_schema,
)
from .outage import Outage as Outage
from .patience import MigrationBlockedError as MigrationBlockedError
from .refused import (
    RoleRefusedError as RoleRefusedError,
    explain_refused as explain_refused,
)
from .room import (
    Room as Room,
    how_much_room as how_much_room,
)
from .working import (
    WorkingSession as WorkingSession,
    look_at_session as look_at_session,
    offsets as offsets,
)
from .usability import (
    Function as Function,
    OtherColumn as OtherColumn,
    Refusal as Refusal,
    existing_tables as existing_tables,
    hidden_tables as hidden_tables,
    missing_columns as missing_columns,
    missing_tables as missing_tables,
    name_of as name_of,
    other_columns as other_columns,
    own_functions as own_functions,
    own_refusals as own_refusals,
    refusals as refusals,
)
from .unavailable import (
    DatabaseUnavailableError as DatabaseUnavailableError,
    PoolerError as PoolerError,
)
