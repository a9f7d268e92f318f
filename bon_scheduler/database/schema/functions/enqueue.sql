-- The one way in, from any language, inside the caller's own transaction: roll back, and it never existed.
-- Returns the run's id, or null when (job, dedupe_key) is taken by a run that is still retained.
create or replace function enqueue(
    job        text,
    payload    jsonb default '{}',
    dedupe_key text default null,
    run_at     timestamptz default null,
    priority   integer default 0,
    fire_time  timestamptz default null,
    origin     text default 'program',
    asked_by   text default null,
    caused_by  uuid default null
) returns uuid
language plpgsql
set search_path = bon_scheduler, pg_temp
as $$
declare
    known  jobs%rowtype;
    whose  text := business_of(enqueue.payload);
    due    boolean := enqueue.run_at is null or enqueue.run_at <= now();
    new_id uuid;
begin
    select * into known from jobs j where j.name = enqueue.job;
    if not found then
        raise exception 'bon_scheduler: unknown job "%"', enqueue.job
            using errcode = 'invalid_parameter_value',
                  hint = 'Known jobs: ' || coalesce((select string_agg(j.name, ', ' order by j.name) from jobs j),
                                                    'none yet; run: python -m bon_scheduler migrate');
    end if;
    if jsonb_typeof(enqueue.payload) is distinct from 'object' then
        raise exception 'bon_scheduler: the payload of "%" must be a JSON object, not %', enqueue.job,
                        coalesce(jsonb_typeof(enqueue.payload), 'null')
            using errcode = 'invalid_parameter_value',
                  hint = 'Give {} for a job without arguments.';
    end if;
    if enqueue.priority is null or enqueue.priority not between -100 and 100 then
        raise exception 'bon_scheduler: the priority of a run must be between -100 and 100, not %',
                        coalesce(enqueue.priority::text, 'null')
            using errcode = 'invalid_parameter_value',
                  hint = 'Give 0 for an ordinary run; a higher one goes before the others of its job.';
    end if;
    insert into runs (job, payload, dedupe_key, run_at, ready, priority, fire_time, origin, asked_by, caused_by,
                      business, concurrency_key, turn)
    values (enqueue.job, enqueue.payload, enqueue.dedupe_key, enqueue.run_at, due,
            -- A tick goes before whatever producers ask for.
            case when enqueue.origin = 'schedule' then 1000 else enqueue.priority end,
            enqueue.fire_time, enqueue.origin, enqueue.asked_by, enqueue.caused_by, whose,
            concurrency_key_of(known.name, known.exclusive, whose, enqueue.origin),
            next_turn(known.name, known.turn, whose))
    on conflict do nothing
    returning runs.id into new_id;
    if new_id is not null and due then
        perform wake_workers();
    end if;
    return new_id;
end;
$$;

comment on function enqueue is
    'Ask for a run. select bon_scheduler.enqueue(''generate-pdf'', ''{"invoice_id": "…"}'', dedupe_key => ''pdf:…'')';
