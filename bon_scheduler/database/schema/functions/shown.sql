-- An instant as far as every program can hold it; null for infinities and what no calendar of a client reaches. For
-- reading: what somebody wrote into a table by hand must not hide all other rows. No search path, so that it is inlined.
create or replace function shown(instant timestamptz) returns timestamptz
language sql immutable
as $$
    select case when instant between timestamptz '0002-01-01 00:00:00+00' and timestamptz '9998-12-31 00:00:00+00'
                then instant end;
$$;
