-- Reports that the server was away for a letter. The gate closes at the `tolerated`-th time in a row, for `first`,
-- doubled with each trial that fails up to `longest`. What failed beside a closed gate says nothing new.
-- Returns whether this closed it.
create or replace function close_mail_gate(
    what text, was_trial boolean, tolerated integer, first interval, longest interval
) returns boolean
language plpgsql
set search_path = bon_scheduler, pg_temp
as $$
declare
    gate mail_gate%rowtype;
begin
    select * into gate from mail_gate for update;
    if gate.closed_since is not null and not was_trial then
        return false;
    end if;
    update mail_gate
       set failures = gate.failures + 1,
           trouble = what,
           trying_until = '-infinity',
           closed_since = case when gate.failures + 1 >= tolerated
                               then coalesce(gate.closed_since, clock_timestamp()) end,
           closed_until = clock_timestamp()
                        + least(longest, first * power(2, least(greatest(gate.failures + 1 - tolerated, 0), 20)));
    return gate.closed_since is null and gate.failures + 1 >= tolerated;
end;
$$;
