# What other packages may use. Each name is imported when it is first asked for.

from .deliveries import (
    NotUncertainError as NotUncertainError,
    count_unknown as count_unknown,
    count_sent as count_sent,
    deliveries_of as deliveries_of,
    give_up_unanswered as give_up_unanswered,
    release as release,
    some_unknown as some_unknown,
)
from .gate import (
    MailGate as MailGate,
    gate_state as gate_state,
)
from .keys import (
    read_key as read_key,
    recipient_hash as recipient_hash,
)
from .mailer import (
    Mailer as Mailer,
    find_settled as find_settled,
)
from .message import (
    Letter as Letter,
    write as write,
)
from .replies import Delivery as Delivery
from .smtp import (
    NotConnectedError as NotConnectedError,
    try_login as try_login,
)
