-- `enqueue` for many runs of one job at once: one insert, however many there are. Returns how many keys were new.
create or replace function enqueue_many(
    job         text,
    payloads    jsonb[],
    dedupe_keys text[],
    priority    integer,
    origin      text,
    asked_by    text,
    caused_by   uuid
) returns bigint
language plpgsql
set search_path = bon_scheduler, pg_temp
as $$
declare
    known jobs%rowtype;
    new   bigint;
begin
    select * into strict known from jobs j where j.name = enqueue_many.job;
    with wished as (
        select w.payload, w.key, business_of(w.payload) as business,
               row_number() over (partition by business_of(w.payload)) - 1 as behind
          from unnest(payloads, dedupe_keys) as w (payload, key)
    ), businesses as (
        select b.business, next_turn(known.name, known.turn, b.business) as turn
          from (select distinct w.business from wished w where w.business is not null) b
    )
    insert into runs (job, payload, dedupe_key, priority, origin, asked_by, caused_by, business, concurrency_key, turn)
    select known.name, w.payload, w.key, enqueue_many.priority, enqueue_many.origin, enqueue_many.asked_by,
           enqueue_many.caused_by, w.business,
           concurrency_key_of(known.name, known.exclusive, w.business, enqueue_many.origin),
           coalesce(b.turn + w.behind, known.turn + 1)
      from wished w
      left join businesses b on b.business = w.business
    on conflict do nothing;
    get diagnostics new = row_count;
    if new > 0 then
        perform wake_workers();
    end if;
    return new;
end;
$$;

revoke all on function enqueue_many (text, jsonb[], text[], integer, text, text, uuid) from public;
