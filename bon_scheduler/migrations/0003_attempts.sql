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
