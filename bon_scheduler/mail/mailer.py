"""
Send e-mail over SMTP, each letter at most once, and remember what became of it.

A letter's key is (kind, business, day, recipient). Its row in `deliveries` is
committed as `intended` BEFORE the server hears of it, and settled by the
server's answer; whoever finds the row later never sends again:

- the server accepted it: `sent`; refused it for good: `refused`;
- it certainly never was accepted: the row is deleted, another attempt may send;
- no answer after DATA had begun, or a worker that died in between: `unknown`.
  Only a person can decide that such a letter is sent again (`deliveries`): it is `released`.

Before any of that a letter passes the gate (`mail_gate`): EMAIL_RATE_PER_SECOND holds for all replicas
together, and while the server is away the run is given back without having used up an attempt.

An answer is recorded on a plain connection, not through a run's fence, and
outlives the cancellation of the handler: it tells what the world already did.
Nothing logged or raised here holds an address, a name, a subject or an amount.
"""

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from types import TracebackType
from typing import Final, Self
from uuid import UUID

import aiosmtplib
import asyncpg
import structlog

from bon_scheduler.clock import Clock, SystemClock
from bon_scheduler.config import Settings
from bon_scheduler.database import TRANSIENT_ERRORS
from bon_scheduler.jobs import NeverRetryError, NotNowError, Retry, RetryLaterError
from bon_scheduler.log import is_out_of_descriptors
from bon_scheduler.mail.gate import MailGate, MailUnavailableError, Slot
from bon_scheduler.mail.keys import read_key, recipient_hash
from bon_scheduler.mail.message import Letter, Written, message_id, write
from bon_scheduler.mail.replies import CLOSING, Answer, Delivery, clean_reply, judge
from bon_scheduler.mail.smtp import SMTP_TIMEOUT, Line, NotConnectedError, SmtpConnections, login_of

__all__ = ["Delivery", "Letter", "LetterDeferredError", "MailUnavailableError", "Mailer", "find_settled"]

log = structlog.get_logger()

CANCEL_PATIENCE = timedelta(seconds=3)
"""How long a cancelled attempt waits for an answer that is already under way."""
OTHER_RUN_WAIT = timedelta(minutes=1)
NO_DESCRIPTOR_WAIT = timedelta(seconds=5)
RETRY = Retry(delay=timedelta(seconds=30), longest=timedelta(minutes=30))
"""The wait that a LetterDeferredError asks for, by attempt."""
RECORDING_PAUSES_SECONDS = (0.2, 1.0, 3.0)
"""Between the tries to record an answer while the database does not answer."""
DEFERRED = "deferred"
"""What is observed of a letter of which nothing was sent."""

# $1 kind: text, $2 business: uuid, $3 day: date, $4 recipient: text (hash), $5 message id: text,
# $6 run: uuid, $7 attempt: int. Index: deliveries_kind_business_id_as_of_recipient_hash_key.
INTEND = """
    insert into bon_scheduler.deliveries
           (kind, business_id, as_of, recipient_hash, state, message_id, run_id, attempt)
    values ($1, $2, $3, $4, 'intended', $5, $6, $7)
        on conflict (kind, business_id, as_of, recipient_hash) do update
       set state = 'intended', run_id = $6, attempt = $7, intended_at = now(), settled_at = null, reply = null,
           message_id = excluded.message_id  -- an upgrade from version 9 changed it
     where deliveries.state = 'released'
 returning id
"""

# An intention whose attempt is over, of an earlier attempt of this run or of a run that no longer
# runs, can no longer be answered. One statement: whoever settles the row first has decided.
# $1 kind: text, $2 business: uuid, $3 day: date, $4 recipient: text (hash), $5 run: uuid,
# $6 attempt: int. Index: deliveries_kind_business_id_as_of_recipient_hash_key.
GIVE_UP = """
    update bon_scheduler.deliveries d
       set state = 'unknown', reply = 'the attempt ended before the answer was recorded', settled_at = now()
     where d.kind = $1
       and d.business_id = $2
       and d.as_of = $3
       and d.recipient_hash = $4
       and d.state = 'intended'
       and (   (d.run_id = $5 and d.attempt < $6)
            or not exists (select from bon_scheduler.runs r where r.id = d.run_id and r.state = 'running'))
 returning d.id
"""

# $1 kind: text, $2 business: uuid, $3 day: date, $4 recipient: text (hash).
# Index: deliveries_kind_business_id_as_of_recipient_hash_key.
FIND_STATE = """
    select state
      from bon_scheduler.deliveries
     where kind = $1
       and business_id = $2
       and as_of = $3
       and recipient_hash = $4
"""

# `unknown` is settled too: someone gave up on an attempt that was only slow, and this is its answer.
# $1 delivery: uuid, $2 run: uuid, $3 attempt: int, $4 state: text (one of ours, so not a literal),
# $5 reply: text. Index: deliveries_pkey.
SETTLE = """
    update bon_scheduler.deliveries
       set state = $4, reply = $5, settled_at = now()
     where id = $1
       and run_id = $2
       and attempt = $3
       and state in ('intended', 'unknown')
"""

# Nothing was sent, so the intention never was. `unknown` as in SETTLE.
# $1 delivery: uuid, $2 run: uuid, $3 attempt: int. Index: deliveries_pkey.
WITHDRAW = """
    delete from bon_scheduler.deliveries
     where id = $1
       and run_id = $2
       and attempt = $3
       and state in ('intended', 'unknown')
"""


def _unique(letter: Letter, key: bytes) -> tuple[str, UUID, date, str]:
    """Return what is unique in `deliveries`."""
    return letter.kind, letter.business_id, letter.as_of, recipient_hash(key, letter.business_id, letter.recipient)


async def find_settled(pool: "asyncpg.Pool[asyncpg.Record]", letter: Letter, key: bytes) -> Delivery | None:
    """Return what became of a letter before, None while it may be sent."""
    state = await pool.fetchval(FIND_STATE, *_unique(letter, key))
    if state == "sent":
        return Delivery.ALREADY_SENT
    return Delivery(state) if state in {"refused", "unknown"} else None


class LetterDeferredError(RetryLaterError):
    """The server does not take this letter just now (4yz); nothing was sent."""


@dataclass(slots=True)
class _Intention:
    """A row of `deliveries` that this attempt owns."""

    id: UUID
    run_id: UUID
    attempt: int
    data_begun: bool = False


class Mailer:
    """
    Delivers letters; one for the whole service, safe to use from many runs at once.

    `observe` is told what became of each letter that was tried (a Delivery's value, or `deferred`) and after
    how many seconds. `close` (or leaving `async with`) waits for answers that are still under way; the pool must
    outlive it.
    """

    def __init__(
        self,
        settings: Settings,
        pool: "asyncpg.Pool[asyncpg.Record]",
        *,
        tls_context: ssl.SSLContext | None = None,
        timeout: timedelta = SMTP_TIMEOUT,
        clock: Clock | None = None,
        observe: Callable[[str, float], None] = lambda _status, _seconds: None,
    ) -> None:
        self._settings = settings
        self._pool = pool
        self.gate: Final = MailGate(pool, rate_per_second=settings.email_rate_per_second)
        self._connections = SmtpConnections(settings, tls_context=tls_context, timeout=timeout)
        self._key: bytes | None = None
        self._clock = clock or SystemClock()
        self._observe = observe
        # The loop keeps only weak references to tasks; these must end whoever is cancelled.
        self._sending: set[asyncio.Task[Answer]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Wait until every answer that is under way has been recorded; bounded by the SMTP time-outs."""
        while self._sending:
            await asyncio.wait(self._sending)
        await self._connections.close()

    async def deliver(self, letter: Letter, *, run_id: UUID, attempt: int) -> Delivery:
        """
        Send a letter unless its key was used before; return what became of it. Waits for the letter's turn.

        Raises MailUnavailableError (a NotNowError) while the server is away, NotNowError while too many letters
        wait for their turn, LetterDeferredError when the server does not take this letter just now, RetryLaterError
        while another run is sending the same letter, and NeverRetryError for a letter of a day so long ago that its
        delivery may have been forgotten, and for one that cannot be written with these settings.
        """
        self._require_remembered(letter)
        events = log.bind(kind=letter.kind, business_id=str(letter.business_id))
        self._key = key = self._key or await read_key(self._pool)
        if (settled := await find_settled(self._pool, letter, key)) is not None:
            return settled  # BEFORE the gate: it takes nobody's turn
        if self._settings.smtp_host is None:
            events.info("delivery.logged", as_of=letter.as_of.isoformat())
            self._observe(Delivery.LOGGED, 0.0)
            return Delivery.LOGGED
        # What is no address is refused without the server, and says nothing about it.
        written = await self._write(letter, key)
        slot = await self.gate.pass_through(run_id) if written else None
        claim = await self._claim(letter, key, run_id, attempt)
        if isinstance(claim, Delivery):
            return claim
        started = time.perf_counter()
        answer = await self._send_whole(letter, written, claim)
        self._observe(answer.delivery or DEFERRED, time.perf_counter() - started)
        events = events.bind(delivery_id=str(claim.id), reply=answer.reply)
        if slot is not None:
            await self._tell_gate(slot, answer)
        if answer.delivery is None:
            events.info("delivery.deferred")
            raise LetterDeferredError(
                f"The mail server did not take a letter: {answer.reply}. Nothing was sent; it is tried again.",
                after=RETRY.wait(attempt),
            )
        if answer.delivery is Delivery.SENT:
            events.info("delivery.sent")
        else:
            events.warning("delivery.refused" if answer.delivery is Delivery.REFUSED else "delivery.unknown")
        return answer.delivery

    async def _write(self, letter: Letter, key: bytes) -> Written | None:
        # In a thread: runs come in bursts, and twenty letters keep the event loop for a quarter of a second.
        return await asyncio.to_thread(write, letter, self._settings, now=self._clock.now(), key=key)

    def _require_remembered(self, letter: Letter) -> None:
        kept = self._settings.run_retention_days
        if letter.as_of < self._clock.now().date() - timedelta(days=kept):
            raise NeverRetryError(
                f"A letter of {letter.as_of} is older than RUN_RETENTION_DAYS ({kept}): whether it was sent may be "
                "forgotten, so it is not sent again."
            )

    async def _tell_gate(self, slot: Slot, answer: Answer) -> None:
        """Raise MailUnavailableError where the server was the trouble."""
        if answer.away:
            raise await self.gate.report_away(slot, answer.reply)
        if answer.delivery is not Delivery.UNKNOWN:
            await self.gate.report_back(slot)

    async def _claim(self, letter: Letter, key: bytes, run_id: UUID, attempt: int) -> _Intention | Delivery:
        """Commit the intention to send, or find out what became of an earlier one."""
        unique = _unique(letter, key)
        message = message_id(letter, self._settings.email_from, key)
        if claimed := await self._pool.fetchval(INTEND, *unique, message, run_id, attempt):
            return _Intention(claimed, run_id, attempt)
        if given_up := await self._pool.fetchval(GIVE_UP, *unique, run_id, attempt):
            log.warning(
                "delivery.unknown",
                kind=letter.kind,
                business_id=str(letter.business_id),
                delivery_id=str(given_up),
            )
            return Delivery.UNKNOWN
        if (settled := await find_settled(self._pool, letter, key)) is not None:
            return settled
        # Intended by a run that lives, or just withdrawn by it.
        raise RetryLaterError("Another run is sending the same letter just now.", after=OTHER_RUN_WAIT)

    async def _send_whole(self, letter: Letter, written: Written | None, claim: _Intention) -> Answer:
        """Converse and record in a task of its own, so that being cancelled loses no answer."""
        task = asyncio.create_task(self._send(letter, written, claim), name=f"delivery {claim.id}")
        self._sending.add(task)
        task.add_done_callback(self._forget)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            # Before DATA nothing was accepted: stop and withdraw. After it, let the answer be recorded.
            if not claim.data_begun:
                task.cancel()
            await asyncio.wait({task}, timeout=CANCEL_PATIENCE.total_seconds())
            raise

    def _forget(self, task: "asyncio.Task[Answer]") -> None:
        self._sending.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # The caller sees it as well, unless it was cancelled.
            log.error("delivery.unrecorded", error=type(error).__name__)

    async def _send(self, letter: Letter, written: Written | None, claim: _Intention) -> Answer:
        try:
            answer = await self._try(letter, written, claim)
        except BaseException:
            # Cancelled, or a fault that nobody thought of: before DATA neither uses the letter up.
            if not claim.data_begun:
                await self._record(claim, Answer(None, ""))
            raise
        await self._record(claim, answer)
        return answer

    async def _try(self, letter: Letter, written: Written | None, claim: _Intention) -> Answer:
        if written is None:
            return Answer(Delivery.REFUSED, "not an e-mail address")
        try:
            async with self._connections.line() as line:
                return await self._converse(line, letter, written, claim)
        except NotConnectedError as error:
            if is_out_of_descriptors(error.__cause__):
                # It says nothing of the server, so the gate stays as it is.
                why = "This process has no file descriptor left. Nothing was sent."
                raise NotNowError(why, after=NO_DESCRIPTOR_WAIT) from error
            if error.code is not None:
                return judge(error.stage, error.code, error.said)
            return Answer(None, str(error), away=True)

    async def _converse(self, line: Line, letter: Letter, written: Written, claim: _Intention) -> Answer:
        """Hold the conversation stage by stage, because what a failure means depends on the stage."""
        client, mailbox, stage = line.client, written.mailbox, "MAIL"
        try:
            if mailbox.utf8 and not client.supports_extension("smtputf8"):
                return Answer(Delivery.REFUSED, "the server takes no address outside ASCII (SMTPUTF8)")
            encoding = "utf-8" if mailbox.utf8 else "ascii"
            options = ["SMTPUTF8"] if mailbox.utf8 else []
            await client.mail(self._settings.email_from, encoding=encoding, options=options)
            stage = "RCPT"
            await client.rcpt(mailbox.address, encoding=encoding)
            if not client.is_connected:
                return Answer(None, "the connection was lost (after RCPT)", away=True)
            stage = "DATA"
            # From here on the server may have accepted it, whatever we hear.
            claim.data_begun = True
            response = await client.data(written.content)
            return Answer(Delivery.SENT, self._clean(response, letter))
        except aiosmtplib.SMTPResponseException as error:
            line.sound = error.code != CLOSING
            return judge(stage, error.code, self._clean(error, letter))
        except (aiosmtplib.SMTPException, OSError) as error:
            # The text of any of these may quote an address; the class says enough.
            line.sound = False
            what = f"{type(error).__name__} (at {stage})"
            return Answer(Delivery.UNKNOWN, what) if claim.data_begun else Answer(None, what, away=True)

    def _clean(self, answer: aiosmtplib.SMTPResponse | aiosmtplib.SMTPResponseException, letter: Letter) -> str:
        return clean_reply(answer.code, answer.message, letter, login_of(self._settings))

    async def _record(self, claim: _Intention, answer: Answer) -> None:
        """Settle or withdraw the intention; tried again while the database restarts, is full or does not answer."""
        ours = (claim.id, claim.run_id, claim.attempt)
        for pause_seconds in (*RECORDING_PAUSES_SECONDS, None):
            try:
                if answer.delivery is None:
                    await self._pool.execute(WITHDRAW, *ours)
                else:
                    await self._pool.execute(SETTLE, *ours, answer.delivery.value, answer.reply)
            except TRANSIENT_ERRORS:
                if pause_seconds is None:
                    raise
                await asyncio.sleep(pause_seconds)
            else:
                return
