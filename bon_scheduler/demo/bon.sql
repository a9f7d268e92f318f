-- BON's tables as this service must meet them, for the demo and the tests only.
--
-- In production BON's own migrations make them, and this service never alters
-- them. Foreign keys, checks and indexes are BON's, and so are the ones that are
-- missing: nothing indexes invoices.credited_invoice_id by itself, nor
-- emergency_allocation_numbers.used_for_invoice_id, so deleting a draft scans.
-- No trigger moves updated_at: only the writer does.

create type public.invoice_status as enum
    ('draft', 'finalized', 'sending', 'sent', 'paid', 'partially_paid', 'cancelled', 'credited');
create type public.document_type as enum ('tax_invoice', 'tax_invoice_receipt', 'receipt', 'credit_note');
create type public.business_type as enum ('licensed_dealer', 'exempt_dealer', 'limited_company');
create type public.business_role as enum ('owner', 'admin', 'user');
create type public.payment_method as enum ('cash', 'transfer', 'credit', 'check', 'other');
create type public.sequence_group as enum ('tax_document', 'credit_note', 'receipt');
create type public.allocation_status as enum ('pending', 'approved', 'rejected', 'emergency');
create type public.shaam_audit_result as enum ('approved', 'rejected', 'deferred', 'error', 'emergency');

create table public.users (
    id               uuid        primary key default gen_random_uuid(),
    email            text        not null unique,
    name             text        not null,
    google_id        text,
    avatar_url       text,
    phone            text,
    whatsapp_enabled boolean     not null default true,
    last_login_at    timestamptz,
    created_at       timestamptz not null default now(),
    updated_at       timestamptz not null default now()
);

create table public.sessions (
    id               uuid        primary key,
    user_id          uuid        not null references public.users (id) on delete cascade,
    created_at       timestamptz not null default now(),
    last_accessed_at timestamptz not null,
    expires_at       timestamptz not null
);
create index session_user_idx on public.sessions (user_id);
create index session_expires_idx on public.sessions (expires_at);

create table public.businesses (
    id                  uuid                 primary key default gen_random_uuid(),
    name                text                 not null,
    business_type       public.business_type not null,
    registration_number text                 not null unique,
    vat_number          text                 unique,
    email               text,
    default_vat_rate    integer              not null default 1800, -- basis points
    is_active           boolean              not null default true,
    deleted_at          timestamptz,
    created_by_user_id  uuid                 not null references public.users (id),
    created_at          timestamptz          not null default now(),
    updated_at          timestamptz          not null default now(),
    constraint businesses_active_check check (is_active = (deleted_at is null))
);

create table public.user_businesses (
    id          uuid                 primary key default gen_random_uuid(),
    user_id     uuid                 not null references public.users (id),
    business_id uuid                 not null references public.businesses (id),
    role        public.business_role not null,
    created_at  timestamptz          not null default now(),
    updated_at  timestamptz          not null default now(),
    constraint user_businesses_user_business_unique unique (user_id, business_id)
);
create index user_businesses_business_idx on public.user_businesses (business_id);

create table public.customers (
    id          uuid        primary key default gen_random_uuid(),
    business_id uuid        not null references public.businesses (id) on delete cascade,
    name        text        not null,
    email       text,
    is_active   boolean     not null default true,
    deleted_at  timestamptz,
    created_at  timestamptz not null default now(),
    updated_at  timestamptz not null default now()
);
create index customers_business_idx on public.customers (business_id);

-- Every *_minor_units is in the currency's hundredths: agorot for ILS.
create table public.invoices (
    id                         uuid                  primary key default gen_random_uuid(),
    business_id                uuid                  not null references public.businesses (id),
    customer_id                uuid                  references public.customers (id) on delete set null,
    customer_name              text,
    customer_tax_id            text,
    customer_address           text,
    customer_email             text,
    document_type              public.document_type  not null,
    status                     public.invoice_status not null default 'draft',
    is_overdue                 boolean               not null default false,
    sequence_number            integer,
    document_number            text,
    credited_invoice_id        uuid                  references public.invoices (id) on delete restrict,
    sequence_group             public.sequence_group,
    invoice_date               date                  not null,
    issued_at                  timestamptz,
    due_date                   date,
    currency                   text                  not null default 'ILS',
    subtotal_minor_units       integer               not null default 0,
    discount_minor_units       integer               not null default 0,
    total_excl_vat_minor_units integer               not null default 0,
    vat_minor_units            integer               not null default 0,
    total_incl_vat_minor_units integer               not null default 0,
    allocation_status          public.allocation_status,
    allocation_number          text,
    sent_at                    timestamptz,
    paid_at                    timestamptz,
    created_at                 timestamptz           not null default now(),
    updated_at                 timestamptz           not null default now()
);
create index invoices_draft_cleanup_idx on public.invoices (updated_at) where status = 'draft';
create index invoices_overdue_candidates_idx on public.invoices (due_date, status)
    where is_overdue = false and due_date is not null and status in ('finalized', 'sent', 'partially_paid');
create index invoices_overdue_reset_idx on public.invoices (status)
    where is_overdue = true and status in ('paid', 'cancelled', 'credited');
create unique index invoices_sequence_unique
    on public.invoices (business_id, sequence_group, sequence_number) where sequence_number is not null;
create index invoices_business_status_idx on public.invoices (business_id, status);
create index invoices_business_date_idx on public.invoices (business_id, invoice_date);
create index invoices_business_customer_idx on public.invoices (business_id, customer_id);
create index invoices_business_credited_idx
    on public.invoices (business_id, credited_invoice_id, document_type);

create table public.invoice_items (
    id                             uuid           primary key default gen_random_uuid(),
    invoice_id                     uuid           not null references public.invoices (id) on delete cascade,
    position                       integer        not null,
    description                    text           not null,
    quantity                       numeric(12, 4) not null,
    unit_price_minor_units         integer        not null,
    vat_rate_basis_points          integer        not null,
    line_total_minor_units         integer        not null default 0,
    vat_amount_minor_units         integer        not null default 0,
    line_total_incl_vat_minor_units integer      not null default 0,
    constraint invoice_items_position_unique unique (invoice_id, position)
);

create table public.invoice_payments (
    id                  uuid                  primary key default gen_random_uuid(),
    invoice_id          uuid                  not null references public.invoices (id) on delete cascade,
    amount_minor_units  integer               not null check (amount_minor_units > 0),
    paid_at             date                  not null,
    method              public.payment_method not null,
    recorded_by_user_id uuid                  references public.users (id),
    created_at          timestamptz           not null default now()
);
create index invoice_payments_invoice_idx on public.invoice_payments (invoice_id);

create table public.business_shaam_credentials (
    id                      uuid        primary key default gen_random_uuid(),
    business_id             uuid        not null unique references public.businesses (id) on delete cascade,
    encrypted_access_token  text        not null,
    encrypted_refresh_token text        not null,
    token_expires_at        timestamptz not null,
    scope                   text,
    needs_reauth            boolean     not null default false,
    created_at              timestamptz not null default now(),
    updated_at              timestamptz not null default now()
);

create table public.shaam_audit_log (
    id               uuid                      primary key default gen_random_uuid(),
    business_id      uuid                      not null references public.businesses (id),
    invoice_id       uuid                      not null references public.invoices (id),
    request_payload  jsonb,
    response_payload jsonb,
    result           public.shaam_audit_result not null,
    created_at       timestamptz               not null default now()
);
create index shaam_audit_log_invoice_idx on public.shaam_audit_log (invoice_id);

create table public.emergency_allocation_numbers (
    id                  uuid        primary key default gen_random_uuid(),
    business_id         uuid        not null references public.businesses (id),
    number              text        not null,
    used                boolean     not null default false,
    used_for_invoice_id uuid        references public.invoices (id) on delete set null,
    reported            boolean     not null default false,
    created_at          timestamptz not null default now()
);
create index emergency_allocation_numbers_business_idx on public.emergency_allocation_numbers (business_id);
