-- Whether nothing of a job may be begun, by schedule, program, run or person.
create or replace function is_paused(job text) returns boolean
language sql stable
set search_path = bon_scheduler, pg_temp
as $$
    select exists (select from pauses p where p.job = $1 and (p.until is null or p.until > now()));
$$;
