"""
The way to PostgreSQL: connections and pools, poolers and addresses, and schema `bon_scheduler` as it is now.

A connection that cannot be had says where and what to do, without credentials; `migrate` brings any database that is
empty or of the version before to the schema in `schema/`, whole or not at all. May import: config, log, jobs,
addresses. Whoever adds a column to a table begins in `schema/`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
