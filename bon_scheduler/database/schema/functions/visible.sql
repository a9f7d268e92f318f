-- What people pasted into a name or an address, without what nobody sees around it; null when nothing is left. btrim
-- alone takes spaces. Controls, the spaces of Unicode, zero-width characters and marks of direction.
-- No search_path of its own, otherwise it is not inlined.
create or replace function visible(typed text) returns text
language sql immutable parallel safe
as $$
    select nullif(btrim(typed,
        E'\t\n\u000b\f\r\u001c\u001d\u001e\u001f \u0085\u00a0\u00ad\u061c\u1680\u180e'
        '\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u200b\u200c\u200d\u200e\u200f'
        '\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u202f\u205f\u2060\u2061\u2062\u2063\u2064'
        '\u2066\u2067\u2068\u2069\u3000\ufeff'), '')
$$;
