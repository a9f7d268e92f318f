-- Takes one certain run for a worker, as `claim` would: for a run that works in the foreground, and those it causes.
--
-- verdict: claimed · ended (nothing to do) · held (a worker has it) · paused (its job is) · busy (another run of its key
-- runs) · waits (its instant has not come, no letter may go yet, or this is not the ledger that was `seen`: ask again
-- after `wait`). `holder_silent`: whether the one who has it looks silent by the database's clock, which proves nothing.
create or replace function claim_one(
    run_id        uuid,
    by_worker     uuid,
    by_host       text,
    mailing       boolean,
    letters_apart interval,
    seen          bigint,
    out verdict text, out wait interval, out run runs,
    out slot interval, out trial boolean, out after_failures boolean,
    out holder_host text, out holder_since timestamptz, out holder_silent boolean
)
language plpgsql
set search_path = bon_scheduler, pg_temp
set plan_cache_mode = force_generic_plan
set jit = off
set lock_timeout = '1s'
as $$
declare
    other   runs%rowtype;
    gate    mail_gate%rowtype;
    allowed record;
begin
    lock table one_claim in share row exclusive mode;
    if not is_same_ledger(seen) then
        verdict := 'waits';
        wait := '1 second';
        return;
    end if;
    perform make_ready();
    select * into run from runs r where r.id = claim_one.run_id for no key update skip locked;
    if not found then
        verdict := case when exists (select from runs r where r.id = claim_one.run_id) then 'waits' else 'ended' end;
        wait := '50 milliseconds';
        return;
    elsif run.state = 'running' then
        verdict := 'held';
        other := run;
    elsif run.state not in ('queued', 'retrying') then
        verdict := 'ended';
        return;
    elsif is_paused(run.job) then
        verdict := 'paused';
        return;
    elsif not run.ready then
        verdict := 'waits';
        wait := greatest(least(run.run_at, now() + interval '1 day') - now(), '50 milliseconds');
        return;
    elsif run.concurrency_key is not null then
        select * into other from runs r where r.concurrency_key = run.concurrency_key and r.state = 'running';
        if found then
            verdict := 'busy';
        end if;
    end if;
    if verdict is not null then
        select a.host, a.started_at,
               w.last_word is null or w.seen_at not between clock_timestamp() - w.lease and clock_timestamp()
          into holder_host, holder_since, holder_silent
          from attempts a
          left join workers w on w.id = a.worker
         where a.run_id = other.id and a.attempt = other.attempt;
        return;
    end if;
    if mailing and letters_apart is not null then
        select * into gate from mail_gate for no key update;
        select * into allowed from letters_allowed(gate, letters_apart);
        if allowed.letters = 0 then
            verdict := 'waits';
            wait := allowed.wait;
            return;
        end if;
        update mail_gate g
           set next_slot = case when allowed.trial then g.next_slot else allowed.first_slot + letters_apart end,
               trying_until = case when allowed.trial then clock_timestamp() + interval '3 minutes'
                                   else g.trying_until end;
        slot := greatest(allowed.first_slot - clock_timestamp(), '0');
        trial := allowed.trial;
        after_failures := gate.failures > 0;
    end if;
    verdict := 'claimed';
    select * into run from begin_attempts(array[claim_one.run_id], by_worker, by_host);
end;
$$;
