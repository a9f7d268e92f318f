"""Who is taken, in which order, and within which limits; on real PostgreSQL, by claims and by whole replicas."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from bon_scheduler import Counts, Exclusive, JobContext, NoPayload, Retry, job, service
from bon_scheduler.database import connections
from bon_scheduler.database.connections import Pool
from bon_scheduler.engine import AlreadyRunningError
from bon_scheduler.engine.claiming import CHANNEL, OLDEST_FIRST_EVERY
from bon_scheduler.jobs import AnyJob, Payload
from bon_scheduler.ledger.attempts import finish_many, give_back, release_lost
from bon_scheduler.ledger.changes import Action, change_all
from bon_scheduler.ledger.claims import Wanted
from bon_scheduler.ledger.workers import Worker, beat, register_worker, retire_worker
from tests.attempting import claim, hold, refs, take_any
from tests.conftest import Connection, MakeSettings, RunJob
from tests.waiting import until

JOB = "generate-pdf"
OTHER = "send-invoice-email"
ASK_FIRST = "select bon_scheduler.enqueue('a-test', '{\"priority\": 100}', priority => 100)"
SLOW = "select count(*) from bon_scheduler.runs where job = 'slow' and state = 'running'"


async def ask(connection: Connection, job: str = JOB, *, business: str | None = None, **options: object) -> UUID:
    payload = {"business_id": business} if business else {}
    named = "".join(f", {name} => ${n}" for n, name in enumerate(options, start=3))
    run_id: UUID = await connection.fetchval(
        f"select bon_scheduler.enqueue($1, $2{named})", job, payload, *options.values()
    )
    return run_id


@pytest.fixture
async def worker(connection: Connection) -> Worker:
    worker = Worker()
    await register_worker(connection, worker)
    return worker


# The order within a job


async def test_a_higher_priority_goes_first_and_the_older_of_equals(connection: Connection, worker: Worker) -> None:
    low, first, second = await ask(connection, priority=-5), await ask(connection), await ask(connection)
    high = await ask(connection, priority=5)
    order = [(await take_any(connection, worker, JOB, room=1))[0] for _ in range(4)]
    assert order == [high, first, second, low]


async def test_a_batch_takes_by_priority_then_turn_then_age(connection: Connection, worker: Worker) -> None:
    last = await ask(connection, priority=-1)
    old = [await ask(connection, business=business) for business in ("a", "a", "b", "c")]
    new = [await ask(connection, priority=1, business=business) for business in ("a", "d", "d")]
    # The third of "a" and the second of "d" stand behind the first of each.
    order = [new[1], new[2], new[0], old[0], old[2], old[3], old[1], last]
    for room in (1, 4, 3):
        assert set(await take_any(connection, worker, JOB, room=room)) == set(order[:room])
        del order[:room]


async def test_many_runs_of_one_business_do_not_stand_before_one_of_another(
    connection: Connection, worker: Worker
) -> None:
    for _ in range(300):
        await ask(connection, business="a")
    assert len(await take_any(connection, worker, JOB, room=100)) == 100
    other = await ask(connection, business="b")
    assert other in await take_any(connection, worker, JOB, room=3)


async def test_a_business_with_many_runs_is_not_kept_waiting_by_ever_new_ones(
    connection: Connection, worker: Worker
) -> None:
    """Four new businesses come with each claim of four: the old one still gets its turn in each round."""
    old = [await ask(connection, business="a") for _ in range(10)]
    taken: set[UUID] = set()
    for _ in range(60):
        for _ in range(4):
            await ask(connection, business=uuid4().hex)
        taken.update(await take_any(connection, worker, JOB, room=4))
    assert len(taken & set(old)) >= 3


async def test_asked_for_in_bulk_turns_go_round_as_well(connection: Connection, worker: Worker) -> None:
    payloads = [{"business_id": "a"}] * 50 + [{"business_id": "b"}] * 2
    keys = [str(n) for n in range(52)]
    await connection.execute(
        "select bon_scheduler.enqueue_many($1, $2, $3, 0, 'run', 'a test', null)", JOB, payloads, keys
    )
    answer = await claim(connection, worker, JOB, room=4)
    assert Counter(taken.payload["business_id"] for taken in answer.taken) == {"a": 2, "b": 2}


async def test_a_low_priority_moves(connection: Connection, worker: Worker) -> None:
    low = await ask(connection, priority=-100)
    for _ in range(50):
        await ask(connection, priority=100)
    assert low not in await take_any(connection, worker, JOB, room=5)
    assert low in await take_any(connection, worker, JOB, room=5, oldest_first=True)


async def test_a_tick_goes_before_all_that_was_asked_for(connection: Connection, worker: Worker) -> None:
    await connection.execute("update bon_scheduler.jobs set exclusive = 'no' where name = 'draft-cleanup'")
    for _ in range(300):
        await ask(connection, "draft-cleanup", priority=100)
    tick = await connection.fetchval("select bon_scheduler.enqueue_run('draft-cleanup', origin => 'schedule')")
    assert await take_any(connection, worker, "draft-cleanup", room=1) == [tick]


# Limits


async def test_no_more_than_there_is_room_for_is_taken(connection: Connection, worker: Worker) -> None:
    for _ in range(10):
        await ask(connection)
    assert len(await take_any(connection, worker, JOB, room=4)) == 4
    assert len(await take_any(connection, worker, Wanted(JOB, 2, 4, None, False), room=16)) == 2


async def test_places_are_kept_for_jobs_of_which_nothing_runs_here(connection: Connection, worker: Worker) -> None:
    for _ in range(30):
        await ask(connection)
    assert len(await take_any(connection, worker, JOB, OTHER, room=20, reserve=5)) == 15
    other = await ask(connection, OTHER)
    wanted = Wanted(JOB, 5, 15, None, False), Wanted(OTHER, 5, 0, None, False)
    assert await take_any(connection, worker, *wanted, room=5, reserve=5) == [other]


async def test_of_two_jobs_who_runs_least_here_goes_first(connection: Connection, worker: Worker) -> None:
    for _ in range(10):
        await ask(connection)
    for _ in range(10):
        await ask(connection, OTHER)
    answer = await claim(connection, worker, Wanted(JOB, 6, 4, None, False), Wanted(OTHER, 6, 0, None, False), room=6)
    assert Counter(taken.job for taken in answer.taken) == {OTHER: 5, JOB: 1}


async def test_no_more_of_a_job_than_its_total_run_in_all_replicas(connection: Connection, worker: Worker) -> None:
    other = Worker()
    await register_worker(connection, other)
    for _ in range(10):
        await ask(connection)
    three = Wanted(JOB, 20, 0, 3, False)
    first = await claim(connection, worker, three)
    assert (len(first.taken), await take_any(connection, other, three)) == (3, [])
    await finish_many(connection, [(ref, {}) for ref in refs(list(first.taken))[:2]])
    assert len(await take_any(connection, other, three)) == 2


async def test_runs_of_a_job_that_nobody_here_handles_are_left_alone(connection: Connection, worker: Worker) -> None:
    left = await ask(connection, OTHER)
    mine = await ask(connection)
    assert await take_any(connection, worker, JOB) == [mine]
    state = await connection.fetchval("select state::text from bon_scheduler.runs where id = $1", left)
    assert state == "queued"


async def test_a_total_that_was_lowered_below_what_runs_takes_nothing_and_harms_no_other_job(
    connection: Connection, worker: Worker
) -> None:
    for _ in range(4):
        await ask(connection)
    assert len(await take_any(connection, worker, JOB, room=3)) == 3
    other = await ask(connection, OTHER)
    assert await take_any(connection, worker, Wanted(JOB, 20, 3, 1, False), OTHER) == [other]


async def test_of_one_key_one_run_is_taken_and_the_next_once_it_has_ended(
    connection: Connection, worker: Worker
) -> None:
    await connection.execute("update bon_scheduler.jobs set exclusive = 'job' where name = $1", JOB)
    first, second = await ask(connection), await ask(connection)
    assert await take_any(connection, worker, JOB) == [first]
    assert await take_any(connection, worker, JOB) == []
    await connection.execute("update bon_scheduler.runs set state = 'succeeded' where id = $1", first)
    assert await take_any(connection, worker, JOB) == [second]


async def test_runs_for_businesses_keep_apart_only_their_own(connection: Connection, worker: Worker) -> None:
    """One business's refresh neither waits for the schedule's run nor keeps it waiting."""
    await connection.execute("update bon_scheduler.jobs set exclusive = 'business' where name = $1", JOB)
    everybody = [await ask(connection) for _ in range(2)]
    one = [await ask(connection, business="a") for _ in range(2)]
    other = await ask(connection, business="b")
    assert set(await take_any(connection, worker, JOB)) == {everybody[0], one[0], other}
    assert await take_any(connection, worker, JOB) == []


async def test_two_claims_of_an_exclusive_job_at_once_have_one_winner(
    pool: Pool, connection: Connection, worker: Worker
) -> None:
    await connection.execute("update bon_scheduler.jobs set exclusive = 'job' where name = $1", JOB)
    for _ in range(6):
        await ask(connection)

    async def take() -> int:
        async with pool.acquire() as mine:
            return len((await claim(mine, worker, JOB, room=6)).taken)

    assert sorted(await asyncio.gather(*(take() for _ in range(6)))) == [0, 0, 0, 0, 0, 1]


async def test_of_many_claims_at_once_none_takes_what_another_took(
    pool: Pool, connection: Connection, worker: Worker
) -> None:
    for _ in range(100):
        await ask(connection)

    async def take() -> Sequence[UUID]:
        async with pool.acquire() as mine:
            return [ref.run_id for ref in refs(list((await claim(mine, worker, JOB, room=10)).taken))]

    taken = [run_id for ids in await asyncio.gather(*(take() for _ in range(10))) for run_id in ids]
    assert (len(taken), len(set(taken))) == (100, 100)


async def test_a_run_that_is_given_back_keeps_its_place(connection: Connection, worker: Worker) -> None:
    first, _ = await ask(connection), await ask(connection)
    await give_back(connection, await hold(connection, first, worker))
    assert await take_any(connection, worker, JOB, room=1) == [first]


# Wake-ups


class Listener:
    """A worker's ear."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._wake_ups = 0
        self._end = asyncio.Event()

    async def listen(self) -> None:
        await self.connection.add_listener(CHANNEL, self._count)
        await self.connection.add_listener("an_end", lambda *_: self._end.set())

    def _count(self, *_: object) -> None:
        self._wake_ups += 1

    async def heard(self, by: Connection) -> int:
        """Return how often it was woken, also by what `by` has just committed: notifications keep their order."""
        self._end.clear()
        await by.execute("notify an_end")
        await self._end.wait()
        wake_ups, self._wake_ups = self._wake_ups, 0
        return wake_ups


@pytest.fixture
async def listener(database_url: str) -> AsyncIterator[Listener]:
    async with connections.connect(database_url) as opened:
        listening = Listener(opened)
        await listening.listen()
        yield listening


async def test_workers_are_woken_once_a_transaction_and_not_for_what_is_not_due(
    connection: Connection, listener: Listener
) -> None:
    async with connection.transaction():
        for _ in range(20):
            await ask(connection)
    assert await listener.heard(connection) == 1
    await connection.execute("select bon_scheduler.enqueue($1, run_at => now() + interval '1 hour')", JOB)
    assert await listener.heard(connection) == 0


async def test_whatever_makes_a_run_wait_again_wakes_workers(
    connection: Connection, listener: Listener, worker: Worker
) -> None:
    run_id = await ask(connection)
    assert await listener.heard(connection) == 1
    ref = await hold(connection, run_id, worker)
    assert await listener.heard(connection) == 0
    await give_back(connection, ref)
    assert await listener.heard(connection) == 1
    await give_back(connection, await hold(connection, run_id, worker), wait=timedelta(hours=1))
    assert await listener.heard(connection) == 0
    await connection.execute("update bon_scheduler.runs set state = 'dead'")
    await change_all(connection, Action.RETRY, [run_id], by="dana", reason="mended")
    assert await listener.heard(connection) == 1
    await hold(connection, run_id, worker)
    await retire_worker(connection, worker.id)
    assert await listener.heard(connection) == 0
    assert len(await release_lost(connection)) == 1
    assert await listener.heard(connection) == 1
    assert await release_lost(connection) == []
    assert await listener.heard(connection) == 0


async def test_without_a_wake_up_a_run_is_found_all_the_same(
    make_settings: MakeSettings, connection: Connection
) -> None:
    @job("a-test")
    async def quick(_: JobContext, __: NoPayload) -> Counts:
        return {}

    async with service.serving(make_settings(), jobs=[quick]) as serving:
        await until(lambda: _true(serving.engine.connected))
        await connection.execute(
            "create or replace function bon_scheduler.wake_workers() returns void language sql as 'select null::void'"
        )
        await connection.execute("select bon_scheduler.enqueue('a-test')")
        await until(lambda: all_ended(connection), seconds=5)


async def _true(value: bool) -> bool:
    return value


# Whole replicas


class Guard:
    """How many runs of a job were at work at once, at the most, in all replicas of this process."""

    def __init__(self, *, seconds: float = 0.03) -> None:
        self.now = self.most = self.began = 0
        self.seconds = seconds

    async def work(self) -> Counts:
        self.now, self.began = self.now + 1, self.began + 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(self.seconds)
        self.now -= 1
        return {}


async def all_ended(connection: Connection) -> bool:
    open_states = "select count(*) from bon_scheduler.runs where state in ('queued', 'running', 'retrying')"
    return not await connection.fetchval(open_states)


async def drain(
    make_settings: MakeSettings, connection: Connection, a_job: AnyJob, runs: int, *, replicas: int = 2, **environ: str
) -> None:
    await service.prepare(make_settings(**environ), jobs=[a_job])
    await connection.execute("select bon_scheduler.enqueue($1) from generate_series(1, $2::int)", a_job.name, runs)
    async with AsyncExitStack() as stack:
        for _ in range(replicas):
            await stack.enter_async_context(service.serving(make_settings(**environ), jobs=[a_job]))
        await until(lambda: all_ended(connection), seconds=30)


async def test_two_replicas_never_run_two_of_an_exclusive_job(
    make_settings: MakeSettings, connection: Connection
) -> None:
    guard = Guard()

    @job("a-test", exclusive=Exclusive.JOB)
    async def alone(_: JobContext, __: NoPayload) -> Counts:
        return await guard.work()

    await drain(make_settings, connection, alone, 20)
    assert (guard.most, guard.began) == (1, 20)


async def test_a_job_that_is_scheduled_by_the_environment_alone_is_exclusive(
    make_settings: MakeSettings, connection: Connection
) -> None:
    guard = Guard()

    @job("session-cleanup")
    async def cleanup(_: JobContext, __: NoPayload) -> Counts:
        return await guard.work()

    await drain(make_settings, connection, cleanup, 10, SCHEDULE_SESSION_CLEANUP="0 4 * * *")
    assert (guard.most, guard.began) == (1, 10)


async def test_two_replicas_hold_a_jobs_total_together(make_settings: MakeSettings, connection: Connection) -> None:
    guard = Guard()

    @job("a-test", at_once=3)
    async def three(_: JobContext, __: NoPayload) -> Counts:
        return await guard.work()

    await drain(make_settings, connection, three, 30)
    assert (guard.most, guard.began) == (3, 30)


async def test_each_replica_holds_its_own_limit(make_settings: MakeSettings, connection: Connection) -> None:
    guards = Guard(), Guard()

    def two(guard: Guard) -> AnyJob:
        @job("a-test", at_once_here=2)
        async def work(_: JobContext, __: NoPayload) -> Counts:
            return await guard.work()

        return work

    first, second = two(guards[0]), two(guards[1])
    await service.prepare(make_settings(), jobs=[first])
    await connection.execute("select bon_scheduler.enqueue('a-test') from generate_series(1, 40)")
    async with (
        service.serving(make_settings(), jobs=[first]),
        service.serving(make_settings(), jobs=[second]),
    ):
        await until(lambda: all_ended(connection), seconds=30)
    assert [guard.most for guard in guards] == [2, 2]
    assert sum(guard.began for guard in guards) == 40


async def test_a_low_priority_moves_while_ever_new_runs_go_before_it(
    make_settings: MakeSettings, connection: Connection
) -> None:
    began: list[int] = []

    class Place(Payload):
        priority: int

    @job("a-test")
    async def work(ctx: JobContext, payload: Place) -> Counts:
        began.append(payload.priority)
        if -100 not in began and len(began) < 500:
            async with ctx.transaction() as tx:
                await tx.execute(ASK_FIRST)
        return {}

    settings = make_settings(WORKER_CONCURRENCY="2")
    await service.prepare(settings, jobs=[work])
    await connection.execute("select bon_scheduler.enqueue('a-test', '{\"priority\": -100}', priority => -100)")
    await connection.execute(f"{ASK_FIRST} from generate_series(1, 3)")
    async with service.serving(settings, jobs=[work]):
        await until(lambda: all_ended(connection), seconds=30)
    assert began.index(-100) < 3 * OLDEST_FIRST_EVERY  # two at a time, and the claims before the first run


async def test_a_slow_job_keeps_no_other_from_starting(make_settings: MakeSettings, connection: Connection) -> None:
    over = asyncio.Event()

    @job("slow")
    async def slow(_: JobContext, __: NoPayload) -> Counts:
        await over.wait()
        return {}

    @job("quick")
    async def quick(_: JobContext, __: NoPayload) -> Counts:
        return {}

    settings = make_settings(WORKER_CONCURRENCY="8")
    await service.prepare(settings, jobs=[slow, quick])
    await connection.execute("select bon_scheduler.enqueue('slow') from generate_series(1, 100)")
    async with service.serving(settings, jobs=[slow, quick]):

        async def full() -> bool:
            return bool(await connection.fetchval(SLOW) == 7)

        await until(full)
        for _ in range(5):
            run = await connection.fetchval("select bon_scheduler.enqueue('quick')")

            async def ended(run: UUID = run) -> bool:
                state = await connection.fetchval("select state::text from bon_scheduler.runs where id = $1", run)
                return bool(state == "succeeded")

            await until(ended, seconds=5)
        assert await connection.fetchval(SLOW) == 7  # one place is kept for the other job
        await connection.execute("update bon_scheduler.runs set state = 'cancelled' where state = 'queued'")
        over.set()


async def test_a_run_once_beside_the_scheduled_run_is_refused(
    run_job: RunJob, make_settings: MakeSettings, connection: Connection
) -> None:
    """Whatever its arguments look like."""
    over = asyncio.Event()

    class Sends(Payload):
        send: bool = True

    @job("overdue-detection", exclusive=Exclusive.JOB)
    async def detection(_: JobContext, __: Sends) -> Counts:
        await over.wait()
        return {}

    settings = make_settings()
    await service.prepare(settings, jobs=[detection])
    await connection.execute("select bon_scheduler.enqueue_run('overdue-detection', origin => 'schedule')")
    async with service.serving(settings, jobs=[detection]) as serving:
        await until(lambda: _true(serving.engine.active == 1))
        with pytest.raises(AlreadyRunningError, match="is already running on"):
            await run_job(detection, jobs=[detection])
        over.set()


async def test_a_run_once_whose_environment_knows_of_no_schedule_is_refused_all_the_same(
    run_job: RunJob, make_settings: MakeSettings, connection: Connection
) -> None:
    """The service's environment alone schedules the job; that makes it exclusive for everybody, and it stays so."""
    over = asyncio.Event()

    @job("session-cleanup")
    async def cleanup(_: JobContext, __: NoPayload) -> Counts:
        await over.wait()
        return {}

    settings = make_settings(SCHEDULE_SESSION_CLEANUP="0 4 * * *")
    async with service.serving(settings, jobs=[cleanup]) as serving:
        await connection.execute("select bon_scheduler.enqueue_run('session-cleanup', origin => 'schedule')")
        await until(lambda: _true(serving.engine.active == 1))
        for _ in range(2):
            with pytest.raises(AlreadyRunningError, match="is already running on"):
                await run_job(cleanup, jobs=[cleanup])
        over.set()


# What no attempt can be made with


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        ("payload = (repeat('{\"a\":', 1200) || '1' || repeat('}', 1200))::jsonb", "the payload cannot be read"),
        ("payload = '{\"n\": 1e5000}'", "the payload cannot be read"),
        ("fire_time = '20000-01-01'", "fire_time"),
        ("fire_time = 'infinity'", "fire_time"),
        ("fire_time = '-infinity'", "fire_time"),
    ],
)
async def test_a_run_that_cannot_be_read_ends_at_once_with_the_reason_and_costs_no_other(
    make_settings: MakeSettings, connection: Connection, spoil: str, why: str
) -> None:
    @job("a-test", retry=Retry(attempts=5))
    async def quick(_: JobContext, __: NoPayload) -> Counts:
        return {}

    settings = make_settings()
    await service.prepare(settings, jobs=[quick])
    await connection.execute("select bon_scheduler.enqueue('a-test') from generate_series(1, 5)")
    spoilt = await connection.fetchval("select id from bon_scheduler.runs order by enqueued_at limit 1 offset 2")
    await connection.execute(f"update bon_scheduler.runs set {spoil} where id = $1", spoilt)
    async with service.serving(settings, jobs=[quick]):
        await until(lambda: all_ended(connection))
    rows = await connection.fetch("select id, state::text, attempt, error from bon_scheduler.runs")
    assert Counter(row["state"] for row in rows) == {"succeeded": 4, "dead": 1}
    (dead,) = [row for row in rows if row["state"] == "dead"]
    assert (dead["id"], dead["attempt"]) == (spoilt, 1)
    assert why in dead["error"]


async def test_a_worker_that_is_taken_for_dead_claims_nothing_until_it_has_spoken(connection: Connection) -> None:
    """As one that was frozen: its claim would be released at once, and the run's attempt be lost."""
    await connection.execute("insert into bon_scheduler.jobs (name) values ('a-test')")
    run_id = await connection.fetchval("select bon_scheduler.enqueue('a-test')")
    worker = Worker()
    await register_worker(connection, worker)
    await connection.execute("update bon_scheduler.workers set last_word = null")
    answer = await claim(connection, worker, "a-test")
    assert (answer.taken, answer.wait_seconds) == ([], 0.2)
    await beat(connection, worker.id)
    assert await take_any(connection, worker, "a-test") == [run_id]
