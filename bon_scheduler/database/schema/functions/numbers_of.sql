-- A version as numbers, by which versions compare: 1.10.0rc1 is {1,10,0}.
create or replace function numbers_of(version text) returns integer[]
language sql immutable
set search_path = bon_scheduler, pg_temp
as $$
    select string_to_array(rtrim(regexp_replace(version, '[^0-9.].*$', ''), '.'), '.')::integer[];
$$;
