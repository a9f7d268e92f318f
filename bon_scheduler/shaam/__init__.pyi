# What other packages may use. Each name is imported when it is first asked for.

from .cipher import (
    TokenCipher as TokenCipher,
    UnreadableTokenError as UnreadableTokenError,
)
from .client import (
    Shaam as Shaam,
)
from .refreshes import (
    Credential as Credential,
)
from .results import (
    Result as Result,
)
from .rotation import (
    Rotator as Rotator,
    Tell as Tell,
)
from .spool import (
    count_files as count_files,
)
from .standing import (
    find_standing as find_standing,
    summarise as summarise,
)
