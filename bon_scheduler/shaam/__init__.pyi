# What other packages may use. Each name is imported when it is first asked for.

from .cipher import (
    TokenCipher as TokenCipher,
    UnreadableTokenError as UnreadableTokenError,
)
from .client import (
    Shaam as Shaam,
)
from .consent import (
    ConsentBrake as ConsentBrake,
    begin_run as begin_run,
    choose_one as choose_one,
    close_held_run as close_held_run,
    consent_brake as consent_brake,
    end_run as end_run,
    hold_run as hold_run,
    release_after_success as release_after_success,
    release_consent_brake as release_consent_brake,
)
from .refreshes import (
    Credential as Credential,
)
from .results import (
    Result as Result,
    Tell as Tell,
)
from .rotation import (
    Rotator as Rotator,
)
from .spool import (
    count_files as count_files,
)
from .standing import (
    find_standing as find_standing,
    summarise as summarise,
)
