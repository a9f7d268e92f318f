"""Probes and metrics over HTTP: reads, never runs."""

from health.probes import Probes
from health.server import CannotListenError, answering

__all__ = ["CannotListenError", "Probes", "answering"]
