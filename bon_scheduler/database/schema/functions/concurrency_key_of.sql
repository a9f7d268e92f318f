-- What a run must not run beside: other runs of its job, of its job and business, or nothing (null). Runs that a
-- schedule asks for never run beside each other.
create or replace function concurrency_key_of(job text, exclusive text, business text, origin text) returns text
language sql immutable
as $$
    select case when exclusive = 'business' and business is not null then job || '/' || business
                when exclusive <> 'no' or origin = 'schedule' then job end;
$$;
