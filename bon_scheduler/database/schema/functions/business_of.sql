-- Which business a payload names, by our spelling or BON's; null: none. No search path, so that it can be inlined.
create or replace function business_of(payload jsonb) returns text
language sql immutable
as $$
    select left(coalesce(payload ->> 'business_id', payload ->> 'businessId'), 64);
$$;
