"""
What addresses mean, and what is wrong with one: a database's, a web page's, a host's, a mailbox's.

`database` takes a database's address apart, `parameters` says what becomes of each of its parameters, `tls` how its
connections are protected, `web` judges web addresses and hosts, `mailbox` those of e-mail. No message quotes a
password or a parameter's value. Imports nothing of ours.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
