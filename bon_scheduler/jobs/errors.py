"""What a handler raises to say what becomes of its run. Anything else is a failure: another try may mend it."""

from collections.abc import Mapping
from datetime import timedelta

__all__ = ["HeldError", "LostRunError", "NeverRetryError", "NotNowError", "RetryLaterError"]


class NeverRetryError(Exception):
    """Raised by a handler whose failure another attempt cannot mend: the run ends `dead`."""


class RetryLaterError(Exception):
    """
    Raised by a handler that wants its run tried again `after` a time; None: as its job's policy says. It counts as an
    attempt.
    """

    def __init__(self, message: str, *, after: timedelta | None) -> None:
        super().__init__(message)
        if after is not None:
            _require_span(after)
        self.after = after


class NotNowError(Exception):
    """
    Raised by a handler that lacks what every run of its job needs, as while a mail server is away: the run is
    given back and comes again after `after`, and this attempt does not count. Effects must be none so far, or
    such that a repetition finds them. The handler decides how long a run may go on like that.
    """

    def __init__(self, message: str, *, after: timedelta) -> None:
        super().__init__(message)
        _require_span(after)
        self.after = after


class HeldError(Exception):
    """
    Raised by a handler that finds that it would change abnormally much: the run is `held` until a person releases it.
    The message says why, what was done so far, if anything, and what an operator needs to decide.
    """

    def __init__(self, message: str, *, figures: Mapping[str, int]) -> None:
        super().__init__(message)
        for name, number in figures.items():
            if not isinstance(number, int):
                raise TypeError(f'The figure "{name}" is of type {type(number).__name__}. Give whole numbers.')
        self.figures = figures


class LostRunError(Exception):
    """The attempt no longer owns its run: what it was about to commit is rolled back."""


def _require_span(after: object) -> None:
    # BEFORE the runner reads it: what is raised here comes from the author's line.
    if not isinstance(after, timedelta):
        raise TypeError(f"after is of type {type(after).__name__}. Write after=timedelta(seconds=30), for example.")
