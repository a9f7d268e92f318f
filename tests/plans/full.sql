-- A ledger as after a year, and a BON of some size, on an empty database with our schema and BON's.
-- Skewed: nearly all has ended; a few thousand runs wait, some are dead or held, one run has caused 100,000.
set session_replication_role = replica;  -- no trigger of a foreign key: what is written here agrees with itself
set synchronous_commit = off;

create function pg_temp.id(kind text, number bigint) returns uuid language sql immutable
as $$ select md5(kind || number)::uuid $$;

-- BON: 4,000 businesses, 200,000 invoices of a year.
insert into public.users (id, email, name)
select pg_temp.id('user', n), 'owner' || n || '@example.org', 'n' from generate_series(1, 4000) n;
insert into public.sessions (id, user_id, last_accessed_at, expires_at)
select pg_temp.id('session', n), pg_temp.id('user', 1 + n % 4000), now(), now() + (n - 500) * interval '1 minute'
  from generate_series(1, 40000) n;
insert into public.businesses (id, name, business_type, registration_number, email, created_by_user_id)
select pg_temp.id('business', n), 'n', 'licensed_dealer', n::text, 'b' || n || '@example.org', pg_temp.id('user', n)
  from generate_series(1, 4000) n;
insert into public.user_businesses (user_id, business_id, role)
select pg_temp.id('user', n), pg_temp.id('business', n), 'owner' from generate_series(1, 4000) n;
insert into public.invoices (id, business_id, document_type, status, is_overdue, invoice_date, due_date,
                             total_incl_vat_minor_units, updated_at, credited_invoice_id)
select pg_temp.id('invoice', n), pg_temp.id('business', 1 + n % 4000),
       case when n % 50 = 7 then 'credit_note' else 'tax_invoice' end::public.document_type,
       case when n % 100 = 1 then 'draft' when n % 40 = 2 then 'sent' when n % 500 = 3 then 'cancelled'
            else 'paid' end::public.invoice_status,
       n % 80 = 2 or n % 10000 = 5, day, case when n % 50 <> 7 then day + 30 end, 11700,
       day + interval '1 hour', case when n % 50 = 7 then pg_temp.id('invoice', n - 5) end
  from (select n, current_date - 365 + (n * 365 / 200000)::int as day from generate_series(1, 200000) n) as i;
insert into public.invoice_items (invoice_id, position, description, quantity, unit_price_minor_units, vat_rate_basis_points)
select pg_temp.id('invoice', n), 1, 'i', 1, 10000, 1700 from generate_series(1, 200000) n;
insert into public.invoice_payments (invoice_id, amount_minor_units, paid_at, method)
select pg_temp.id('invoice', n), 11700, current_date, 'transfer' from generate_series(1, 200000) n where n % 40 <> 2;
insert into public.shaam_audit_log (business_id, invoice_id, result)
select pg_temp.id('business', 1 + n % 4000), pg_temp.id('invoice', n), 'approved' from generate_series(1, 200000, 10) n;
insert into public.business_shaam_credentials
       (business_id, encrypted_access_token, encrypted_refresh_token, token_expires_at, needs_reauth, updated_at)
select pg_temp.id('business', n), 'access ' || n, 'refresh ' || n, now() + n * interval '1 minute', n % 100 = 0, now()
  from generate_series(1, 4000) n;

-- Workers and jobs.
set search_path = bon_scheduler;
insert into workers (id, host, pid, version, serves) values (pg_temp.id('worker', 1), 'h', 1, '1.0', true);
insert into jobs (name, last_tick)
select name, now() from unnest(array['overdue-detection', 'overdue-digest', 'send-overdue-digest', 'draft-cleanup',
       'session-cleanup', 'shaam-refresh-batch', 'shaam-token-refresh', 'ledger-pruning', 'notify-reauth']) name
    on conflict do nothing;

update jobs set last_tick = '2020-01-01' where name = 'ledger-pruning';

-- 36,000 ticks of a year, 96 a day of one job and one a day of four.
insert into runs (id, job, fire_time, origin, asked_by, state, attempt, worker, enqueued_at, started_at, finished_at, counts)
select pg_temp.id(t.job, n), t.job, at, 'schedule', 'schedule',
       case when n % 1000 = 5 then 'dead' when n % 300 = 7 then 'missed' when n % 97 = 1 then 'partial'
            else 'succeeded' end::run_state, 1, pg_temp.id('worker', 1), at, at, at + interval '3 s', '{"marked": 3}'
  from (values ('shaam-refresh-batch', interval '15 min'), ('overdue-detection', '1 day'), ('draft-cleanup', '1 day'),
               ('session-cleanup', '1 day'), ('ledger-pruning', '1 day')) as t (job, every)
 cross join lateral (select at, row_number() over () as n
                       from generate_series(now() - interval '365 days', now() - interval '1 hour', t.every) at) as i;
-- 100,000 letters of one digest, and 120,000 runs for businesses over the year.
insert into runs (id, job, origin, asked_by, state, attempt, enqueued_at, started_at, finished_at)
values (pg_temp.id('digest', 1), 'overdue-digest', 'schedule', 'schedule', 'succeeded', 1, now() - interval '1 day',
        now() - interval '1 day', now() - interval '23 hours');
insert into runs (id, job, origin, caused_by, dedupe_key, payload, business, state, attempt, worker, enqueued_at, started_at,
                  finished_at, run_at, ready)
select pg_temp.id('letter', n), 'send-overdue-digest', 'run', pg_temp.id('digest', 1), 'digest ' || n,
       jsonb_build_object('business_id', pg_temp.id('business', 1 + n % 4000)), pg_temp.id('business', 1 + n % 4000)::text,
       case when n <= 40 then 'retrying' when n % 1000 = 50 then 'dead' else 'succeeded' end::run_state, 1,
       pg_temp.id('worker', 1), now() - interval '1 day', now() - interval '1 day',
       case when n > 40 then now() - interval '23 hours' end, case when n <= 40 then now() + interval '1 hour' end, n > 40
  from generate_series(1, 100000) n;
insert into runs (id, job, origin, dedupe_key, payload, business, state, attempt, worker, enqueued_at, started_at, finished_at,
                  concurrency_key, dry_run)
select pg_temp.id('run', n), 'shaam-token-refresh', 'program', 'key ' || n,
       jsonb_build_object('business_id', pg_temp.id('business', 1 + n % 4000)), pg_temp.id('business', 1 + n % 4000)::text,
       case when n % 2000 = 3 then 'dead' when n % 4000 = 5 then 'held' when n % 500 = 1 then 'cancelled'
            else 'succeeded' end::run_state, 1,
       pg_temp.id('worker', 1), at, at, case when n % 4000 <> 5 then at end, 'shaam-token-refresh ' || (1 + n % 4000),
       n % 10000 = 9
  from (select n, now() - interval '365 days' + n * interval '4 min' as at from generate_series(1, 120000) n) as i;
-- What waits: 3,000 that are due, 2,000 that are put off, and 30 at work.
insert into runs (id, job, origin, payload, business, state, enqueued_at, ready, run_at, attempt, turn)
select pg_temp.id('waiting', n), 'generate-pdf', 'program',
       jsonb_build_object('business_id', pg_temp.id('business', 1 + n % 400)), pg_temp.id('business', 1 + n % 400)::text,
       'queued', now() - interval '1 min', n <= 3000, case when n > 3000 then now() + interval '1 hour' end, 0, n / 400
  from generate_series(1, 5000) n;
insert into runs (id, job, origin, state, attempt, worker, enqueued_at, started_at, concurrency_key)
select pg_temp.id('running', n), 'send-invoice-email', 'program', 'running', 1, pg_temp.id('worker', 1), now(), now(),
       'send-invoice-email ' || n
  from generate_series(1, 30) n;

insert into attempts (run_id, attempt, worker, host, started_at, ended_at, outcome)
select id, 1, pg_temp.id('worker', 1), 'h', started_at, finished_at,
       case when state in ('dead', 'held', 'cancelled', 'succeeded', 'partial') then state::text end
  from runs where attempt = 1;
insert into business_outcomes (run_id, business_id, outcome, counts, recorded_at)
select r.id, r.business::uuid, 'done', '{"sent": 1}', r.enqueued_at
  from runs r where r.attempt = 1 and r.business is not null;
insert into business_outcomes (run_id, business_id, outcome, recorded_at)
select r.id, pg_temp.id('business', n), case when n = 7 then 'failed' else 'done' end, r.enqueued_at
  from runs r cross join generate_series(1, 200) n where r.job = 'overdue-detection' and r.origin = 'schedule';
insert into changed_rows (run_id, change, ids, businesses, recorded_at)
select r.id, 'marked', array(select pg_temp.id('invoice', b * 100 + i) from generate_series(1, 50) i),
       array(select pg_temp.id('business', 1 + (b * 50 + i) % 4000) from generate_series(1, 50) i), r.enqueued_at
  from (select r.*, (extract(epoch from r.enqueued_at)::bigint / 86400 * 7) % 1000 as day from runs r
         where r.job in ('overdue-detection', 'draft-cleanup') and r.origin = 'schedule') r
 cross join lateral (select day + n as b from generate_series(1, 5) n) as batches;
insert into deliveries (id, kind, business_id, as_of, recipient_hash, state, message_id, run_id, attempt, intended_at)
select pg_temp.id('delivery', n), 'overdue-digest', pg_temp.id('business', 1 + n % 4000), at::date, 'hmac:' || n % 2,
       case when n % 5000 = 1 then 'unknown' when n % 20000 = 3 then 'released' when n % 300 = 2 then 'refused'
            when n between 149996 and 150000 then 'intended' else 'sent' end, '<' || n || '@bon>',
       case when n > 50000 then pg_temp.id('letter', n - 50000) else pg_temp.id('run', n) end, 1, at
  from (select n, now() - interval '365 days' + (n / 4000) * interval '9 days' as at from generate_series(1, 150000) n) as d;
insert into operator_actions (at, by, action, target, reason)
select now() - interval '9 years' + n * interval '2 hours', 'a person', 'retry', pg_temp.id('run', n)::text, 'why'
  from generate_series(1, 39000) n;
insert into shaam_refreshes (business_id, state, token_fingerprint, changed_at)
select pg_temp.id('business', n), case when n % 100 = 0 then 'needs_reauth' when n % 200 = 1 then 'deferred'
       else 'refreshed' end, sha256(('token ' || n)::bytea), now() - n * interval '1 second'
  from generate_series(1, 4200) n;
update shaam_refreshes set changed_at = now() - interval '90 days'
 where business_id in (select pg_temp.id('business', n) from generate_series(4001, 4200) n);
insert into shaam_tokens (fingerprint, business_id, sealed, seen_at)
select sha256(('token ' || n)::bytea), pg_temp.id('business', 1 + n % 4000),
       sha256(convert_to(case when n < 4000 then 'refresh ' || 1 + n % 4000 else 'old ' || n end, 'UTF8')),
       now() - n * interval '8 seconds'
  from generate_series(1, 100000) n;
reset all;
