-- Tells every worker, once the transaction commits, that there may be something to claim. However often it is called in
-- one transaction, one notification is sent. It is no more than a wake-up: whoever misses it looks again by itself.
create or replace function wake_workers() returns void
language sql
set search_path = bon_scheduler, pg_temp
as $$
    select pg_notify('bon_scheduler_runs', '');
$$;
