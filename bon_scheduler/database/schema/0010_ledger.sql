-- Everything of ours in a database: the ledger, the letters, the tokens. Functions are in files of their own, under
-- their own names, beside this one; `migrate` replaces those whose text has changed.
--
-- Order of locks, everywhere: jobs, runs (by id), attempts. A handler locks BON's rows first and its run last. Claims
-- exclude each other by a lock on `one_claim`, and wait for no row.

create table jobs (
    name           text primary key check (name ~ '^[a-z][a-z0-9]*(-[a-z0-9]+)*$'),
    payload_schema jsonb,
    last_tick      timestamptz,
    registered_at  timestamptz not null default now(),
    attempts       integer not null default 5 check (attempts > 0),
    exclusive      text not null default 'no' check (exclusive in ('no', 'job', 'business')),
    turn           bigint not null default 0
);
comment on table jobs is 'Names that may be asked for. Never deleted by a version that does not know them.';
comment on column jobs.payload_schema is 'JSON Schema; null until a version with a handler has registered.';
comment on column jobs.last_tick is 'The last fire time that is accounted for; only ever moves forwards.';
comment on column jobs.attempts is 'How many attempts a run has; the last worker that dies with it ends it.';
comment on column jobs.exclusive is 'What must not run together: nothing, runs of the job, runs of the job for one business.';
comment on column jobs.turn is 'The turn that claims have reached; see runs.turn.';

-- Asked for by BON; their handlers come with other work. A request waits, visible, and is never dropped.
insert into jobs (name) values ('shaam-allocation-request'), ('send-invoice-email'), ('generate-pdf');

create table workers (
    id         uuid primary key,
    host       text not null,
    pid        integer not null,
    version    text not null,
    started_at timestamptz not null default now(),
    seen_at    timestamptz not null default now(),
    serves     boolean not null default false,
    last_word  uuid default gen_random_uuid(),
    lease      interval not null default '15 seconds',
    settings   jsonb not null default '{}',
    jobs       text[]
);
comment on table workers is 'Processes that work on runs. One that leaves takes its row away.';
comment on column workers.last_word is 'Another with each beat; null while the worker is taken for dead.';
comment on column workers.lease is 'How long it may be silent; whoever watches with a longer lease waits for that.';
comment on column workers.settings is 'By name, as text, what anybody may read: no secret, user, address or path.';
comment on column workers.jobs is 'Those it takes runs of; null: its version does not say.';
comment on column workers.seen_at is 'For people. Nothing is judged by it: the clock may have been set since.';

create table one_claim ();
comment on table one_claim is
    'Empty. A claim locks it, so that claims exclude each other; an advisory lock could be held by anybody who may connect.';

create type run_state as enum (
    'queued', 'running', 'retrying', 'succeeded', 'partial', 'dead', 'held', 'cancelled', 'missed', 'paused'
);

create table runs (
    id              uuid primary key default gen_random_uuid(),
    job             text not null references jobs (name),
    fire_time       timestamptz,
    dedupe_key      text,
    payload         jsonb not null default '{}' check (jsonb_typeof(payload) = 'object'),
    priority        integer not null default 0,
    run_at          timestamptz,
    asked_for       timestamptz,
    origin          text not null check (origin in ('schedule', 'person', 'program', 'run')),
    asked_by        text,
    reason          text,
    state           run_state not null default 'queued',
    attempt         integer not null default 0,
    given_back      integer not null default 0,
    worker          uuid,
    enqueued_at     timestamptz not null default clock_timestamp(),
    started_at      timestamptz,
    finished_at     timestamptz,
    counts          json not null default '{}',
    error           text,
    caused_by       uuid references runs (id),
    retried_after   integer not null default 0,
    dry_run         boolean not null default false,
    released        boolean not null default false,
    ready           boolean not null default true,
    turn            bigint not null default 1,
    business        text,
    concurrency_key text
) with (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 5000);
-- Most of what has a cause has one of a few: a sample finds one value, and whoever looks for another cause reads the table.
alter table runs alter column caused_by set (n_distinct = -0.01);
comment on table runs is 'The ledger and the queue: one row a run, from the moment it is asked for until it is pruned.';
comment on column runs.fire_time is 'The instant a schedule or a person named; null for other requests.';
comment on column runs.run_at is 'Not before this instant; null: at once.';
comment on column runs.asked_for is
    'The instant it was put off to when it was asked for. It is judged by its day; a retry moves run_at, not this.';
comment on column runs.ready is 'Whether run_at has come, once and for all: a clock that is set back delays nothing.';
comment on column runs.reason is 'Why it was missed, cancelled, held or paused.';
comment on column runs.attempt is 'Counted when a worker takes it; also the fence. Only ever grows.';
comment on column runs.given_back is
    'Attempts that do not count: given back by a stopping worker, or made before a person''s retry.';
comment on column runs.retried_after is
    'The attempt after which a person last retried it. What failed for a business until then decides nothing.';
comment on column runs.started_at is 'Of the first attempt.';
comment on column runs.counts is 'In the order the handler gave them.';
comment on column runs.released is 'Whether a person has let it pass the brake, once and for this run alone.';
comment on column runs.dry_run is 'One row, written when it has ended, and never anybody''s to run.';
comment on column runs.turn is
    'Among runs of one job and priority, lower turns go first. Each waiting run of a business stands a turn behind the '
    'one before it, so that turns go round by business.';
comment on column runs.business is 'The business that the payload names, as text; null: none.';
comment on column runs.concurrency_key is 'No two runs with the same key run at once; null: free.';

-- What a claim reads: runs that may be taken now, in their order; the oldest; and those whose instant is to come.
create index runs_ready on runs (job, priority desc, turn, enqueued_at, id)
    where ready and state in ('queued', 'retrying');
create index runs_oldest on runs (job, enqueued_at) where ready and state in ('queued', 'retrying');
create index runs_timed on runs (run_at) where not ready and state in ('queued', 'retrying');
create index runs_turns on runs (job, business, turn) where business is not null and state in ('queued', 'retrying');
-- No two runs of one key, whatever a claim overlooked.
create unique index runs_exclusive on runs (concurrency_key) where state = 'running' and concurrency_key is not null;
create index runs_held on runs (worker, job) where state = 'running';
-- A tick is recorded once, however many replicas notice it.
create unique index runs_tick on runs (job, fire_time) where origin = 'schedule';
create index runs_active_ticks on runs (job) where origin = 'schedule' and state in ('queued', 'running', 'retrying');
create unique index runs_dedupe_key on runs (job, dedupe_key) where dedupe_key is not null;
-- What people and the audit read.
create index runs_newest on runs (enqueued_at desc, id);
create index runs_by_job on runs (job, state, enqueued_at desc, id);
create index runs_caused_by on runs (caused_by, state) where caused_by is not null;
-- What pruning reads. Dead and held runs are for a person, and stay until one has decided.
create index runs_by_end on runs (finished_at)
    where state in ('succeeded', 'partial', 'cancelled', 'missed', 'paused') or state = 'dead' and dry_run;

create table attempts (
    run_id     uuid not null references runs (id) on delete cascade,
    attempt    integer not null,
    worker     uuid not null,
    host       text not null,
    started_at timestamptz not null,
    ended_at   timestamptz,
    outcome    text check (outcome in
                 ('succeeded', 'partial', 'failed', 'timed_out', 'lost', 'given_back', 'dead', 'held', 'cancelled')),
    error      text,
    primary key (run_id, attempt)
) with (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 5000);
comment on table attempts is 'Each execution of a run, from 1: who, when, and how it ended.';

create table business_outcomes (
    run_id      uuid not null references runs (id) on delete cascade,
    business_id uuid not null,
    outcome     text not null check (outcome in ('done', 'kept', 'failed')),
    counts      jsonb not null default '{}',
    error       text,
    attempt     integer not null default 1,
    recorded_at timestamptz not null default now(),
    primary key (run_id, business_id)
);
comment on table business_outcomes is 'What a run changed, or failed to do, for a business; nothing of "nothing to do".';
comment on column business_outcomes.attempt is 'The last attempt that said something of the business.';
create index business_outcomes_by_age on business_outcomes (recorded_at);

create table schedules (
    job            text not null references jobs (name),
    effective_from timestamptz not null,
    expression     text,
    timezone       text not null,
    catch_up       text not null check (catch_up in ('skip', 'latest', 'all')),
    grace          interval not null,
    declared_by    text not null,
    primary key (job, effective_from)
);
comment on table schedules is
    'What was in force when, for fire times later than effective_from. Only `serve` writes it, and of several replicas '
    'only the newest.';
comment on column schedules.expression is 'Null: no schedule.';
comment on column schedules.declared_by is 'The version.';

create table pauses (
    job    text primary key references jobs (name),
    since  timestamptz not null default now(),
    by     text not null,
    reason text not null check (reason <> ''),
    until  timestamptz
);
comment on table pauses is
    'Jobs of which nothing runs: ticks are recorded as paused, runs that were asked for wait. What runs already goes on.';
comment on column pauses.until is 'It is over from then on; null: it lasts until somebody ends it.';

create table business_pauses (
    business_id uuid primary key,
    since       timestamptz not null default now(),
    by          text not null,
    reason      text not null check (reason <> '')
);
comment on table business_pauses is
    'Businesses that every job skips. A handler leaves one out with: and not exists (select from '
    'bon_scheduler.business_pauses p where p.business_id = …)';

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
comment on table changed_rows is
    'Which of BON''s invoices a run has deleted, marked or cleared, a row for each batch. Kept as long as the run.';
comment on column changed_rows.businesses is 'Whose each was, in the order of ids; so are the next two.';
comment on column changed_rows.items is 'How many items went with each deleted draft.';
comment on column changed_rows.updated is 'When each deleted draft was last touched.';
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

create table operator_actions (
    id     bigint generated always as identity primary key,
    at     timestamptz not null default now(),
    by     text not null,
    action text not null,
    target text not null,
    reason text not null check (reason <> '')
);
comment on table operator_actions is 'What a person did, to what and why. Kept for seven years.';
create index operator_actions_target on operator_actions (target);
create index operator_actions_by_age on operator_actions (at);

create table pruning (
    only_row    boolean primary key default true check (only_row),
    ticks_until timestamptz not null
);
comment on table pruning is
    'One row: ticks until then may have been pruned, so an audit begins after it. Only ever moves forwards.';
insert into pruning (ticks_until) values ('-infinity');

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
comment on table place is
    'One row, from the first `serve` on: where this ledger lives. Elsewhere nothing is done until a person says `adopt`. '
    'A table that replaces this one must carry its new object identifier over into `ledger`.';
comment on column place.id is 'Of the ledger and of all its copies.';
comment on column place.deployment is 'DEPLOYMENT of those who work on it; null: they have none, and addresses count.';
comment on column place.addresses is 'Host and port by which it was reached, as configured.';
comment on column place.server is 'See function whereabouts, also of the next four; null: the server does not tell.';
comment on column place.started is 'When the server began to run, as it was last seen: whoever meets it knows that it is the same.';
comment on column place.mark is 'Grows while anybody serves. Whoever has seen a higher one knows that this ledger went back in time.';
comment on column place.behind is 'The highest mark that somebody had seen when this ledger was found to have gone back; null: it has not.';
comment on column place.since is 'When it was remembered or adopted.';

create table mail_key (
    the_one boolean primary key default true check (the_one),
    key     bytea not null check (length(key) = 64)
);
comment on table mail_key is 'One row that never changes: another key, and letters that were sent look as if they were not.';
comment on column mail_key.key is 'Of HMAC-SHA-256: names recipients in deliveries, and Message-IDs.';
-- gen_random_uuid is PostgreSQL's strong randomness: 488 bits of it.
insert into mail_key (key)
select sha512(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())
              || uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid()));

create table deliveries (
    id             uuid primary key default gen_random_uuid(),
    kind           text not null,
    business_id    uuid not null,
    as_of          date not null,
    recipient_hash text not null check (recipient_hash !~ '^[0-9a-f]{64}$'),
    state          text not null check (state in ('intended', 'sent', 'refused', 'unknown', 'released')),
    message_id     text not null,
    run_id         uuid not null references runs (id),
    attempt        integer not null,
    reply          text,
    intended_at    timestamptz not null default now(),
    settled_at     timestamptz,
    unique (kind, business_id, as_of, recipient_hash)
);
comment on table deliveries is 'One e-mail to one recipient for one business and day. Addresses are stored hashed.';
comment on column deliveries.state is
    'released: a person knew that an unknown letter may have arrived, and decided that it is sent once more.';
comment on column deliveries.recipient_hash is
    'HMAC of the SHA-256 of business and address. Without its prefix, as version 9 wrote it, it is refused.';
comment on column deliveries.reply is 'The server''s, without anything that it may quote.';
create index deliveries_uncertain on deliveries (state, intended_at) where state in ('intended', 'unknown');
create index deliveries_run on deliveries (run_id);
create index deliveries_settled on deliveries (intended_at) where state in ('sent', 'refused', 'released');

create table mail_gate (
    the_one      boolean primary key default true check (the_one),
    next_slot    timestamptz not null default '-infinity',
    failures     integer not null default 0,
    closed_until timestamptz not null default '-infinity',
    trying_until timestamptz not null default '-infinity',
    closed_since timestamptz,
    trouble      text
);
comment on table mail_gate is
    'One row that the letters of all replicas pass: it spaces them, and it is closed while the mail server is away. '
    'Claims read it too: a run that would send a letter is not taken before one may go.';
comment on column mail_gate.next_slot is 'When the next letter may go.';
comment on column mail_gate.failures is 'In a row, of the server and not of a recipient.';
comment on column mail_gate.closed_until is 'Then one letter tries.';
comment on column mail_gate.trying_until is 'It has so long, then another does.';
comment on column mail_gate.closed_since is 'Null while it is open.';
comment on column mail_gate.trouble is 'What the server, or the network, said.';
insert into mail_gate default values;

create table shaam_refreshes (
    business_id        uuid primary key,
    state              text not null check (state in ('sending', 'refreshed', 'spent', 'needs_reauth', 'deferred',
                                                      'failed')),
    holder             uuid,
    lease_until        timestamptz,
    token_fingerprint  bytea,
    unanswered         integer not null default 0,
    spool              uuid,
    failures           integer not null default 0,
    next_attempt_at    timestamptz,
    silent_until       timestamptz,
    refresh_expires_at timestamptz,
    error              text,
    changed_at         timestamptz not null default clock_timestamp()
);
comment on table shaam_refreshes is
    'One row a business: how its last exchange of a refresh token stands or ended. Lock BON''s row of credentials first. '
    'No foreign key: BON deletes businesses without asking us.';
comment on column shaam_refreshes.holder is 'The exchange under way; null: nobody is at it.';
comment on column shaam_refreshes.lease_until is 'When its holder is taken for dead.';
comment on column shaam_refreshes.token_fingerprint is 'Of the token that was sent last: a keyed SHA-256.';
comment on column shaam_refreshes.unanswered is 'How often it was sent without an answer that tells its fate.';
comment on column shaam_refreshes.spool is 'Where the holder keeps an answer that no database takes.';
comment on column shaam_refreshes.failures is 'In a row.';
comment on column shaam_refreshes.next_attempt_at is 'Not tried by schedule before.';
comment on column shaam_refreshes.silent_until is 'Not tried at all before: the authority asked for it (Retry-After).';
create index shaam_refreshes_spool on shaam_refreshes (spool) where spool is not null;

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
