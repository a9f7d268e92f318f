# What other packages may use. Each name is imported when it is first asked for.

from .database import (
    DatabaseAddress as DatabaseAddress,
    describe_database as describe_database,
    read_database_address as read_database_address,
)
from .mailbox import (
    Mailbox as Mailbox,
    read_mailbox as read_mailbox,
)
from .tls import (
    Protection as Protection,
    TlsMode as TlsMode,
)
from .web import (
    fault_of_host as fault_of_host,
    fault_of_web_address as fault_of_web_address,
)
