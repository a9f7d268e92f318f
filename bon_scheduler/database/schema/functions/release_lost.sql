-- Releases the runs that no living worker holds: they wait again, or are dead when their attempts are used up, and their
-- attempts have ended. Their worker's connections are ended BEFORE anybody locks what those have locked. A row that
-- somebody else has locked is left for the next time. Indexes: runs_held, attempts_pkey.
create or replace function release_lost()
returns table (run_id uuid, job text, attempt integer, state run_state)
language plpgsql
set search_path = bon_scheduler, pg_temp
as $$
#variable_conflict use_column
begin
    perform cut_off(gone.worker)
       from (select distinct r.worker from runs r where r.state = 'running' and not is_alive(r.worker)) gone;
    return query
    with lost as (
        select r.id, r.attempt, a.host, j.attempts as allowed, r.attempt - r.given_back >= j.attempts as used_up
          from runs r
          join jobs j on j.name = r.job
          left join attempts a on a.run_id = r.id and a.attempt = r.attempt
         where r.state = 'running'
           and not is_alive(r.worker)
         order by r.id
           for no key update of r skip locked
    ), ended as (
        update attempts a
           set ended_at = clock_timestamp(), outcome = 'lost', error = 'its worker stopped without a word'
          from lost l
         where a.run_id = l.id and a.attempt = l.attempt and a.ended_at is null
    )
    update runs r
       set state = case when l.used_up then 'dead' else 'retrying' end::run_state,
           ready = true, run_at = null, worker = null,
           finished_at = case when l.used_up then clock_timestamp() end,
           error = case when l.used_up
                        then format('its worker stopped without a word in each of %s attempts, the last on %s',
                                    l.allowed, l.host)
                        else 'its worker stopped without a word' end
      from lost l
     where r.id = l.id
    returning r.id, r.job, r.attempt, r.state;
    if found then
        perform wake_workers();
    end if;
end;
$$;
