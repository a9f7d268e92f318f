-- Whether a worker may hold runs. One that has left has no row, and one that is taken for dead no word.
create or replace function is_alive(worker uuid) returns boolean
language sql stable
set search_path = bon_scheduler, pg_temp
as $$
    select exists (select from workers w where w.id = $1 and w.last_word is not null);
$$;
