"""
What a job is. Imports nothing else of ours, so that every other package may import it.

A handler is an `async def` of a `JobContext` and a `Payload` that returns counts. `@job` turns it into a `Job`;
`handlers.JOBS` lists them. There is no registry and no discovery. What a handler may raise is in `errors`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
