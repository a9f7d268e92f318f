-- What a run needs to survive its worker, its queue row and a person's mind.

-- A worker compares what it holds with what it works on, every quarter lease.
create index runs_held on runs (worker) where state = 'running';

alter table attempts drop constraint attempts_outcome_check;
alter table attempts add constraint attempts_outcome_check check (outcome in
    ('succeeded', 'partial', 'failed', 'timed_out', 'lost', 'given_back', 'dead', 'cancelled'));

comment on column runs.given_back is
    'Attempts that do not count: given back by a stopping worker, or made before a person''s retry.';


-- Delivers a run again that nobody works on: like `deliver`, but a queue row that somebody picked and that was
-- silent for longer than the lease is in nobody's hands and makes room.
create function redeliver(run_id uuid, lease interval) returns boolean
language plpgsql
set search_path = bon_scheduler, pg_temp
as $$
begin
    delete from pgqueuer q
     using runs r
     where r.id = redeliver.run_id
       and q.dedupe_key = r.id || '/' || r.attempt
       and q.status = 'picked'
       and q.heartbeat < clock_timestamp() - redeliver.lease;
    return deliver(redeliver.run_id);
end;
$$;


-- Ends the connections of a worker that is taken for dead. A process that was frozen between the two halves of a
-- statement (its plan is asked for, its execution is not) is not idle to the server, so no limit of idleness ends
-- its transaction, and the rows it has locked stay locked for as long as it is frozen. If it was not dead after all,
-- it has lost its runs already, and connects anew.
create function cut_off(worker uuid) returns void
language plpgsql
set search_path = bon_scheduler, pg_temp
as $$
begin
    perform pg_terminate_backend(a.pid)
       from pg_stat_activity a
      where a.datname = current_database()
        and a.application_name = 'bon_scheduler ' || cut_off.worker
        and a.pid <> pg_backend_pid();
exception when insufficient_privilege then
    raise warning 'bon_scheduler: a dead worker''s connections belong to another role and were not ended'
        using hint = 'Let all workers connect as one role.';
end;
$$;


-- As before, and whoever takes a run over ends the connections of the worker that had it.
create or replace function claim(
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
        perform cut_off(run.worker);
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
