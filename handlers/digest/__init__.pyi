# What jobs use. Each name is imported when it is first asked for.

from .mailing import (
    LETTER_COUNTS as LETTER_COUNTS,
    count_left_out as count_left_out,
    deliver_each as deliver_each,
    refuse_day_to_come as refuse_day_to_come,
    told as told,
    why_not_sent as why_not_sent,
)
from .rendering import (
    render as render,
    render_digest as render_digest,
)
from .statement import (
    DIGEST_KIND as DIGEST_KIND,
    Ageing as Ageing,
    OverdueInvoice as OverdueInvoice,
    Statement as Statement,
    is_paused as is_paused,
    read_recipients as read_recipients,
    read_statement as read_statement,
)
