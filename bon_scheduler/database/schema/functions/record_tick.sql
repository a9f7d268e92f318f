-- Accounts for one fire time, once, whoever asks and however often; the job's last tick moves from exactly
-- `previous` to `fire_time`, so that no fire time between can be passed over. `in_force` is the start of the
-- newest schedule that the caller planned by: one that was declared meanwhile makes the plan stale.
--
-- verdict: recorded · paused (recorded as such) · missed (recorded as such) · waits (a tick of this job is
-- active, nothing is recorded) · stale (the plan is not of the present last tick and schedule, nothing is
-- recorded).
create or replace function record_tick(
    job       text,
    previous  timestamptz,
    in_force  timestamptz,
    fire_time timestamptz,
    missed    text,
    out verdict text, out run_id uuid
)
language plpgsql
set search_path = bon_scheduler, pg_temp
as $$
declare
    pause pauses%rowtype;
begin
    -- A statement of its own, BEFORE looking at runs: the next one's snapshot must see what whoever held
    -- this lock has recorded.
    perform from jobs j where j.name = record_tick.job and j.last_tick = previous for no key update;
    if not found
       or record_tick.fire_time <= previous
       or in_force is distinct from (select max(s.effective_from) from schedules s where s.job = record_tick.job)
    then
        verdict := 'stale';
        return;
    end if;
    -- Of a pause that is over, ticks of its time are recorded as paused however late that is.
    select * into pause from pauses p
     where p.job = record_tick.job and (p.until is null or p.until > record_tick.fire_time);
    if found then
        verdict := 'paused';
    elsif record_tick.missed is not null then
        verdict := 'missed';
    elsif exists (select from runs r
                   where r.job = record_tick.job
                     and r.origin = 'schedule'
                     and r.state in ('queued', 'running', 'retrying')) then
        verdict := 'waits';
        return;
    else
        verdict := 'recorded';
    end if;
    update jobs j set last_tick = record_tick.fire_time where j.name = record_tick.job;
    if verdict = 'recorded' then
        run_id := enqueue_run(record_tick.job, fire_time => record_tick.fire_time, origin => 'schedule',
                              asked_by => 'schedule');
    else
        insert into runs (job, fire_time, origin, asked_by, state, reason, finished_at)
        values (record_tick.job, record_tick.fire_time, 'schedule', 'schedule', verdict::run_state,
                case verdict when 'paused' then 'paused by ' || pause."by" || ': ' || pause.reason
                             else record_tick.missed end,
                clock_timestamp())
        on conflict do nothing
        returning id into run_id;
    end if;
end;
$$;
