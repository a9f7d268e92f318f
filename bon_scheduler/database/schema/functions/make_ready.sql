-- Marks the waiting runs whose instant has come. Returns in how long the next one's comes; null: none waits for one.
-- Index: runs_timed.
create or replace function make_ready() returns interval
language sql
set search_path = bon_scheduler, pg_temp
as $$
    update runs
       set ready = true
     where id in (select r.id
                    from runs r
                   where not r.ready
                     and r.state in ('queued', 'retrying')
                     and r.run_at <= now()
                   order by r.run_at
                   limit 1000
                     for no key update skip locked);
    select r.run_at - now()
      from runs r
     where not r.ready and r.state in ('queued', 'retrying') and r.run_at > now() and isfinite(r.run_at)
     order by r.run_at
     limit 1;
$$;
