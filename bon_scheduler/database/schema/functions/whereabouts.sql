-- Says which server, database and tables these are. What the server does not tell (a managed one may not) is null.
-- `server`: the identifier that initdb gives, the same on replicas and physical copies. `ledger`: the object identifier of
-- table `place`, another after each restore from a dump. `started`: when this server began to run. `timeline`: another
-- after a promotion or a recovery to an instant.
create or replace function whereabouts(
    out server text, out version integer, out database oid, out ledger oid, out started timestamptz, out timeline text
)
language plpgsql
stable
set search_path = bon_scheduler, pg_temp
as $$
begin
    version := current_setting('server_version_num')::integer / 10000;
    select d.oid into database from pg_database d where d.datname = current_database();
    ledger := 'bon_scheduler.place'::regclass::oid;
    started := pg_postmaster_start_time();
    begin
        server := (select c.system_identifier::text from pg_control_system() c);
    exception when others then
        server := null;
    end;
    begin
        timeline := left(pg_walfile_name(pg_current_wal_lsn()), 8);
    exception when others then
        timeline := null;   -- on a standby too
    end;
end;
$$;
