"""
Errors of the command line, told in a paragraph on standard error.

What that needs is imported once there is an error.
"""

import os
import sys
from collections.abc import Sequence

from bon_scheduler.calling import fill_in
from bon_scheduler.cli.usage import UsageError

__all__ = ["complain", "require_text", "tell"]


def tell(error: Exception) -> int:
    """Tell an error in a paragraph; return the exit status."""
    import structlog

    from bon_scheduler.cli.statuses import EXIT_STATUS
    from bon_scheduler.config import LogFormat, LogLevel
    from bon_scheduler.log import configure_logging, describe_error

    if type(error) in EXIT_STATUS:
        complain(str(error))
        return EXIT_STATUS[type(error)]
    if os.environ.get("LOG_LEVEL", "").lower() == LogLevel.DEBUG:
        configure_logging(LogLevel.DEBUG, LogFormat.JSON)
        structlog.get_logger().debug("command.failed", exc_info=error)
    complain(f"{describe_error(error)}. LOG_LEVEL=debug shows where it came from.")
    return 1


def require_text(arguments: Sequence[str]) -> None:
    """Raise UsageError for bytes that are not text: neither a database nor a terminal would take them."""
    for number, argument in enumerate(arguments, 1):
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"Argument {number} is not UTF-8. Write it in UTF-8.") from error


def complain(text: str) -> None:
    """Write a paragraph on standard error."""
    sys.stderr.write(f"bon-scheduler: {fill_in(text)}\n")
