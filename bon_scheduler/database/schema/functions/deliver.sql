-- Stays for one release. The version before ends its `enqueue` with it, and a call of that which waited while this
-- version's tables were made goes on as it began: its run becomes what `enqueue_run` would have made it.
create or replace function deliver(run_id uuid) returns boolean
language plpgsql
security definer
set search_path = bon_scheduler, pg_temp
as $$
begin
    update runs r
       set ready = r.run_at <= now(),
           run_at = case when r.run_at > now() then r.run_at end,
           business = business_of(r.payload),
           concurrency_key = concurrency_key_of(j.name, j.exclusive, business_of(r.payload), r.origin),
           turn = next_turn(j.name, j.turn, business_of(r.payload))
      from jobs j
     where r.id = deliver.run_id and r.state = 'queued' and r.attempt = 0 and r.ready
       and r.run_at is not null and j.name = r.job;
    if found then
        perform wake_workers();
    end if;
    return found;
end;
$$;
