"""
One e-mail at most once for each business, day and recipient; an uncertain one is flagged for a person.

`message` is a letter and how it is written, `mailer` sends it, `smtp` keeps the connections, `replies` judges what a
server said and keeps as much of it as `words` has, `gate` holds the rate of all replicas and closes while the server is
away, `deliveries` is what became of letters, `keys` names recipients so that nobody can guess them. A digest that was
sent twice, or not at all, is looked for here. May import: ledger, database.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
