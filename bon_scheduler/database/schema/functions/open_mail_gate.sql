-- Reports that the server took part in a conversation again. Returns since when the gate was closed, null if it was not.
create or replace function open_mail_gate() returns timestamptz
language plpgsql
set search_path = bon_scheduler, pg_temp
as $$
declare
    since timestamptz;
begin
    select g.closed_since into since from mail_gate g for update;
    update mail_gate
       set failures = 0, trouble = null, closed_since = null, closed_until = '-infinity',
           trying_until = '-infinity'
     where mail_gate.failures > 0;
    return since;
end;
$$;
