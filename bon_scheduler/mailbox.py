"""
Whether a text is one mailbox, and how its address is written to a mail server.

The rules are email-validator's (RFC 5321, RFC 6531, IDNA 2008), without a question to DNS. It is loaded when the first
address is read, because commands that only look at the ledger read none.
"""

from dataclasses import dataclass, field

__all__ = ["Mailbox", "read_mailbox"]

LONGEST_LOCAL, LONGEST_DOMAIN = 64, 255
"""In characters (RFC 5321 §4.5.3.1). Nothing longer is looked at."""


@dataclass(frozen=True, slots=True)
class Mailbox:
    """One mailbox, as MAIL, RCPT and headers write it."""

    address: str = field(repr=False)
    utf8: bool
    """Whether a server has to offer SMTPUTF8 for it (RFC 6531): its local part is not ASCII."""


def read_mailbox(text: str) -> Mailbox | None:
    """
    Return the one mailbox that a text names, white space around it aside; None where it names none.

    A list, a display name, a comment, a quoted local part, an address literal and a control character are none. A
    domain outside ASCII is written in Punycode, so that any server takes it, unless the local part needs SMTPUTF8
    anyway. A reserved domain (`localhost`, `.test`, `.invalid`) and one without a dot are taken: a server of one's
    own may know them.
    """
    from email_validator import SPECIAL_USE_DOMAIN_NAMES, EmailNotValidError, validate_email  # noqa: PLC0415 - see above

    local, _, domain = text.strip().rpartition("@")
    last = domain.rpartition(".")[2]
    if len(local) > LONGEST_LOCAL or len(domain) > LONGEST_DOMAIN or (last.isascii() and last.isdigit()):
        return None
    # The library refuses reserved names; below `.example` it checks the rest of the domain.
    below = ".example" if last.casefold() in SPECIAL_USE_DOMAIN_NAMES else ""
    # Dots in odd places are left to the server: telephone companies have given out such addresses.
    checked = local.replace(".", "") if local.isascii() else local
    try:
        read = validate_email(f"{checked}@{domain}{below}", check_deliverability=False, globally_deliverable=False)
    except EmailNotValidError:
        return None
    if read.smtputf8:
        return Mailbox(read.normalized.removesuffix(below), utf8=True)
    return Mailbox(f"{local}@{read.ascii_domain.removesuffix(below)}", utf8=False)
