"""The figures of the chaos suite, summed over its worlds."""

from collections import Counter, defaultdict
from statistics import quantiles

import pytest

__all__ = ["print_figures"]


def print_figures(terminalreporter: pytest.TerminalReporter) -> None:
    """Print, by kind of fault, how often it struck and how soon work went on."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    properties = [item for report in reports for item in getattr(report, "user_properties", [])]
    struck: dict[str, list[float]] = defaultdict(list)
    times: Counter[str] = Counter()
    for name, value in properties:
        if name == "chaos":
            kind, seconds = value
            times[kind] += 1
            if seconds is not None:
                struck[kind].append(seconds)
    if not times:
        return
    say = terminalreporter.write_line
    say(f"chaos: {sum(times.values())} faults; seconds until work went on, p50 and p99:")
    for kind, count in times.items():
        say(f"  {kind:<28}{count:>4}{_spread(struck[kind])}")
    for total in ("runs", "rescued", "fenced"):
        say(f"  {total}: {sum(value for name, value in properties if name == total)}")
    say(f"  CHAOS_SEED={next((value for name, value in properties if name == 'seed'), '?')}")


def _spread(seconds: list[float]) -> str:
    if not seconds:
        return "       —       —"
    cuts = quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else seconds * 99
    return f"{cuts[49]:>8.2f}{cuts[98]:>8.2f}"
