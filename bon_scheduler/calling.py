"""
How this program was started, so that hints name a command that works where the reader is.

Texts say `bon-scheduler COMMAND`, wherever they are written or kept. What a person is shown has it replaced by the
command as it was started: `python3 dev.py` in a clone, `bon-scheduler` in the image, `python -m bon_scheduler` else.
"""

import os
import re
import shlex
import shutil
import sys
from functools import cache
from pathlib import Path

__all__ = ["STARTED_AS", "as_started", "fill_in"]

STARTED_AS = "BON_SCHEDULER_STARTED_AS"
"""The variable in which `dev.py` says how it was started."""
_NAMED = re.compile(r"(?<![\w./-])bon-scheduler (?=[a-z])")


@cache
def as_started() -> str:
    """Return what to type before a command's name, to start this program as it was started now."""
    if said := os.environ.get(STARTED_AS):
        return said
    script = Path(sys.argv[0])
    if script.name == "__main__.py":
        return f"{shlex.quote(sys.orig_argv[0])} -m bon_scheduler"
    found = shutil.which(script.name)
    return script.name if found and Path(found).resolve() == script.resolve() else shlex.quote(str(script))


def fill_in(text: str) -> str:
    """Return the text with each `bon-scheduler COMMAND` as it is typed here."""
    return _NAMED.sub(lambda _: f"{as_started()} ", text)
