-- What digests need: businesses that are left alone, a gate that all replicas' mail goes through, runs asked for
-- in bulk, deliveries that a person has decided about, and runs that only pretended.

-- A paused business is skipped by every job. A handler leaves it out with
--     and not exists (select from bon_scheduler.business_pauses p where p.business_id = …)
create table business_pauses (
    business_id uuid primary key,
    since       timestamptz not null default now(),
    by          text not null,
    reason      text not null check (reason <> '')
);


-- A dry run is one row, written when it has ended, and never anybody's to run.
alter table runs add column dry_run boolean not null default false;


-- `released`: a person knew that an `unknown` letter may have arrived, and decided that it is sent once more.
alter table deliveries drop constraint deliveries_state_check;
alter table deliveries add constraint deliveries_state_check
    check (state in ('intended', 'sent', 'refused', 'unknown', 'released'));


-- The one row that the letters of all replicas pass: it spaces them, and it is closed while the mail server is away.
create table mail_gate (
    the_one      boolean primary key default true check (the_one),
    next_slot    timestamptz not null default '-infinity',   -- when the next letter may go
    failures     integer not null default 0,                 -- in a row, of the server and not of a recipient
    closed_until timestamptz not null default '-infinity',   -- then one letter tries
    trying_until timestamptz not null default '-infinity',   -- it has so long, then another does
    closed_since timestamptz,                                -- null while it is open
    trouble      text                                        -- what the server, or the network, said
);
insert into mail_gate default values;

-- Asks to pass. verdict: open (go after `wait`; the slot is yours) · trial (the server was away: you alone try
-- it, at once) · closed (nobody goes for at least `wait`). `failures`: whether a success is worth reporting.
-- No wait is believed that only a clock which was set back explains.
create function pass_mail_gate(
    apart interval, trial interval,
    out verdict text, out wait interval, out failures integer, out trouble text
)
language plpgsql
set search_path = bon_scheduler, pg_temp
as $$
declare
    gate  mail_gate%rowtype;
    here  timestamptz;
    limits constant interval := '15 minutes';
    soon   constant interval := '5 seconds';
begin
    select * into gate from mail_gate for update;
    here := clock_timestamp();      -- AFTER the lock, which may have taken a while
    failures := gate.failures;
    trouble := gate.trouble;
    if gate.closed_since is null then
        verdict := 'open';
        if gate.next_slot between here and here + limits then
            wait := gate.next_slot - here;
        else
            wait := '0';
        end if;
        update mail_gate set next_slot = here + wait + apart;
    elsif gate.closed_until between here and here + limits then
        verdict := 'closed';
        wait := gate.closed_until - here;
    elsif gate.trying_until between here and here + limits then
        verdict := 'closed';    -- but soon known
        wait := least(gate.trying_until - here, soon);
    else
        verdict := 'trial';
        wait := '0';
        update mail_gate set trying_until = here + trial;
    end if;
end;
$$;

-- Reports that the server was away for a letter. The gate closes at the `tolerated`-th time in a row, for `first`,
-- doubled with each trial that fails up to `longest`. What failed beside a closed gate says nothing new.
-- Returns whether this closed it.
create function close_mail_gate(
    what text, was_trial boolean, tolerated integer, first interval, longest interval
) returns boolean
language plpgsql
set search_path = bon_scheduler, pg_temp
as $$
declare
    gate mail_gate%rowtype;
begin
    select * into gate from mail_gate for update;
    if gate.closed_since is not null and not was_trial then
        return false;
    end if;
    update mail_gate
       set failures = gate.failures + 1,
           trouble = what,
           trying_until = '-infinity',
           closed_since = case when gate.failures + 1 >= tolerated
                               then coalesce(gate.closed_since, clock_timestamp()) end,
           closed_until = clock_timestamp()
                        + least(longest, first * power(2, least(greatest(gate.failures + 1 - tolerated, 0), 20)));
    return gate.closed_since is null and gate.failures + 1 >= tolerated;
end;
$$;

-- Reports that the server took part in a conversation again. Returns since when the gate was closed, null if it was not.
create function open_mail_gate() returns timestamptz
language plpgsql
set search_path = bon_scheduler, pg_temp
as $$
declare
    since timestamptz;
begin
    select g.closed_since into since from mail_gate g for update;
    update mail_gate
       set failures = 0, trouble = null, closed_since = null, closed_until = '-infinity',
           trying_until = '-infinity'
     where mail_gate.failures > 0;
    return since;
end;
$$;


-- `enqueue` for many runs of one job at once: two inserts, however many there are. Returns how many keys were new.
create function enqueue_many(
    job         text,
    payloads    jsonb[],
    dedupe_keys text[],
    priority    integer,
    origin      text,
    asked_by    text,
    caused_by   uuid
) returns bigint
language sql
set search_path = bon_scheduler, pg_temp
as $$
    with wished as (
        insert into runs (job, payload, dedupe_key, priority, origin, asked_by, caused_by)
        select enqueue_many.job, w.payload, w.key, enqueue_many.priority, enqueue_many.origin,
               enqueue_many.asked_by, enqueue_many.caused_by
          from unnest(payloads, dedupe_keys) as w (payload, key)
        on conflict do nothing
        returning id, run_at, attempt
    ), queued as (
        insert into pgqueuer (priority, entrypoint, payload, execute_after, dedupe_key, status)
        select enqueue_many.priority, enqueue_many.job, convert_to(w.id::text, 'UTF8'), w.run_at,
               w.id || '/' || w.attempt, 'queued'
          from wished w
    )
    select count(*) from wished;
$$;
