-- Ends the connections of a worker that is taken for dead, and waits for a moment until they have ended. A process that
-- was frozen between the two halves of a statement (its plan is asked for, its execution is not) is not idle to the
-- server, so no limit of idleness ends its transaction, and the rows it has locked stay locked for as long as it is
-- frozen. If it was not dead after all, it has lost its runs already, and connects anew.
create or replace function cut_off(worker uuid) returns void
language plpgsql
set search_path = bon_scheduler, pg_temp
as $$
declare
    sessions constant integer[] := array(select a.pid
                                           from pg_stat_activity a
                                          where a.datname = current_database()
                                            and a.application_name = 'bon_scheduler ' || cut_off.worker
                                            and a.pid <> pg_backend_pid());
begin
    perform pg_terminate_backend(pid) from unnest(sessions) as pid;
    for n in 1 .. 20 loop
        exit when not exists (select from pg_locks l where l.pid = any (sessions));
        perform pg_sleep(0.01);
    end loop;
exception when insufficient_privilege then
    raise warning 'bon_scheduler: a dead worker''s connections belong to another role and were not ended'
        using hint = 'Let all workers connect as one role.';
end;
$$;
