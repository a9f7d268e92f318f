-- Gives back the leave to send a letter that turned out not to be sent: the next may go at once, and a trial is anybody's.
create or replace function return_letter_slot(apart interval, trial boolean) returns void
language sql
set search_path = bon_scheduler, pg_temp
as $$
    update mail_gate
       set next_slot = case when trial then next_slot else next_slot - apart end,
           trying_until = case when trial then '-infinity' else trying_until end;
    select wake_workers();
$$;
