"""Which mailbox an address names, if any."""

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

    The rules are email-validator's (RFC 5321, RFC 6531, IDNA 2008); nothing is asked of DNS. A list, a display name,
    a comment, a quoted local part, an address literal and what holds a control or a mark of direction are none.
    A domain outside ASCII is written in Punycode, so that any server takes it, unless the local part needs SMTPUTF8
    anyway. A reserved domain (`localhost`, `.test`, `.invalid`) and one without a dot are taken: a server of one's
    own may know them.
    """
    import email_validator as rules  # noqa: PLC0415 - commands that only look at the ledger read no address

    local, _, domain = text.strip().rpartition("@")
    last = domain.rpartition(".")[2]
    if len(local) > LONGEST_LOCAL or len(domain) > LONGEST_DOMAIN or (last.isascii() and last.isdigit()):
        return None
    # The library refuses reserved names; below `.example` it checks the rest of the domain.
    below = ".example" if last.casefold() in rules.SPECIAL_USE_DOMAIN_NAMES else ""
    # Dots in odd places are left to the server: telephone companies have given out such addresses.
    checked = local.replace(".", "") if local.isascii() else local
    try:
        read = rules.validate_email(
            f"{checked}@{domain}{below}", check_deliverability=False, globally_deliverable=False
        )
    except rules.EmailNotValidError:
        return None
    if read.smtputf8:
        return Mailbox(read.normalized.removesuffix(below), utf8=True)
    return Mailbox(f"{local}@{read.ascii_domain.removesuffix(below)}", utf8=False)
