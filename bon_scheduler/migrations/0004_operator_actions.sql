-- What an operator did to a run is part of what is known of it.

-- `show` reads the actions on one run.
create index operator_actions_target on operator_actions (target);

-- A person's retry begins the run anew. A business that failed before must not make it `partial` again when it
-- is not touched any more, and must not be forgotten either. So a failure is of an attempt, and the run says
-- since which attempt failures count: a retry changes no row that a handler may hold.
alter table runs add column retried_after integer not null default 0;
alter table business_outcomes add column attempt integer not null default 1;

comment on column runs.retried_after is
    'The attempt after which a person last retried it. What failed for a business until then decides nothing.';
comment on column business_outcomes.attempt is 'The last attempt that said something of the business.';
