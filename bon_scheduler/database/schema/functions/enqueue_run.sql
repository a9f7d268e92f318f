-- Asks for a run, whoever asks: the door `enqueue`, a tick, a person's command, a run. No producer may call it: who asked,
-- and for which fire time, is not theirs to say.
-- Returns the run's id, or null when (job, dedupe_key) is taken by a run that is still retained.
create or replace function enqueue_run(
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
    whose  text := business_of(enqueue_run.payload);
    due    boolean := enqueue_run.run_at is null or enqueue_run.run_at <= now();
    new_id uuid;
begin
    select * into known from jobs j where j.name = enqueue_run.job;
    if not found then
        raise exception 'bon_scheduler: unknown job "%"', enqueue_run.job
            using errcode = 'invalid_parameter_value',
                  hint = 'Known jobs: ' || coalesce((select string_agg(j.name, ', ' order by j.name) from jobs j),
                                                    'none yet; run: bon-scheduler migrate');
    end if;
    if jsonb_typeof(enqueue_run.payload) is distinct from 'object' then
        raise exception 'bon_scheduler: the payload of "%" must be a JSON object, not %', enqueue_run.job,
                        coalesce(jsonb_typeof(enqueue_run.payload), 'null')
            using errcode = 'invalid_parameter_value',
                  hint = 'Give {} for a job without arguments.';
    end if;
    if enqueue_run.priority is null or enqueue_run.priority not between -100 and 100 then
        raise exception 'bon_scheduler: the priority of a run must be between -100 and 100, not %',
                        coalesce(enqueue_run.priority::text, 'null')
            using errcode = 'invalid_parameter_value',
                  hint = 'Give 0 for an ordinary run; a higher one goes before the others of its job.';
    end if;
    if octet_length(enqueue_run.payload::text) > 262144 then
        raise exception 'bon_scheduler: the payload of "%" has % bytes', enqueue_run.job,
                        octet_length(enqueue_run.payload::text)
            using errcode = 'invalid_parameter_value',
                  hint = 'Give at most 262144 bytes; keep the rest in a table of yours, and name its row.';
    end if;
    if jsonb_path_exists(enqueue_run.payload, '$.**{200}') then
        raise exception 'bon_scheduler: the payload of "%" is nested 200 levels deep', enqueue_run.job
            using errcode = 'invalid_parameter_value',
                  hint = 'Nest it less deeply; not every program can hold it.';
    end if;
    if enqueue_run.dedupe_key = '' or octet_length(enqueue_run.dedupe_key) > 1000 then
        raise exception 'bon_scheduler: the dedupe key of a run must have 1 to 1000 bytes, not %',
                        octet_length(enqueue_run.dedupe_key)
            using errcode = 'invalid_parameter_value',
                  hint = 'Give null for none; a hash of a longer one.';
    end if;
    if not isfinite(enqueue_run.run_at) or enqueue_run.run_at > now() + interval '10 years' then
        raise exception 'bon_scheduler: run_at % is no instant within ten years from now', enqueue_run.run_at
            using errcode = 'invalid_parameter_value',
                  hint = 'Give null for at once.';
    end if;
    if not isfinite(enqueue_run.fire_time)
       or enqueue_run.fire_time not between timestamptz '1900-01-01' and timestamptz '2999-12-31'
       or enqueue_run.origin <> 'schedule' and enqueue_run.fire_time > clock_timestamp() + interval '1 minute' then
        raise exception 'bon_scheduler: the fire time % of "%" has not come', enqueue_run.fire_time, enqueue_run.job
            using errcode = 'invalid_parameter_value',
                  hint = 'A run is judged by its fire time. If it has come, this clock and the database''s differ: see check.';
    end if;
    insert into runs (job, payload, dedupe_key, run_at, asked_for, ready, priority, fire_time, origin, asked_by, caused_by,
                      business, concurrency_key, turn)
    values (enqueue_run.job, enqueue_run.payload, enqueue_run.dedupe_key, enqueue_run.run_at,
            case when not due then enqueue_run.run_at end, due,
            -- A tick goes before whatever producers ask for.
            case when enqueue_run.origin = 'schedule' then 1000 else enqueue_run.priority end,
            enqueue_run.fire_time, enqueue_run.origin, enqueue_run.asked_by, enqueue_run.caused_by, whose,
            concurrency_key_of(known.name, known.exclusive, whose, enqueue_run.origin),
            next_turn(known.name, known.turn, whose))
    on conflict do nothing
    returning runs.id into new_id;
    if new_id is not null and due then
        perform wake_workers();
    end if;
    return new_id;
end;
$$;

revoke all on function enqueue_run (text, jsonb, text, timestamptz, integer, timestamptz, text, text, uuid) from public;
