"""
A business's OAuth2 token for the tax authority: rotated, never lost, never overwritten by an older one.

`rotation` exchanges one token and saves what came of it, `client` speaks to the authority, `cipher` is BON's
encryption, `refreshes` is our ledger of exchanges, `unsaved` and `spool` keep what no database takes, `limiter` and
`breaker` bound and pause the calls. A token that is not refreshed is looked for here. May import: ledger, database.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
