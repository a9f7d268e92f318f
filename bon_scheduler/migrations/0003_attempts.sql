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
