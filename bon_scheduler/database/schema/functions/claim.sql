-- Takes waiting runs for a worker: as many as it has room for, job by job, so that runs which nobody here may take cost
-- nothing. A running run is never taken: whoever declares its worker dead releases it (`release_lost`).
--
-- `room`: how many runs in all; `reserve`: how many of those places are kept for jobs of which nothing runs here.
-- By job: `rooms`, how many more of it here; `active`, how many of it run here; `totals`, how many may run in all
-- replicas (null: any number); `mailing`, whether each of its runs begins with a letter, which waits for the mail gate
-- (`letters_apart`; null: letters are not sent).
-- `look_at_clock`: whether to look for runs whose instant has come. `oldest_first`: the oldest run of each job goes
-- first, so that one of a low priority moves. `seen`: see `is_same_ledger`; of another nothing is taken.
--
-- Of a job that is paused nothing is taken (`is_paused`).
-- Order: within a job by priority, then turn, then age; among jobs, who runs least here first.
-- Claims exclude each other, so that what must not run together, totals and the gate are judged once and at once. None
-- waits for a row, and the lock ends with the statement.
-- Planned once a session, by the indexes whatever the statistics say: a plan made while the table was empty stays.
-- Returns one row at least. `wait`: in how long it is worth asking again; null: nobody knows.
create or replace function claim(
    by_worker     uuid,
    by_host       text,
    room          integer,
    reserve       integer,
    jobs          text[],
    rooms         integer[],
    active        integer[],
    totals        integer[],
    mailing       boolean[],
    letters_apart interval,
    look_at_clock boolean,
    oldest_first  boolean,
    seen          bigint
)
returns table (
    wait interval, run_id uuid, attempt integer, job text, fire_time timestamptz, asked_for timestamptz,
    payload jsonb, origin text, given_back integer, retried_after integer, released boolean,
    slot interval, trial boolean, after_failures boolean
)
language plpgsql
set search_path = bon_scheduler, pg_temp
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set lock_timeout = '1s'
as $$
#variable_conflict use_variable
declare
    next_timed interval;
    gate       mail_gate%rowtype;
    letters    integer := 2147483647;
    is_trial   boolean;
    first_slot timestamptz;
    gate_wait  interval;
    busy       text[];
    taken      uuid[];
    mailed     uuid[];
begin
    lock table one_claim in share row exclusive mode;
    if not is_same_ledger(seen) then
        return next;    -- one row, of nulls
        return;
    end if;
    -- Nothing for a worker that is taken for dead and has not spoken since: it would be released again at once, as if it
    -- were lost, and an attempt be used up. `for share`: nobody declares it dead before this commits.
    perform from workers w where w.id = by_worker and w.last_word is not null for share;
    if not found then
        room := 0;
        gate_wait := '200 milliseconds';
    end if;
    if look_at_clock then
        next_timed := make_ready();
    end if;
    if letters_apart is not null and true = any (mailing) then
        select * into gate from mail_gate for no key update skip locked;
        if found then
            select a.letters, a.trial, a.first_slot, a.wait
              into letters, is_trial, first_slot, gate_wait
              from letters_allowed(gate, letters_apart) a;
        else
            letters := 0;   -- a letter is passing
            gate_wait := '20 milliseconds';
        end if;
    end if;
    busy := array(select r.concurrency_key from runs r where r.state = 'running' and r.concurrency_key is not null);
    with wanted as (
        select w.job, w.active, w.mailing and letters_apart is not null as mails,
               least(w.room,
                     w.total - case when w.total is not null
                                    then (select count(*) from runs r where r.state = 'running' and r.job = w.job) end,
                     case when w.mailing then letters end,
                     case when j.exclusive = 'job' then (j.name <> all (busy))::integer end) as room
          from unnest(jobs, rooms, active, totals, mailing) as w (job, room, active, total, mailing)
          join bon_scheduler.jobs j on j.name = w.job
         where not is_paused(w.job)
    ), found as (
        select w.job, w.active, w.mails, r.*
          from wanted w
         cross join lateral (
                  select o.*, true as favoured
                    from (select r.id, r.priority, r.turn, r.enqueued_at, r.concurrency_key
                            from runs r
                           where oldest_first
                             and r.job = w.job and r.ready and r.state in ('queued', 'retrying')
                             and (r.concurrency_key is null or r.concurrency_key <> all (busy))
                           order by r.enqueued_at
                           limit least(w.room, 1)
                             for no key update of r skip locked) o
                   union all
                  select f.*, false
                    from (select r.id, r.priority, r.turn, r.enqueued_at, r.concurrency_key
                            from runs r
                           where r.job = w.job and r.ready and r.state in ('queued', 'retrying')
                             and (r.concurrency_key is null or r.concurrency_key <> all (busy))
                           order by r.priority desc, r.turn, r.enqueued_at, r.id
                           limit w.room
                             for no key update of r skip locked) f) r
         where w.room > 0
    ), single as (
        -- Once, also where it is the oldest; and one run of each key.
        select f.*, row_number() over (partition by coalesce(f.concurrency_key, f.id::text)
                                       order by f.favoured desc, f.priority desc, f.turn, f.enqueued_at, f.id) as nth
          from found f
    ), levelled as (
        select s.id, s.mails, s.priority, s.enqueued_at,
               s.active + row_number() over (partition by s.job order by s.favoured desc, s.priority desc, s.turn,
                                                                         s.enqueued_at, s.id) as level,
               row_number() over (partition by s.mails
                                  order by s.favoured desc, s.priority desc, s.turn, s.enqueued_at, s.id) as nth_letter
          from single s
         where s.nth = 1
    ), ranked as (
        select l.id, l.mails, l.level,
               row_number() over (order by l.level, l.priority desc, l.enqueued_at, l.id) as place
          from levelled l
         where not l.mails or l.nth_letter <= letters
    )
    select array_agg(r.id order by r.place), array_agg(r.id order by r.place) filter (where r.mails)
      into taken, mailed
      from ranked r
     where r.place <= case when r.level = 1 then room else room - reserve end;
    if mailed is not null then
        update mail_gate g
           set next_slot = case when is_trial then g.next_slot
                                else first_slot + cardinality(mailed) * letters_apart end,
               trying_until = case when is_trial then clock_timestamp() + interval '3 minutes'
                                   else g.trying_until end;
    end if;
    return query
    select least(next_timed, gate_wait), b.id, b.attempt, b.job, b.fire_time, coalesce(b.asked_for, b.enqueued_at), b.payload,
           b.origin, b.given_back, b.retried_after, b.released,
           case when b.id = any (mailed)
                then greatest(first_slot + (array_position(mailed, b.id) - 1) * letters_apart
                              - clock_timestamp(), '0') end,
           case when b.id = any (mailed) then is_trial end,
           gate.failures > 0
      from (select) as one_row
      left join begin_attempts(taken, by_worker, by_host) b on true;
end;
$$;
