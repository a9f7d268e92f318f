-- From the last schema with PgQueuer's tables to the one of 0010_ledger.sql, without a loss. Replicas of the old version
-- may still run: what they work on they finish, and they can take nothing more, because their queue is gone.

create table one_claim ();

alter table jobs
    add column attempts  integer not null default 5 check (attempts > 0),
    add column exclusive text not null default 'no' check (exclusive in ('no', 'job', 'business')),
    add column turn      bigint not null default 0;

alter table runs
    add column asked_for       timestamptz,
    add column released        boolean not null default false,
    add column ready           boolean not null default true,
    add column turn            bigint not null default 1,
    add column business        text,
    add column concurrency_key text,
    alter column run_at drop not null,
    alter column run_at drop default,
    alter column enqueued_at set default clock_timestamp();

-- What waits is due at once, unless it was put off to an instant that has not come.
update runs r
   set ready = r.run_at <= now() or r.run_at <= r.timed_at or (r.attempt > 0 and r.timed_at > now() + interval '1 minute'),
       run_at = case when r.run_at <= r.timed_at then null else r.run_at end,
       asked_for = case when r.run_at > r.enqueued_at and r.attempt = 0 then r.run_at end,
       business = left(coalesce(r.payload ->> 'business_id', r.payload ->> 'businessId'), 64),
       concurrency_key = case when r.origin = 'schedule' then r.job end
 where r.state in ('queued', 'retrying', 'running');

alter table runs drop column timed_at;
alter table runs alter column caused_by set (n_distinct = -0.01);

alter table workers add column settings jsonb not null default '{}';
comment on column workers.settings is 'By name, as text, what anybody may read: no secret, user, address or path.';
alter table workers add column jobs text[];
comment on column workers.jobs is 'Those it takes runs of; null: its version does not say.';

alter table pauses add column until timestamptz;
comment on table pauses is
    'Jobs of which nothing runs: ticks are recorded as paused, runs that were asked for wait. What runs already goes on.';
comment on column pauses.until is 'It is over from then on; null: it lasts until somebody ends it.';

alter table attempts
    drop constraint attempts_outcome_check,
    add constraint attempts_outcome_check check (outcome in
        ('succeeded', 'partial', 'failed', 'timed_out', 'lost', 'given_back', 'dead', 'held', 'cancelled'));

create table changed_rows (
    run_id      uuid not null references runs (id) on delete cascade,
    number      integer generated always as identity,
    change      text not null check (change in ('deleted', 'marked', 'cleared')),
    ids         uuid[] not null,
    businesses  uuid[] not null,
    items       integer[],
    updated     timestamptz[],
    recorded_at timestamptz not null default now(),
    primary key (run_id, number)
);
-- Ids are random: to compress them costs time and saves nothing.
alter table changed_rows alter ids set storage external, alter businesses set storage external;
create index changed_rows_businesses on changed_rows using gin (businesses);

create table rehearsals (
    run_id        uuid not null references runs (id) on delete cascade,
    job           text not null references jobs (name),
    fire_time     timestamptz not null,
    candidates    bigint not null,
    of_all        bigint not null,
    usual         bigint,
    would_hold    text,
    rehearsed_at  timestamptz not null default clock_timestamp(),
    compared_with uuid,
    found         bigint,
    primary key (run_id, job)
);
comment on table rehearsals is 'What a rehearsal says of a job''s next run, and what there was to do then.';
comment on column rehearsals.run_id is 'Of the rehearsal.';
comment on column rehearsals.fire_time is 'The instant that was rehearsed.';
comment on column rehearsals.usual is 'The median of the last runs; null without any.';
comment on column rehearsals.would_hold is 'Why the brake would trip; null: it would not.';
comment on column rehearsals.compared_with is 'The first run after that fire time; null: none has come.';
comment on column rehearsals.found is 'The candidates of that run.';
create index rehearsals_newest on rehearsals (job, rehearsed_at desc);

drop index runs_unfinished, runs_held, runs_ticks_of_job, runs_by_job, runs_caused_by, runs_for_a_person, runs_by_end,
    deliveries_uncertain, deliveries_settled;
create index runs_by_job on runs (job, state, enqueued_at desc, id);
create index runs_caused_by on runs (caused_by, state) where caused_by is not null;
create index runs_by_end on runs (finished_at)
    where state in ('succeeded', 'partial', 'cancelled', 'missed', 'paused') or state = 'dead' and dry_run;
create index deliveries_uncertain on deliveries (state, intended_at) where state in ('intended', 'unknown');
create index deliveries_settled on deliveries (intended_at) where state in ('sent', 'refused', 'released');
create index operator_actions_by_age on operator_actions (at);
comment on table operator_actions is 'What a person did, to what and why. Kept for seven years.';
create index runs_ready on runs (job, priority desc, turn, enqueued_at, id)
    where ready and state in ('queued', 'retrying');
create index runs_oldest on runs (job, enqueued_at) where ready and state in ('queued', 'retrying');
create index runs_timed on runs (run_at) where not ready and state in ('queued', 'retrying');
create index runs_turns on runs (job, business, turn) where business is not null and state in ('queued', 'retrying');
create unique index runs_exclusive on runs (concurrency_key) where state = 'running' and concurrency_key is not null;
create index runs_held on runs (worker, job) where state = 'running';

create table place (
    only_one   boolean primary key default true check (only_one),
    id         uuid not null default gen_random_uuid(),
    deployment text,
    addresses  text[] not null,
    server     text,
    version    integer not null,
    database   oid not null,
    ledger     oid not null,
    started    timestamptz not null,
    mark       bigint not null,
    behind     bigint,
    since      timestamptz not null default now()
);

create table mail_key (
    the_one boolean primary key default true check (the_one),
    key     bytea not null check (length(key) = 64)
);
-- gen_random_uuid is PostgreSQL's strong randomness: 488 bits of it.
insert into mail_key (key)
select sha512(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())
              || uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()));

-- Recipients are named by HMAC-SHA-256 (RFC 2104) of the names they had; the key is one block long. A replica of the old
-- version that has begun a letter settles it by its id. It begins no other: the constraint refuses the names it gives,
-- its run fails, and a replica of this version tries it again and finds what was sent.
with pads as (
        select string_agg(set_byte('\x00', 0, get_byte(key, i) # 54), ''::bytea order by i) as inner_pad,
               string_agg(set_byte('\x00', 0, get_byte(key, i) # 92), ''::bytea order by i) as outer_pad
          from mail_key cross join generate_series(0, 63) as i
     )
update deliveries
   set recipient_hash = 'hmac:' || encode(
           sha256(outer_pad || sha256(inner_pad || convert_to(recipient_hash, 'UTF8'))), 'hex')
  from pads;
alter table deliveries add check (recipient_hash !~ '^[0-9a-f]{64}$');

drop table pgqueuer, pgqueuer_log, pgqueuer_schedules, pgqueuer_statistics;
drop type if exists pgqueuer_status, pgqueuer_statistics_status;

create table shaam_tokens (
    fingerprint bytea primary key,
    business_id uuid,
    sealed      bytea,
    known_since timestamptz not null default now(),
    seen_at     timestamptz not null default now()
);
comment on table shaam_tokens is
    'One row a refresh token: whose it is. It was first seen in that business''s row, or given for one of its tokens.';
comment on column shaam_tokens.fingerprint is 'A keyed SHA-256 of the token.';
comment on column shaam_tokens.business_id is 'Null: several rows held it when it was first seen, so it is nobody''s.';
comment on column shaam_tokens.sealed is 'The SHA-256 of the stored text it was last seen as; null: not seen since an upgrade.';
comment on column shaam_tokens.seen_at is
    'When it was registered, or last found in another row. It is forgotten some days later, unless its business has it still.';
create index shaam_tokens_sealed on shaam_tokens (sealed);
create index shaam_tokens_by_age on shaam_tokens (seen_at);

create table consent_brake (
    only_one       boolean primary key default true check (only_one),
    run            uuid,
    since          timestamptz not null default clock_timestamp(),
    due            integer not null default 0,
    flagged        integer not null default 0,
    spent          integer not null default 0,
    unlimited      boolean not null default false,
    braked_at      timestamptz,
    reason         text,
    held           uuid,
    allowed        boolean not null default false,
    released_at    timestamptz,
    released_by    text,
    release_reason text
);
comment on table consent_brake is
    'One row: how many grants the authority calls spent in a run of all replicas, and whether owners are asked at all. '
    'Lock it BEFORE BON''s credentials.';
comment on column consent_brake.run is 'The scheduled run whose answers are counted; null: only what was asked on demand.';
comment on column consent_brake.since is 'When counting began.';
comment on column consent_brake.due is 'How many businesses that run had to refresh.';
comment on column consent_brake.flagged is 'Of those that are spent.';
comment on column consent_brake.unlimited is 'A person released the brake for this run.';
comment on column consent_brake.braked_at is 'Null while owners are asked.';
comment on column consent_brake.held is 'The run that is, or was last, held for it.';
comment on column consent_brake.allowed is 'A person released the brake for the run that comes next.';
insert into consent_brake default values;
-- What was sent last by several businesses is nobody's.
insert into shaam_tokens (fingerprint, business_id)
select token_fingerprint, case when count(*) = 1 then (array_agg(business_id))[1] end
  from shaam_refreshes
 where token_fingerprint is not null
 group by token_fingerprint;

alter table shaam_refreshes
    drop constraint shaam_refreshes_state_check,
    add constraint shaam_refreshes_state_check
        check (state in ('sending', 'refreshed', 'spent', 'needs_reauth', 'deferred', 'failed'));
