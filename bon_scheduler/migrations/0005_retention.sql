-- What is kept for how long. The job `ledger-pruning` deletes by these indexes, oldest first.
--
-- Dead and held runs are for a person, and stay until one has decided.

create index runs_by_end on runs (finished_at)
    where state in ('succeeded', 'partial', 'cancelled', 'missed', 'paused');
create index deliveries_settled on deliveries (intended_at) where state in ('sent', 'refused');

alter table business_outcomes add column recorded_at timestamptz not null default now();
create index business_outcomes_by_age on business_outcomes (recorded_at);

-- One row: ticks until then may have been pruned, so an audit begins after it. Only ever moves forwards.
create table pruning (
    only_row    boolean primary key default true check (only_row),
    ticks_until timestamptz not null
);
insert into pruning (ticks_until) values ('-infinity');

-- The queue's tables are emptied as fast as they fill, and the last pages of an attempt are changed twice: clean
-- them by how much is dead, not by which share, which grows with the ledger.
alter table pgqueuer set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
                          autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 5000);
alter table pgqueuer_log set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000);
alter table runs set (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 5000);
alter table attempts set (autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 5000);
