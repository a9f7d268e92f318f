"""
How runs are worked on: claimed, called, recorded, rescued; and what a person starts in the foreground.

A run survives whatever happens to its process, its database or its clock: what an attempt commits, it commits while
it owns the run, and what it leaves behind another makes again. `claiming` takes runs, `runner` makes one attempt,
`context` is what its handler is given, `recorder` writes how it ended, `heartbeat` keeps this worker alive in the
ledger, `reconcile` compares the ledger with what is so; `run_once` and `dry_run` are a person's. May import: mail,
schedule, ledger, database.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
