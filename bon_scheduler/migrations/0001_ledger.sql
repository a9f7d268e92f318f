-- The ledger: one row for every run, from the moment it is asked for until it is pruned.
--
-- PgQueuer's own tables are in this schema already (`db.migrate` installs them first). A queue row is only
-- the way to a worker and may vanish; `runs` is the truth, and `deliver` makes a queue row for it again.
--
-- Order of locks, everywhere: jobs, runs, attempts, queue. A handler locks BON's rows first and its run last.

create table jobs (
    name           text primary key check (name ~ '^[a-z][a-z0-9]*(-[a-z0-9]+)*$'),
    payload_schema jsonb,              -- JSON Schema; null until a version with a handler has registered
    scheduled      boolean not null default false,
    last_tick      timestamptz,        -- the last fire time that is accounted for; only ever moves forwards
    registered_at  timestamptz not null default now()
);

comment on table jobs is 'Names that may be asked for. Never deleted by a version that does not know them.';

-- Asked for by BON; their handlers come with other work. A request waits, visible, and is never dropped.
insert into jobs (name) values ('shaam-allocation-request'), ('send-invoice-email'), ('generate-pdf');

create table workers (
    id         uuid primary key,
    host       text not null,
    pid        integer not null,
    version    text not null,
    started_at timestamptz not null default now(),
    seen_at    timestamptz not null default now()
);

create type run_state as enum (
    'queued', 'running', 'retrying', 'succeeded', 'partial', 'dead', 'held', 'cancelled', 'missed', 'paused'
);

create table runs (
    id          uuid primary key default gen_random_uuid(),
    job         text not null references jobs (name),
    fire_time   timestamptz,           -- the instant a schedule or a person named; null for other requests
    dedupe_key  text,
    payload     jsonb not null default '{}' check (jsonb_typeof(payload) = 'object'),
    priority    integer not null default 0,
    run_at      timestamptz not null default now(),
    origin      text not null check (origin in ('schedule', 'person', 'program', 'run')),
    asked_by    text,
    reason      text,                  -- why it was missed, cancelled, held or paused
    state       run_state not null default 'queued',
    attempt     integer not null default 0,    -- taken when a worker starts; also the fence
    given_back  integer not null default 0,    -- attempts that a stopping worker gave back: they do not count
    worker      uuid,
    enqueued_at timestamptz not null default now(),
    started_at  timestamptz,           -- of the first attempt
    finished_at timestamptz,
    counts      json not null default '{}',     -- in the order the handler gave them
    error       text,
    caused_by   uuid references runs (id)
);

-- A tick is recorded once, however many replicas notice it.
create unique index runs_tick on runs (job, fire_time) where origin = 'schedule';
create unique index runs_dedupe_key on runs (job, dedupe_key) where dedupe_key is not null;
create index runs_newest on runs (enqueued_at desc, id);
create index runs_by_job on runs (job, enqueued_at desc);
create index runs_caused_by on runs (caused_by) where caused_by is not null;
create index runs_unfinished on runs (job, state, run_at) where state in ('queued', 'running', 'retrying');
create index runs_for_a_person on runs (job, state) where state in ('dead', 'held');

create table attempts (
    run_id     uuid not null references runs (id) on delete cascade,
    attempt    integer not null,
    worker     uuid not null,
    host       text not null,
    started_at timestamptz not null,
    ended_at   timestamptz,
    outcome    text check (outcome in
                 ('succeeded', 'partial', 'failed', 'timed_out', 'lost', 'given_back', 'dead')),
    error      text,
    primary key (run_id, attempt)
);

create table business_outcomes (
    run_id      uuid not null references runs (id) on delete cascade,
    business_id uuid not null,
    outcome     text not null check (outcome in ('done', 'kept', 'failed')),
    counts      jsonb not null default '{}',
    error       text,
    primary key (run_id, business_id)
);

-- One e-mail to one recipient for one business and day. Addresses are stored hashed.
create table deliveries (
    id             uuid primary key default gen_random_uuid(),
    kind           text not null,
    business_id    uuid not null,
    as_of          date not null,
    recipient_hash text not null,
    state          text not null check (state in ('intended', 'sent', 'refused', 'unknown')),
    message_id     text not null,
    run_id         uuid not null references runs (id),
    attempt        integer not null,
    reply          text,               -- the server's, without addresses
    intended_at    timestamptz not null default now(),
    settled_at     timestamptz,
    unique (kind, business_id, as_of, recipient_hash)
);
create index deliveries_uncertain on deliveries (intended_at) where state in ('intended', 'unknown');
create index deliveries_run on deliveries (run_id);


-- Makes a queue row for a run that has not ended, unless one for its next attempt is there already.
-- First delivery, retry, giving back and reconciliation are all this function.
create function deliver(run_id uuid, delay interval default '0') returns boolean
language sql
set search_path = bon_scheduler, pg_temp
as $$
    with inserted as (
        insert into pgqueuer (priority, entrypoint, payload, execute_after, dedupe_key, status)
        select r.priority, r.job, convert_to(r.id::text, 'UTF8'),
               greatest(r.run_at, now() + delay), r.id || '/' || r.attempt, 'queued'
          from runs r
         where r.id = $1
           and r.state in ('queued', 'retrying', 'running')
        on conflict (dedupe_key) where status in ('queued', 'picked') and dedupe_key is not null
        do nothing
        returning 1
    )
    select exists (select from inserted);
$$;


-- The one way in, from any language, inside the caller's own transaction: roll back, and it never existed.
-- Returns the run's id, or null when (job, dedupe_key) is taken by a run that is still retained.
create function enqueue(
    job        text,
    payload    jsonb default '{}',
    dedupe_key text default null,
    run_at     timestamptz default null,
    priority   integer default 0,
    fire_time  timestamptz default null,
    origin     text default 'program',
    asked_by   text default null,
    caused_by  uuid default null
) returns uuid
language plpgsql
set search_path = bon_scheduler, pg_temp
as $$
declare
    new_id uuid;
begin
    if not exists (select from jobs j where j.name = enqueue.job) then
        raise exception 'bon_scheduler: unknown job "%"', enqueue.job
            using errcode = 'invalid_parameter_value',
                  hint = 'Known jobs: ' || coalesce((select string_agg(j.name, ', ' order by j.name) from jobs j),
                                                    'none yet; run: python -m bon_scheduler migrate');
    end if;
    if jsonb_typeof(enqueue.payload) is distinct from 'object' then
        raise exception 'bon_scheduler: the payload of "%" must be a JSON object, not %', enqueue.job,
                        coalesce(jsonb_typeof(enqueue.payload), 'null')
            using errcode = 'invalid_parameter_value',
                  hint = 'Give {} for a job without arguments.';
    end if;
    insert into runs (job, payload, dedupe_key, run_at, priority, fire_time, origin, asked_by, caused_by)
    values (enqueue.job, enqueue.payload, enqueue.dedupe_key, coalesce(enqueue.run_at, now()),
            enqueue.priority, enqueue.fire_time, enqueue.origin, enqueue.asked_by, enqueue.caused_by)
    on conflict do nothing
    returning runs.id into new_id;
    if new_id is not null then
        perform deliver(new_id);
    end if;
    return new_id;
end;
$$;

comment on function enqueue is
    'Ask for a run. select bon_scheduler.enqueue(''generate-pdf'', ''{"invoice_id": "…"}'', dedupe_key => ''pdf:…'')';


-- A run that a living worker holds is nobody else's. "Living" is a heartbeat younger than the lease.
create function is_alive(worker uuid, lease interval) returns boolean
language sql stable
set search_path = bon_scheduler, pg_temp
as $$
    select exists (select from workers w where w.id = $1 and w.seen_at > clock_timestamp() - $2);
$$;


-- Takes a run for a worker: attempt + 1, from the moment it starts, so that a run which kills its worker
-- runs out of attempts. With `exclusive`, no two runs of the job are ever claimed at once.
--
-- verdict: claimed · ended (nothing to do) · held (a living worker has it) · busy (a living worker runs
-- another run of this exclusive job) · exhausted (its last attempt died with its worker: now dead).
create function claim(
    run_id    uuid,
    by_worker uuid,
    by_host   text,
    lease     interval,
    allowed   integer,
    exclusive boolean,
    out verdict text, out attempt integer, out holder_host text, out holder_since timestamptz
)
language plpgsql
set search_path = bon_scheduler, pg_temp
as $$
declare
    run   runs%rowtype;
    other runs%rowtype;
begin
    if exclusive then
        -- BEFORE the run's own row, otherwise two claims of one job could both see nobody running.
        perform from jobs j where j.name = (select r.job from runs r where r.id = run_id) for no key update;
    end if;
    select * into run from runs r where r.id = run_id for update;
    if not found or run.state not in ('queued', 'retrying', 'running') then
        verdict := 'ended';
        return;
    end if;
    if run.state = 'running' then
        if is_alive(run.worker, lease) then
            verdict := 'held';
            select a.host, a.started_at into holder_host, holder_since
              from attempts a where a.run_id = run.id and a.attempt = run.attempt;
            return;
        end if;
        update attempts a
           set ended_at = clock_timestamp(), outcome = 'lost', error = 'its worker stopped without a word'
         where a.run_id = run.id and a.attempt = run.attempt and a.ended_at is null;
        if run.attempt - run.given_back >= allowed then
            update runs r
               set state = 'dead', finished_at = clock_timestamp(),
                   error = format('its worker stopped without a word in each of %s attempts, the last on %s',
                                  allowed, (select a.host from attempts a
                                             where a.run_id = run.id and a.attempt = run.attempt))
             where r.id = run.id;
            verdict := 'exhausted';
            return;
        end if;
    end if;
    if exclusive then
        select * into other from runs r
         where r.job = run.job and r.state = 'running' and r.id <> run.id and is_alive(r.worker, lease)
         limit 1;
        if found then
            verdict := 'busy';
            select a.host, a.started_at into holder_host, holder_since
              from attempts a where a.run_id = other.id and a.attempt = other.attempt;
            return;
        end if;
    end if;
    attempt := run.attempt + 1;
    update runs r
       set state = 'running', attempt = claim.attempt, worker = by_worker,
           started_at = coalesce(r.started_at, clock_timestamp())
     where r.id = run.id;
    insert into attempts (run_id, attempt, worker, host, started_at)
    values (run.id, claim.attempt, by_worker, by_host, clock_timestamp());
    verdict := 'claimed';
end;
$$;
