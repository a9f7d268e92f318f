-- Gives waiting runs, whose rows the caller has locked, to a worker: attempt + 1 from the moment it takes them, so that a
-- run which kills its workers runs out of attempts. Returns what an attempt needs. Index: runs_pkey.
create or replace function begin_attempts(run_ids uuid[], by_worker uuid, by_host text) returns setof runs
language plpgsql
set search_path = bon_scheduler, pg_temp
set plan_cache_mode = force_generic_plan
set jit = off
as $$
begin
    return query
    with begun as (
        update runs r
           set state = 'running', attempt = r.attempt + 1, worker = by_worker,
               started_at = coalesce(r.started_at, clock_timestamp())
         where r.id = any (run_ids)
        returning r.*
    ), noted as (
        insert into attempts (run_id, attempt, worker, host, started_at)
        select b.id, b.attempt, by_worker, by_host, clock_timestamp() from begun b
    ), reached as (
        -- Never waits: a tick of the job may just be recorded, and the next claim says it again.
        update jobs j
           set turn = t.turn
          from (select b.job, max(b.turn) as turn from begun b where b.business is not null group by b.job) t
         where j.name = t.job
           and j.name in (select k.name from jobs k where k.name = t.job and k.turn < t.turn
                             for no key update skip locked)
    )
    select b.* from begun b;
end;
$$;
