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

From its turn to the record of its answer a letter is one task (`sending`) that no cancellation of its handler cuts
short: it stops where nothing has been sent, withdraws its intention and gives its turn back, or goes on to the answer.
An answer is recorded on a connection that handlers cannot keep busy, and not through a run's fence: it tells what the
world already did. A process that stops (`stop`) begins no letter, and no DATA for which its time would not do.
Nothing logged or raised here holds an address, a name, a subject or an amount.
"""

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import date, timedelta
from types import TracebackType
from typing import Final, Self
from uuid import UUID

import aiosmtplib
import structlog

from bon_scheduler.clock import Clock, SystemClock
from bon_scheduler.config import Settings
from bon_scheduler.database import TRANSIENT_ERRORS, Pool, Pools
from bon_scheduler.jobs import NeverRetryError, NotNowError, RetryLaterError
from bon_scheduler.ledger import CALL_TIMEOUT_SECONDS
from bon_scheduler.log import is_out_of_descriptors
from bon_scheduler.mail.gate import MailGate, MailUnavailableError, Slot
from bon_scheduler.mail.keys import read_key, recipient_hash
from bon_scheduler.mail.message import Letter, Written, message_id, write
from bon_scheduler.mail.recording import Intention, record, withdraw_unheard
from bon_scheduler.mail.replies import CLOSING, Answer, Delivery, clean_reply, judge
from bon_scheduler.mail.sending import Sending
from bon_scheduler.mail.smtp import SMTP_TIMEOUT, Line, NotConnectedError, SmtpConnections, login_of

__all__ = ["Delivery", "Letter", "LetterDeferredError", "MailUnavailableError", "Mailer", "find_settled"]

log = structlog.get_logger()

CANCEL_PATIENCE = timedelta(seconds=3)
"""How long a cancelled attempt waits for an answer that is already under way."""
ANSWERS_TO_DATA = 2
"""DATA itself, and the letter."""
OTHER_RUN_WAIT = timedelta(minutes=1)
NO_DESCRIPTOR_WAIT = timedelta(seconds=5)
DEFERRED = "deferred"
"""What is observed of a letter of which nothing was sent."""
NOTHING = Answer(None, "")
STOPPING = Answer(None, "this process is stopping")

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
# $6 attempt: int. Indexes: deliveries_kind_business_id_as_of_recipient_hash_key, runs_pkey.
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

# $1 kind: text, $2 business: uuid, $3 day: date, $4 recipient: text (hash). A delivery of that day may be forgotten if
# PRUNE_DELIVERIES was ever told so, whatever RUN_RETENTION_DAYS is now.
# Indexes: deliveries_kind_business_id_as_of_recipient_hash_key, pruning_pkey.
FIND_STATE = """
    select d.state, p.ticks_until::date - 1 as since, $3 < p.ticks_until::date - 1 as forgotten
      from bon_scheduler.pruning p
      left join bon_scheduler.deliveries d
             on d.kind = $1
            and d.business_id = $2
            and d.as_of = $3
            and d.recipient_hash = $4
"""


def _unique(letter: Letter, key: bytes) -> tuple[str, UUID, date, str]:
    """Return what is unique in `deliveries`."""
    return letter.kind, letter.business_id, letter.as_of, recipient_hash(key, letter.business_id, letter.recipient)


async def find_settled(pool: Pool, letter: Letter, key: bytes) -> Delivery | None:
    """Return what became of a letter before, None while it may be sent; NeverRetryError where that may be forgotten."""
    row = await pool.fetchrow(FIND_STATE, *_unique(letter, key))
    if row is None:
        raise LookupError("the table of what was pruned has no row; bon-scheduler migrate makes it")
    state = row["state"]
    if state is None and row["forgotten"]:
        raise NeverRetryError(
            f"A letter of {letter.as_of} is not sent: what was sent of days before {row['since']} has been forgotten "
            "(RUN_RETENTION_DAYS), so that it may be a second one."
        )
    if state == "sent":
        return Delivery.ALREADY_SENT
    return Delivery(state) if state in {"refused", "unknown"} else None


class LetterDeferredError(RetryLaterError):
    """The server does not take this letter just now (4yz); nothing was sent."""


async def _granted() -> None:
    return


class Mailer:
    """
    Delivers letters; one for the whole service, safe to use from many runs at once.

    `observe` is told what became of each letter that was tried (a Delivery's value, or `deferred`) and after
    how many seconds. `close` (or leaving `async with`) waits for answers that are still under way; the pools must
    outlive it.
    """

    def __init__(
        self,
        settings: Settings,
        pools: Pools,
        *,
        tls_context: ssl.SSLContext | None = None,
        timeout: timedelta = SMTP_TIMEOUT,
        clock: Clock | None = None,
        observe: Callable[[str, float], None] = lambda _status, _seconds: None,
    ) -> None:
        self._settings = settings
        self._pool, self._answers = pools
        self.gate: Final = MailGate(self._pool, rate_per_second=settings.email_rate_per_second)
        self._connections = SmtpConnections(settings, tls_context=tls_context, timeout=timeout)
        self._key: bytes | None = None
        self._clock = clock or SystemClock()
        self._observe = observe
        self.require_permission: Callable[[], Awaitable[None]] = _granted
        """Raises NotNowError while no letter may leave."""
        # The loop keeps only weak references to tasks; these must end whoever is cancelled.
        self._sending: dict[asyncio.Task[Delivery], Sending] = {}
        self._ends_at: float | None = None

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

    @property
    def unanswered(self) -> int:
        """How many letters the server has, as far as anybody knows, whose answers are not recorded yet."""
        return sum(sending.unanswered for sending in self._sending.values())

    async def answered(self) -> bool:
        """Wait until the answers to all letters that the server has now are recorded; return whether there are any."""
        if tasks := [task for task, sending in self._sending.items() if sending.unanswered]:
            await asyncio.wait(tasks)
        return bool(tasks)

    def stop(self, left: timedelta) -> None:
        """Begin no letter more, because this process ends after `left`; one under way goes on if it will have time."""
        self._ends_at = asyncio.get_running_loop().time() + left.total_seconds()
        for task, sending in self._sending.items():
            if not sending.talking:
                sending.stop(task)

    async def deliver(self, letter: Letter, *, run_id: UUID, attempt: int) -> Delivery:
        """
        Send a letter unless its key was used before; return what became of it. Waits for the letter's turn.

        Raises MailUnavailableError (a NotNowError) while the server is away, NotNowError while too many letters
        wait for their turn, LetterDeferredError when the server does not take this letter just now, RetryLaterError
        while another run is sending the same letter, and NeverRetryError for a letter of a day so long ago that its
        delivery may have been forgotten, and for one that cannot be written with these settings.
        """
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
        sending = Sending(letter, written, key, run_id, attempt)
        task = asyncio.create_task(self._carry(sending, events), name=f"letter of {run_id}")
        self._sending[task] = sending
        task.add_done_callback(self._forget)
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            sending.stop(task)
            await asyncio.wait({task}, timeout=CANCEL_PATIENCE.total_seconds())
            raise
        if task.cancelled():
            raise _stopping()
        return task.result()

    async def _carry(self, sending: Sending, events: structlog.stdlib.BoundLogger) -> Delivery:
        """See a letter through, from its turn to what became of it."""
        if self._ends_at is not None:
            raise _stopping()
        run_id, written = sending.run_id, sending.written
        slot = await self.gate.pass_through(run_id, wait=sending.wait) if written else None
        answer = NOTHING
        try:
            await self.require_permission()
            claim = await self._claim(sending)
            if isinstance(claim, Delivery):
                return claim
            started = time.perf_counter()
            answer = await self._send(sending, claim)
        finally:
            if slot is not None and answer in {NOTHING, STOPPING} and not sending.data_begun:
                await self.gate.give_back(slot)
        if answer is STOPPING:
            raise _stopping()
        self._observe(answer.delivery or DEFERRED, time.perf_counter() - started)
        events = events.bind(delivery_id=str(claim.id), reply=answer.reply)
        if slot is not None:
            await self._tell_gate(slot, answer)
        if answer.delivery is None:
            events.info("delivery.deferred")
            raise LetterDeferredError(
                f"The mail server did not take a letter: {answer.reply}. Nothing was sent; it is tried again.",
                after=None,  # the job counts its attempts without those that were given back
            )
        if answer.delivery is Delivery.SENT:
            events.info("delivery.sent")
        else:
            events.warning("delivery.refused" if answer.delivery is Delivery.REFUSED else "delivery.unknown")
        return answer.delivery

    async def _write(self, letter: Letter, key: bytes) -> Written | None:
        # In a thread: runs come in bursts, and twenty letters keep the event loop for a quarter of a second.
        return await asyncio.to_thread(write, letter, self._settings, now=self._clock.now(), key=key)

    async def _tell_gate(self, slot: Slot, answer: Answer) -> None:
        """Raise MailUnavailableError where the server was the trouble."""
        if answer.away:
            raise await self.gate.report_away(slot, answer.reply)
        if answer.delivery is not Delivery.UNKNOWN:
            await self.gate.report_back(slot)

    async def _claim(self, sending: Sending) -> Intention | Delivery:
        """Commit the intention to send, or find out what became of an earlier one."""
        letter = sending.letter
        unique, ours = _unique(letter, sending.key), (sending.run_id, sending.attempt)
        message = message_id(letter, self._settings.email_from, sending.key)
        async with AsyncExitStack() as stack:
            with sending.interruptible():
                connection = await stack.enter_async_context(self._pool.acquire())
            try:
                timeout = CALL_TIMEOUT_SECONDS
                if claimed := await connection.fetchval(INTEND, *unique, message, *ours, timeout=timeout):
                    return Intention(claimed, *ours)
                given_up = await connection.fetchval(GIVE_UP, *unique, *ours, timeout=timeout)
            except BaseException:
                # It may have been committed, and only the answer be lost.
                await withdraw_unheard(self._answers, *unique, *ours)
                raise
        if given_up:
            log.warning(
                "delivery.unknown",
                kind=letter.kind,
                business_id=str(letter.business_id),
                delivery_id=str(given_up),
            )
            return Delivery.UNKNOWN
        if (settled := await find_settled(self._pool, letter, sending.key)) is not None:
            return settled
        # Intended by a run that lives, or just withdrawn by it.
        raise RetryLaterError("Another run is sending the same letter just now.", after=OTHER_RUN_WAIT)

    def _forget(self, task: "asyncio.Task[Delivery]") -> None:
        sending = self._sending.pop(task)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if sending.unanswered or not isinstance(error, (NotNowError, RetryLaterError, *TRANSIENT_ERRORS)):
            # The caller sees it as well, unless it was cancelled.
            log.error("delivery.unrecorded", error=type(error).__name__)

    async def _send(self, sending: Sending, claim: Intention) -> Answer:
        """Converse and record."""
        try:
            with sending.interruptible():
                answer = await self._try(sending)
        except BaseException:
            # Cancelled, or a fault that nobody thought of: before DATA neither uses the letter up.
            if not sending.data_begun:
                await record(self._answers, claim, NOTHING)
            raise
        await record(self._answers, claim, answer)
        sending.recorded = True
        return answer

    async def _try(self, sending: Sending) -> Answer:
        written = sending.written
        if written is None:
            return Answer(Delivery.REFUSED, "not an e-mail address")
        try:
            async with self._connections.line() as line:
                if self._ends_at is not None:
                    return STOPPING
                sending.talking = True
                return await self._converse(line, sending, written)
        except NotConnectedError as error:
            if is_out_of_descriptors(error):
                # It says nothing of the server, so the gate stays as it is.
                why = "This process has no file descriptor left. Nothing was sent."
                raise NotNowError(why, after=NO_DESCRIPTOR_WAIT) from error
            if error.code is not None:
                return judge(error.stage, error.code, error.said)
            return Answer(None, str(error), away=True)

    async def _converse(self, line: Line, sending: Sending, written: Written) -> Answer:
        """Hold the conversation stage by stage, because what a failure means depends on the stage."""
        letter, client, mailbox, stage = sending.letter, line.client, written.mailbox, "MAIL"
        try:
            if mailbox.utf8 and not client.supports_extension("smtputf8"):
                return Answer(Delivery.REFUSED, "the server takes no address outside ASCII (SMTPUTF8)")
            encoding = "utf-8" if mailbox.utf8 else "ascii"
            options = ["SMTPUTF8"] if mailbox.utf8 else []
            with sending.timed():
                await client.mail(self._settings.email_from, encoding=encoding, options=options)
            stage = "RCPT"
            with sending.timed():
                await client.rcpt(mailbox.address, encoding=encoding)
            if not client.is_connected:
                return Answer(None, "the connection was lost (after RCPT)", away=True)
            if self._ends_at is not None:
                left_seconds = self._ends_at - asyncio.get_running_loop().time()
                if left_seconds < ANSWERS_TO_DATA * 1.5 * sending.slowest_seconds:
                    line.sound = False  # it is in the middle of a letter
                    return STOPPING
            stage = "DATA"
            # From here on the server may have accepted it, whatever we hear.
            sending.data_begun = True
            async with asyncio.timeout(self._connections.timeout_seconds):
                response = await client.data(written.content)
            return Answer(Delivery.SENT, self._clean(response, letter))
        except aiosmtplib.SMTPResponseException as error:
            line.sound = error.code != CLOSING
            return judge(stage, error.code, self._clean(error, letter))
        except (aiosmtplib.SMTPException, OSError) as error:
            # The text of any of these may quote an address; the class says enough.
            line.sound = False
            what = f"{type(error).__name__} (at {stage})"
            return Answer(Delivery.UNKNOWN, what) if sending.data_begun else Answer(None, what, away=True)

    def _clean(self, answer: aiosmtplib.SMTPResponse | aiosmtplib.SMTPResponseException, letter: Letter) -> str:
        return clean_reply(answer.code, answer.message, letter, login_of(self._settings))


def _stopping() -> NotNowError:
    return NotNowError("This process is stopping, so that it begins no letter. Another sends it.", after=timedelta(0))
