-- The one way in for producers, from any language, inside the caller's own transaction: roll back, and it never existed.
-- With the rights of its owner: a producer needs USAGE on this schema and nothing on its tables. Who asked is what the
-- session says, not the caller.
-- Returns the run's id, or null when (job, dedupe_key) is taken by a run that is still retained.
create or replace function enqueue(
    job        text,
    payload    jsonb default '{}',
    dedupe_key text default null,
    run_at     timestamptz default null,
    priority   integer default 0
) returns uuid
language sql
security definer
set search_path = bon_scheduler, pg_temp
as $$
    select enqueue_run(enqueue.job, enqueue.payload, enqueue.dedupe_key, enqueue.run_at, enqueue.priority,
                       asked_by => left(concat_ws(' ', session_user, nullif(current_setting('application_name'), '')), 200));
$$;

comment on function enqueue (text, jsonb, text, timestamptz, integer) is
    'Ask for a run. select bon_scheduler.enqueue(''generate-pdf'', ''{"invoice_id": "…"}'', dedupe_key => ''pdf:…'')';
