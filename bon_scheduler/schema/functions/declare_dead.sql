-- Takes those workers for dead whose last word it still is, and ends their connections BEFORE anybody locks what they
-- have locked. Whoever has spoken since has another word, and lives. Its runs are released in the same transaction
-- (`release_lost`).
create or replace function declare_dead(last_words uuid[]) returns setof workers
language plpgsql
set search_path = bon_scheduler, pg_temp
as $$
declare
    dead workers%rowtype;
begin
    for dead in update workers w set last_word = null where w.last_word = any (last_words) returning w.* loop
        perform cut_off(dead.id);
        return next dead;
    end loop;
end;
$$;
