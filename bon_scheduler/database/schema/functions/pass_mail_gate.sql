-- Asks to pass. verdict: open (go after `wait`; the slot is yours) · trial (the server was away: you alone try
-- it, at once) · closed (nobody goes for at least `wait`; `trouble` says why, null: the row is full). `failures`:
-- whether a success is worth reporting.
-- No wait is believed that only a clock which was set back explains. For the row that is what is beyond its length
-- and one more place, because nobody is given a place beyond its length. It is shorter than any job's time-out that
-- sends letters, otherwise they would be cancelled while they wait for their turn.
create or replace function pass_mail_gate(
    apart interval, trial interval,
    out verdict text, out wait interval, out failures integer, out trouble text
)
language plpgsql
set search_path = bon_scheduler, pg_temp
as $$
declare
    gate  mail_gate%rowtype;
    here  timestamptz;
    length constant interval := '2 minutes';
    limits constant interval := '15 minutes';
    soon   constant interval := '5 seconds';
begin
    select * into gate from mail_gate for update;
    here := clock_timestamp();      -- AFTER the lock, which may have taken a while
    failures := gate.failures;
    trouble := gate.trouble;
    if gate.closed_since is null then
        if gate.next_slot > here + length and gate.next_slot <= here + length + apart then
            verdict := 'closed';
            wait := gate.next_slot - length - here;
            trouble := null;
            return;
        end if;
        verdict := 'open';
        if gate.next_slot between here and here + length then
            wait := gate.next_slot - here;
        else
            wait := '0';
        end if;
        update mail_gate set next_slot = here + wait + apart;
    elsif gate.closed_until between here and here + limits then
        verdict := 'closed';
        wait := gate.closed_until - here;
    elsif gate.trying_until between here and here + limits then
        verdict := 'closed';    -- but soon known
        wait := least(gate.trying_until - here, soon);
    else
        verdict := 'trial';
        wait := '0';
        update mail_gate set trying_until = here + trial;
    end if;
end;
$$;
