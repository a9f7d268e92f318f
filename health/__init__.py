"""Probes and metrics over HTTP: reads, never runs."""

from health.probes import Probes
from health.server import answering

__all__ = ["Probes", "answering"]
