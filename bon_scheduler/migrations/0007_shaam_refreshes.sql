-- Refreshing SHAAM tokens: who is at it, what was sent without an answer, and when to try again.
--
-- Order of locks, as everywhere: BON's row of credentials, then ours.

create table shaam_refreshes (
    business_id        uuid primary key,   -- no foreign key: BON deletes businesses without asking us
    state              text not null check (state in ('sending', 'refreshed', 'needs_reauth', 'deferred', 'failed')),
    holder             uuid,               -- the exchange under way; null: nobody is at it
    lease_until        timestamptz,        -- when its holder is taken for dead
    token_fingerprint  bytea,              -- of the token that was sent last: a keyed SHA-256
    unanswered         integer not null default 0,   -- how often it was sent without an answer that tells its fate
    spool              uuid,               -- where the holder keeps an answer that no database takes
    failures           integer not null default 0,   -- in a row
    next_attempt_at    timestamptz,        -- not tried by schedule before
    silent_until       timestamptz,        -- not tried at all before: the authority asked for it (Retry-After)
    refresh_expires_at timestamptz,
    error              text,
    changed_at         timestamptz not null default clock_timestamp()
);
create index shaam_refreshes_spool on shaam_refreshes (spool) where spool is not null;

comment on table shaam_refreshes is 'One row a business: how its last exchange of a refresh token stands or ended.';


-- A run that names what it is for (`{"business_id": …}`) stands beside the runs that the schedule asks for, which
-- have no arguments, and beside the others. So `exclusive` now says: no two runs of this job WITHOUT ARGUMENTS are
-- ever claimed at once. And whoever takes a run over ends the connections of the worker that had it. Else as before.
create or replace function claim(
    run_id    uuid,
    by_worker uuid,
    by_host   text,
    lease     interval,
    allowed   integer,
    exclusive boolean,
    out verdict text, out attempt integer, out holder_host text, out holder_since timestamptz
)
language plpgsql
set search_path = bon_scheduler, pg_temp
as $$
declare
    run   runs%rowtype;
    other runs%rowtype;
begin
    exclusive := exclusive and (select jsonb_strip_nulls(r.payload) = '{}' from runs r where r.id = run_id);
    if exclusive then
        -- BEFORE the run's own row, otherwise two claims of one job could both see nobody running.
        perform from jobs j where j.name = (select r.job from runs r where r.id = run_id) for no key update;
    end if;
    select * into run from runs r where r.id = run_id for update;
    if not found or run.state not in ('queued', 'retrying', 'running') then
        verdict := 'ended';
        return;
    end if;
    if run.state = 'running' then
        if is_alive(run.worker, lease) then
            verdict := 'held';
            select a.host, a.started_at into holder_host, holder_since
              from attempts a where a.run_id = run.id and a.attempt = run.attempt;
            return;
        end if;
        perform cut_off(run.worker);
        update attempts a
           set ended_at = clock_timestamp(), outcome = 'lost', error = 'its worker stopped without a word'
         where a.run_id = run.id and a.attempt = run.attempt and a.ended_at is null;
        if run.attempt - run.given_back >= allowed then
            update runs r
               set state = 'dead', finished_at = clock_timestamp(),
                   error = format('its worker stopped without a word in each of %s attempts, the last on %s',
                                  allowed, (select a.host from attempts a
                                             where a.run_id = run.id and a.attempt = run.attempt))
             where r.id = run.id;
            verdict := 'exhausted';
            return;
        end if;
    end if;
    if exclusive then
        select * into other from runs r
         where r.job = run.job and r.state = 'running' and r.id <> run.id and is_alive(r.worker, lease)
           and jsonb_strip_nulls(r.payload) = '{}'
         limit 1;
        if found then
            verdict := 'busy';
            select a.host, a.started_at into holder_host, holder_since
              from attempts a where a.run_id = other.id and a.attempt = other.attempt;
            return;
        end if;
    end if;
    attempt := run.attempt + 1;
    update runs r
       set state = 'running', attempt = claim.attempt, worker = by_worker,
           started_at = coalesce(r.started_at, clock_timestamp())
     where r.id = run.id;
    insert into attempts (run_id, attempt, worker, host, started_at)
    values (run.id, claim.attempt, by_worker, by_host, clock_timestamp());
    verdict := 'claimed';
end;
$$;
