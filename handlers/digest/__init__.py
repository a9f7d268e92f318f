"""
What jobs that write to a business's owners share: what is owed, the letter in Hebrew or English, and how each is tried.

`statement` reads what a business is owed and who is told, `rendering` makes the letter of it, `mailing` delivers
letters and remembers how it went. Sentences are in `locale/`, layout in `templates/`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
