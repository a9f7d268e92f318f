-- The turn of a run that is asked for now: the next after the one that claims of the job have reached, and after the
-- last that waits for the same business. So a business with ten thousand waiting runs keeps no other waiting.
-- Index: runs_turns.
create or replace function next_turn(job text, reached bigint, business text) returns bigint
language sql stable
set search_path = bon_scheduler, pg_temp
as $$
    select greatest(next_turn.reached,
                    (select max(r.turn)
                       from runs r
                      where r.job = next_turn.job
                        and r.business = next_turn.business
                        and r.state in ('queued', 'retrying'))) + 1;
$$;
