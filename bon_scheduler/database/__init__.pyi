# What other packages may use. Each name is imported when it is first asked for.

from .connections import (
    Limits as Limits,
    DatabaseUnavailableError as DatabaseUnavailableError,
    Pool as Pool,
    PoolerError as PoolerError,
    Pools as Pools,
    TRANSIENT_ERRORS as TRANSIENT_ERRORS,
    connect as connect,
    connect_worker as connect_worker,
    migrating as migrating,
    open_control_pool as open_control_pool,
    open_pool as open_pool,
)
from .endpoints import (
    OtherDatabaseError as OtherDatabaseError,
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
    missing_indexes as missing_indexes,
)
from .migrations import (
    SchemaBehindError as SchemaBehindError,
    migration_sql as migration_sql,
    require_schema as require_schema,
)
