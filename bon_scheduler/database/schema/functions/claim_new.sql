-- Asks for a run that works in the foreground of the one who asks, and takes it, in one statement, so that nobody else
-- can. Where it cannot be taken it was never asked for. `released_for`: why it may pass the brake, or null. Else as
-- `claim_one`.
create or replace function claim_new(
    job           text,
    payload       jsonb,
    fire_time     timestamptz,
    asked_by      text,
    released_for  text,
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
as $$
declare
    new_id constant uuid := enqueue_run(job, payload, fire_time => fire_time, origin => 'person', asked_by => asked_by);
    answer record;
begin
    if released_for is not null then
        update runs r set released = true where r.id = new_id;
    end if;
    select * into answer from claim_one(new_id, by_worker, by_host, mailing, letters_apart, seen);
    verdict := answer.verdict;
    wait := answer.wait;
    run := answer.run;
    slot := answer.slot;
    trial := answer.trial;
    after_failures := answer.after_failures;
    holder_host := answer.holder_host;
    holder_since := answer.holder_since;
    holder_silent := answer.holder_silent;
    if verdict <> 'claimed' then
        delete from runs r where r.id = new_id;
    elsif released_for is not null then
        insert into operator_actions (by, action, target, reason)
        values (claim_new.asked_by, 'release', new_id::text, released_for);
    end if;
end;
$$;
