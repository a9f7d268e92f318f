-- From the last schema with PgQueuer's tables to the one of 0010_ledger.sql, without a loss. Replicas of the old version
-- may still run: what they work on they finish, and they can take nothing more, because their queue is gone.

alter table jobs
    add column attempts  integer not null default 5 check (attempts > 0),
    add column exclusive text not null default 'no' check (exclusive in ('no', 'job', 'business')),
    add column turn      bigint not null default 0;

alter table runs
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
       business = left(coalesce(r.payload ->> 'business_id', r.payload ->> 'businessId'), 64),
       concurrency_key = case when r.origin = 'schedule' then r.job end
 where r.state in ('queued', 'retrying', 'running');

alter table runs drop column timed_at;

drop index runs_unfinished, runs_held, runs_ticks_of_job;
create index runs_ready on runs (job, priority desc, turn, enqueued_at, id)
    where ready and state in ('queued', 'retrying');
create index runs_oldest on runs (job, enqueued_at) where ready and state in ('queued', 'retrying');
create index runs_timed on runs (run_at) where not ready and state in ('queued', 'retrying');
create index runs_turns on runs (job, business, turn) where business is not null and state in ('queued', 'retrying');
create unique index runs_exclusive on runs (concurrency_key) where state = 'running' and concurrency_key is not null;
create index runs_held on runs (worker, job) where state = 'running';

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
