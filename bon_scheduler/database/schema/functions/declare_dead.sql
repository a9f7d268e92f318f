-- Takes those workers for dead whose last word it still is; whoever has spoken since has another, and lives. Their runs are
-- released in the same transaction (`release_lost`).
create or replace function declare_dead(last_words uuid[]) returns setof workers
language sql
set search_path = bon_scheduler, pg_temp
as $$
    update workers w set last_word = null where w.last_word = any (last_words) returning w.*;
$$;
