-- Marks the runs that wait for a length of time since an attempt which ended in the future: the clock was set back since,
-- and the wait would last until it has caught up. Returns how many there were. Index: runs_timed.
create or replace function make_overtaken_ready() returns bigint
language sql
set search_path = bon_scheduler, pg_temp
as $$
    with overtaken as (
        update runs
           set ready = true
         where id in (select r.id
                        from runs r
                        join attempts a on a.run_id = r.id and a.attempt = r.attempt
                       where not r.ready
                         and r.state in ('queued', 'retrying')
                         and a.ended_at > now() + interval '1 minute'
                         for no key update of r skip locked)
        returning 1
    )
    select count(*) from overtaken;
$$;
