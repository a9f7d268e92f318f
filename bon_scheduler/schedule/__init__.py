"""
Which fire times are due, and that each is accounted for: run, missed with the reason, or paused.

A tick is a name, not an event: `timing` computes fire times from a cron expression and nothing else, `clocks` says
what time it is when no single clock is believed, `schedules` keeps what was in force when, `triggers` records what is
due, and `audit` proves that nothing was left out. May import: ledger, database.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
