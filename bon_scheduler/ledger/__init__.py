"""
The ledger: runs, their attempts, the workers that make them, and what operators did. The only writer of those tables.

A run is one row from the moment it is asked for until it is pruned. It is taken by one worker at a time, changed only
by the attempt that owns it, and released by whoever declares its worker dead. `entries` asks for runs and records
ticks, `claims` takes runs, `attempts` holds and ends them, `revise` and `operate` are what a person does, `history`
reads, `retention` forgets. May import: database.
"""
