"""The real program with batches of two rows: `python -m tests.small_batches serve`."""

import importlib

from bon_scheduler.cli.app import main
from handlers import batches

if __name__ == "__main__":
    batches.LARGEST, batches.FOUND_AT_ONCE = 2, 4
    # The package's attribute of this name is the job, not the module.
    vars(importlib.import_module("handlers.session_cleanup"))["AT_ONCE"] = 2
    main()
