-- Who is alive, and what is due, whatever the database's clock does.
--
-- A worker changes its `last_word` with each beat. A process that has seen the same word for a whole lease, by a
-- clock of its own that nobody can set, takes it away (`workers.BURY`); the next beat, if there is one, gives a new
-- one. So whether a worker is alive is a fact that was judged once, by somebody who watched, and that all go by.

alter table workers
    add column last_word uuid default gen_random_uuid(),
    add column lease     interval not null default '15 seconds';

comment on column workers.last_word is 'Another with each beat; null while the worker is taken for dead.';
comment on column workers.lease is 'How long it may be silent; whoever watches with a longer lease waits for that.';
comment on column workers.seen_at is 'For people. Nothing is judged by it: the clock may have been set since.';

alter table runs add column timed_at timestamptz not null default now();

comment on column runs.timed_at is
    'When run_at was set: with it, a run that was due at once is told from one that was put off.';

drop function claim(uuid, uuid, text, interval, integer, boolean);
drop function is_alive(uuid, interval);
drop function deliver(uuid, interval);


-- A run that a living worker holds is nobody else's. One that has left has no row.
create function is_alive(worker uuid) returns boolean
language sql stable
set search_path = bon_scheduler, pg_temp
as $$
    select exists (select from workers w where w.id = $1 and w.last_word is not null);
$$;


-- Whether a run's time has come. A clock that was set back since does not put off what was due at once; what waits
-- for a length of time after an attempt (`timed_at` is in the future then) goes at once instead of after the step.
-- What was asked for at an instant to come keeps it. No search path, so that it can be inlined.
create function is_due(run runs) returns boolean
language sql stable
as $$
    select run.state = 'running'
        or run.run_at <= now()
        or run.run_at <= run.timed_at
        or (run.attempt > 0 and run.timed_at > now() + interval '1 minute');
$$;


-- As before, but a queue row that is due says so by an instant that no clock can be set back behind.
create function deliver(run_id uuid) returns boolean
language sql
set search_path = bon_scheduler, pg_temp
as $$
    with inserted as (
        insert into pgqueuer (priority, entrypoint, payload, execute_after, dedupe_key, status)
        select r.priority, r.job, convert_to(r.id::text, 'UTF8'),
               case when is_due(r) then 'epoch' else r.run_at end, r.id || '/' || r.attempt, 'queued'
          from runs r
         where r.id = $1
           and r.state in ('queued', 'retrying', 'running')
        on conflict (dedupe_key) where status in ('queued', 'picked') and dedupe_key is not null
        do nothing
        returning 1
    )
    select exists (select from inserted);
$$;


-- As before; and a queue row makes room that only a clock which was set back keeps: picked in the future, or put off
-- for longer than a busy job does while its run is due. `lease` null: whose row was picked is nobody's business yet.
create or replace function redeliver(run_id uuid, lease interval) returns boolean
language plpgsql
set search_path = bon_scheduler, pg_temp
as $$
begin
    delete from pgqueuer q
     using runs r
     where r.id = redeliver.run_id
       and q.dedupe_key = r.id || '/' || r.attempt
       and (   (q.status = 'picked'
                and q.heartbeat not between clock_timestamp() - redeliver.lease and clock_timestamp())
            or (q.status = 'queued' and q.execute_after > clock_timestamp() + interval '1 minute' and is_due(r)));
    return deliver(redeliver.run_id);
end;
$$;


create or replace function enqueue_many(
    job         text,
    payloads    jsonb[],
    dedupe_keys text[],
    priority    integer,
    origin      text,
    asked_by    text,
    caused_by   uuid
) returns bigint
language sql
set search_path = bon_scheduler, pg_temp
as $$
    with wished as (
        insert into runs (job, payload, dedupe_key, priority, origin, asked_by, caused_by)
        select enqueue_many.job, w.payload, w.key, enqueue_many.priority, enqueue_many.origin,
               enqueue_many.asked_by, enqueue_many.caused_by
          from unnest(payloads, dedupe_keys) as w (payload, key)
        on conflict do nothing
        returning id, attempt
    ), queued as (
        insert into pgqueuer (priority, entrypoint, payload, execute_after, dedupe_key, status)
        select enqueue_many.priority, enqueue_many.job, convert_to(w.id::text, 'UTF8'), 'epoch',
               w.id || '/' || w.attempt, 'queued'
          from wished w
    )
    select count(*) from wished;
$$;


-- Takes a run for a worker: attempt + 1, from the moment it starts, so that a run which kills its worker runs out of
-- attempts. With `exclusive`, no two runs of the job WITHOUT ARGUMENTS are ever claimed at once.
--
-- verdict: claimed · ended (nothing to do) · held (a living worker has it) · busy (a living worker runs another run
-- of this exclusive job) · locked (a transaction that has locked its row does not end: ask again) · exhausted (its
-- last attempt died with its worker: now dead). `run` is the run as it was found, under its lock: a statement that
-- reads it beside the claim would see it as it was before the claim waited. `holder_silent`: whether the one who has
-- it looks silent by the database's clock, which proves nothing.
create function claim(
    run_id    uuid,
    by_worker uuid,
    by_host   text,
    allowed   integer,
    exclusive boolean,
    out verdict text, out attempt integer, out run runs,
    out holder_host text, out holder_since timestamptz, out holder_silent boolean
)
language plpgsql
set search_path = bon_scheduler, pg_temp
set lock_timeout = '1s'
as $$
declare
    other runs%rowtype;
begin
    select * into run from runs r where r.id = run_id;
    if run.state = 'running' and not is_alive(run.worker) then
        -- BEFORE any lock, otherwise a frozen worker's transaction that has the run's row locked would keep its
        -- successor from ever coming to end it.
        perform cut_off(run.worker);
    end if;
    if run.state = 'running' and is_alive(run.worker) then
        other := run;
        verdict := 'held';
    else
        begin
            exclusive := exclusive and jsonb_strip_nulls(run.payload) = '{}';
            if exclusive then
                -- BEFORE the run's own row, otherwise two claims of one job could both see nobody running.
                perform from jobs j where j.name = run.job for no key update;
            end if;
            -- Waits for a fence (`for share`), but not for a handler that has only recorded a business or asked for
            -- a run (`for key share`).
            select * into run from runs r where r.id = run_id for no key update;
        exception when lock_not_available then
            verdict := 'locked';
            return;
        end;
        if not found or run.state not in ('queued', 'retrying', 'running') then
            verdict := 'ended';
            return;
        end if;
        if run.state = 'running' and is_alive(run.worker) then
            other := run;
            verdict := 'held';
        end if;
    end if;
    if verdict is null and run.state = 'running' then
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
    if verdict is null and exclusive then
        select * into other from runs r
         where r.job = run.job and r.state = 'running' and r.id <> run.id and is_alive(r.worker)
           and jsonb_strip_nulls(r.payload) = '{}'
         limit 1;
        if found then
            verdict := 'busy';
        end if;
    end if;
    if verdict is not null then
        select a.host, a.started_at, w.seen_at not between clock_timestamp() - w.lease and clock_timestamp()
          into holder_host, holder_since, holder_silent
          from attempts a
          left join workers w on w.id = a.worker
         where a.run_id = other.id and a.attempt = other.attempt;
        return;
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
