-- How many runs there are by job and state, of those that have not ended or wait for a person, and for how many seconds
-- the oldest has been due of those that may start. Of each kind at most `most` runs of a job are read, in the order in
-- which they were asked for, so that it takes the same time however many wait; of what is put off, `most` of all jobs.
create or replace function read_queue(
    most integer, out job text, out state run_state, out runs bigint, out due_seconds double precision
) returns setof record
language plpgsql stable
set search_path = bon_scheduler, pg_temp
-- Each part is a walk along an index that ends early, which the planner's guesses would give up for a whole table.
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
set jit = off
as $$
begin
    return query
        select o.job, o.state, count(*), extract(epoch from clock_timestamp() - min(shown(o.due)))::double precision
          from (select j.name as job, w.state, w.due
                  from jobs j
                 cross join lateral (select r.state, coalesce(r.run_at, r.enqueued_at) as due
                                       from runs r
                                      where r.job = j.name and r.ready and r.state in ('queued', 'retrying')
                                      order by r.enqueued_at
                                      limit most) as w
                union all
                (select r.job, r.state, null
                   from runs r
                  where not r.ready and r.state in ('queued', 'retrying')
                  order by r.run_at
                  limit most)
                union all
                (select r.job, r.state, null from runs r where r.state = 'running' limit most)
                union all
                select j.name, w.state, null
                  from jobs j
                 cross join (values ('dead'::run_state), ('held')) as ended (state)
                 cross join lateral (select r.state
                                       from runs r
                                      where r.job = j.name and r.state = ended.state and r.state in ('dead', 'held')
                                        and not r.dry_run
                                      limit most) as w) as o
         group by o.job, o.state;
end;
$$;
