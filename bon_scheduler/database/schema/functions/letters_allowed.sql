-- How many letters may begin now, at most `soon` ahead of their place, and whether that one is a trial: the server was
-- away, and one letter tries it. `wait`: until it is worth asking again. Null `apart`: letters are not paced.
-- No wait is believed that only a clock which was set back explains. The caller holds the row.
create or replace function letters_allowed(
    gate mail_gate, apart interval,
    out letters integer, out trial boolean, out first_slot timestamptz, out wait interval
)
language plpgsql
set search_path = bon_scheduler, pg_temp
as $$
declare
    here   constant timestamptz := clock_timestamp();
    soon   constant interval := '100 milliseconds';
    length constant interval := '2 minutes';
    limits constant interval := '15 minutes';
begin
    letters := 0;
    trial := false;
    if gate.closed_since is null then
        first_slot := case when gate.next_slot between here and here + length then gate.next_slot else here end;
        if first_slot <= here + soon then
            letters := 1 + floor(extract(epoch from here + soon - first_slot) / extract(epoch from apart));
        end if;
        wait := greatest(first_slot + letters * apart - here - soon, '1 millisecond');
    elsif gate.closed_until between here and here + limits then
        wait := gate.closed_until - here;
    elsif gate.trying_until between here and here + limits then
        wait := least(gate.trying_until - here, '5 seconds');
    else
        letters := 1;
        trial := true;
        first_slot := here;
        wait := '5 seconds';
    end if;
end;
$$;
