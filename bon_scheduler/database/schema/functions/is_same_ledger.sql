-- Says whether this is still the ledger that a process has worked with: not a copy in another database, not restored from a
-- dump, nor in dispute, and at least at `seen`, the highest mark the process knows. Asked by what takes runs, in the same
-- statement. A server that is another is noticed by the process; see engine/quarantine.py.
create or replace function is_same_ledger(seen bigint) returns boolean
language sql
stable
set search_path = bon_scheduler, pg_temp
as $$
    select coalesce((select p.behind is null and p.mark >= seen and p.ledger = p.tableoid
                            and p.database = (select d.oid from pg_database d where d.datname = current_database())
                       from place p),
                    seen = 0);
$$;
