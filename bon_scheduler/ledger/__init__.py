"""
The ledger: runs, their attempts, the workers that make them, and what operators did. The only writer of those tables.

A run is one row from the moment it is asked for until it is pruned. It is taken by one worker at a time, changed only
by the attempt that owns it, and released by whoever declares its worker dead. `entries` asks for runs and records
ticks, `claims` takes runs, `attempts` holds and ends them, `changes` and `pauses` are what an operator does,
`history` and `alive` read, `retention` forgets. May import: database.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
