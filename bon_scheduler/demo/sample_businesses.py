"""
The sample's businesses: who owns them, who buys from them, who is signed in, what SHAAM has granted them.

Every person, business and address is invented; addresses end in `.example`
(RFC 2606), so that no mail server anywhere would take them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal
from uuid import NAMESPACE_DNS, UUID, uuid5

__all__ = [
    "BUSINESSES",
    "BUSINESS_BY_KEY",
    "CUSTOMERS_PER_BUSINESS",
    "DUE_TOKENS",
    "RESTING_TOKENS",
    "SESSION_EXPIRIES",
    "SPOILED",
    "Business",
    "Customer",
    "Row",
    "Spoil",
    "business_rows",
    "credential_rows",
    "customer_rows",
    "customers_of",
    "identify",
    "member_rows",
    "recipients_of",
    "session_rows",
    "user_rows",
]

Row = tuple[object, ...]
Spoil = Literal["invalid_grant", "unavailable", "garbage"]

FOUNDED = timedelta(days=500)
"""How long ago people, businesses and customers were entered."""
VAT_RATE_BASIS_POINTS = 1800
CUSTOMERS_PER_BUSINESS = 5

_NAMESPACE = uuid5(NAMESPACE_DNS, "sample.bon.example")


def identify(*parts: object) -> UUID:
    """Return the id of what is named by `parts`: the same in every database."""
    return uuid5(_NAMESPACE, "/".join(map(str, parts)))


@dataclass(frozen=True, slots=True)
class Business:
    """A business of the sample. `owners` and `others` are keys of `PEOPLE`."""

    key: str
    name: str
    type: Literal["licensed_dealer", "exempt_dealer", "limited_company"]
    owners: tuple[str, ...]
    others: tuple[str, ...] = ()
    email: str | None = None
    closed: bool = False

    @property
    def id(self) -> UUID:
        """Return the business's id."""
        return identify("business", self.key)

    @property
    def vat_rate_basis_points(self) -> int:
        """Return what the business charges: an exempt dealer charges none."""
        return 0 if self.type == "exempt_dealer" else VAT_RATE_BASIS_POINTS


# Key: (name, address). The two of Te'ena are two accounts whose addresses differ only by case.
PEOPLE = {
    "oren": ("אורן לדוגמה", "oren@gan-hashaked.example"),
    "ela": ("אלה לדוגמה", "ela@gan-hashaked.example"),
    "erez": ("ארז לדוגמה", "erez@teena.example"),
    "erez-again": ("ארז לדוגמה (חשבון ישן)", "Erez@Teena.Example"),
    "gefen": ("גפן לדוגמה", "gefen@keshet-print.example"),
    "dekel": ("דקל לדוגמה", "dekel@ale-vegeza.example"),
    "hadas": ("הדס לדוגמה", "hadas@nitzotz.example"),
    "zait": ("זית לדוגמה", "zait@derech-aruka.example"),
    "yaara": ("יערה לדוגמה", "yaara@madaf.example"),
    "carmel": ("כרמל לדוגמה", "carmel@giva-kchula.example"),
    "luz": ("לוז לדוגמה", "luz@or-rishon.example"),
    "narkis": ("נרקיס לדוגמה", "narkis@roga.example"),
    "sigal": ("סיגל לדוגמה", "sigal@tzuk.example"),
    "clerk": ("הנהלת חשבונות לדוגמה", "books@hanhala.example"),
}

BUSINESSES = (
    # Two owners, and a clerk who is neither owner nor addressee.
    Business("gan", "גן השקד אדריכלות נוף בע״מ", "limited_company", ("oren", "ela"), ("clerk",)),
    Business("shibolet", 'מאפיית "שיבולת" ובניה בע"מ', "limited_company", ("oren",)),
    Business("teena", "סטודיו תאנה", "licensed_dealer", ("erez", "erez-again")),
    Business("keshet", "דפוס קשת", "licensed_dealer", ("gefen",)),
    Business("ale", "עלה וגזע טכנולוגיות בע״מ", "limited_company", ("dekel", "oren")),
    Business("nitzotz", "ניצוץ עבודות חשמל", "licensed_dealer", ("hadas",)),
    Business("derech", "הדרך הארוכה הובלות", "licensed_dealer", ("zait",)),
    Business("madaf", "מדף שלישי – ספרים", "exempt_dealer", ("yaara",)),
    Business("giva", "יקב הגבעה הכחולה בע״מ", "limited_company", ("carmel",)),
    Business("or", "אור ראשון צילום", "exempt_dealer", ("luz",)),
    # Its owner never consented to SHAAM.
    Business("roga", "קליניקת רוגע", "exempt_dealer", ("narkis",)),
    # No owner: the business's own address is the fall-back.
    Business("galgal", "מוסך הגלגל השביעי", "licensed_dealer", (), ("clerk",), "office@galgal.example"),
    # Neither an owner nor an address: its digest has nobody to go to.
    Business("pina", "חנות הפינה הנעלמת", "exempt_dealer", (), ("clerk",)),
    # Closed, with overdue invoices left: never a digest, never a token.
    Business("tzuk", "מחסני הצוק (לשעבר) בע״מ", "limited_company", ("sigal",), closed=True),
)
BUSINESS_BY_KEY = {business.key: business for business in BUSINESSES}

CUSTOMER_NAMES = (
    "בית קפה הענן",
    "מסעדת <b>הבוטן</b> & שותפים",
    "גלידריית שלוש כפות 🍦",
    'רשת "הכול בשקל וחצי" בע"מ',
    "Blue Hill Imports Ltd.",
    "ועד בית רחוב הדוגמה 7",
    "מכון המים החמים",
    "Éclair & Söhne GmbH",
    "גני אגוז – חברה לבניין, פיתוח, שימור ואחזקה של מבנים היסטוריים בצפון הארץ ובמרכזה בע״מ",
    "עמותת הגשר הקטן (ע״ר)",
    "צעצועי הקרנף",
)


@dataclass(frozen=True, slots=True)
class Customer:
    """A customer of one business."""

    id: UUID
    name: str
    email: str


def customers_of(business: Business) -> tuple[Customer, ...]:
    """Return the business's customers, `CUSTOMERS_PER_BUSINESS` of them."""
    first = BUSINESSES.index(business)
    numbers = [(first + offset) % len(CUSTOMER_NAMES) for offset in range(CUSTOMERS_PER_BUSINESS)]
    return tuple(
        Customer(
            identify("customer", business.key, number),
            CUSTOMER_NAMES[number],
            f"buyer{number}@lakoach.example",
        )
        for number in numbers
    )


def recipients_of(business: Business) -> frozenset[str]:
    """Return who gets the business's digest, in lower case: its owners, else its own address, else nobody."""
    addresses = [PEOPLE[owner][1] for owner in business.owners] or [business.email or ""]
    return frozenset(address.lower() for address in addresses if address)


def user_rows(now: datetime) -> Iterator[Row]:
    """Yield rows of `users`: id, email, name, last_login_at, created_at, updated_at."""
    entered = now - FOUNDED
    for number, (key, (name, email)) in enumerate(PEOPLE.items()):
        yield identify("user", key), email, name, now - timedelta(hours=7 * number + 1), entered, entered


def business_rows(now: datetime) -> Iterator[Row]:
    """
    Yield rows of `businesses`: id, name, business_type, registration_number, vat_number, email,
    default_vat_rate, is_active, deleted_at, created_by_user_id, created_at, updated_at.
    """
    entered = now - FOUNDED
    for number, business in enumerate(BUSINESSES, start=1):
        registration = f"{number:09d}"
        founder = (*business.owners, *business.others)[0]
        closed_at = now - timedelta(days=40) if business.closed else None
        yield (
            *(business.id, business.name, business.type, registration, registration, business.email),
            *(business.vat_rate_basis_points, not business.closed, closed_at),
            *(identify("user", founder), entered, closed_at or entered),
        )


def member_rows(now: datetime) -> Iterator[Row]:
    """Yield rows of `user_businesses`: id, user_id, business_id, role, created_at, updated_at."""
    entered = now - FOUNDED
    for business in BUSINESSES:
        members = [(key, "owner") for key in business.owners] + [(key, "admin") for key in business.others]
        for key, role in members:
            yield (
                identify("member", business.key, key),
                *(identify("user", key), business.id, role, entered, entered),
            )


def customer_rows(now: datetime) -> Iterator[Row]:
    """
    Yield rows of `customers`: id, business_id, name, email, is_active, deleted_at, created_at, updated_at.

    Each business's last customer has been removed since.
    """
    entered = now - FOUNDED
    for business in BUSINESSES:
        customers = customers_of(business)
        for customer in customers:
            removed_at = now - timedelta(days=20) if customer is customers[-1] else None
            yield (
                *(customer.id, business.id, customer.name, customer.email),
                *(removed_at is None, removed_at, entered, removed_at or entered),
            )


SESSION_EXPIRIES = (
    *(timedelta(minutes=minutes) for minutes in (-1, 1)),
    *(timedelta(hours=hours) for hours in (-2000, -700, -200, -90, -25, -3, 3, 30, 400, 700)),
)
"""When the sample's sessions expire, counted from `now`; each person is given every third of them."""


def session_rows(now: datetime) -> Iterator[Row]:
    """Yield rows of `sessions`: id, user_id, created_at, last_accessed_at, expires_at."""
    lifetime = timedelta(days=30)
    for person_number, person in enumerate(PEOPLE):
        for number, expiry in enumerate(SESSION_EXPIRIES):
            if (number + person_number) % 3:
                continue
            opened = now + expiry - lifetime
            yield (
                *(identify("session", person, number), identify("user", person)),
                *(opened, opened + timedelta(hours=1), now + expiry),
            )


# Minutes from `now` until the access token expires. A run refreshes what expires within five minutes
# of the run after it, so each of these is due at every minute of the quarter of an hour.
DUE_TOKENS = {
    "gan": -45,
    "shibolet": -30,
    "teena": -10,
    "keshet": -5,
    "ale": -1,
    "nitzotz": 0,
    "derech": 1,
    "madaf": 2,
    "giva": 3,
    "galgal": 4,
}
SPOILED: dict[str, Spoil] = {"keshet": "invalid_grant", "nitzotz": "unavailable", "giva": "garbage"}
"""Which of the due SHAAM answers otherwise than with a new token."""

# Not due: one is fresh, one waits for its owner, one is closed. (minutes, needs_reauth)
RESTING_TOKENS = {"or": (120, False), "pina": (-600, True), "tzuk": (-20, False)}


def credential_rows(now: datetime, encrypt: Callable[[str], str], refresh_tokens: Mapping[UUID, str]) -> Iterator[Row]:
    """
    Yield rows of `business_shaam_credentials`: id, business_id, encrypted_access_token,
    encrypted_refresh_token, token_expires_at, scope, needs_reauth, created_at, updated_at.
    """
    tokens = {key: (minutes, False) for key, minutes in DUE_TOKENS.items()} | RESTING_TOKENS
    for key, (minutes, needs_reauth) in tokens.items():
        business = BUSINESS_BY_KEY[key].id
        expires_at = now + timedelta(minutes=minutes)
        refreshed_at = expires_at - timedelta(minutes=10)
        yield (
            *(identify("credential", key), business),
            *(encrypt(f"sample-access-{business}"), encrypt(refresh_tokens[business])),
            *(expires_at, "scope", needs_reauth, now - timedelta(days=60), min(refreshed_at, now)),
        )
