"""The kinds of fault, by family, and within how many seconds work must go on after each."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import MappingProxyType

from tests.chaos import hurt_database as database
from tests.chaos import hurt_processes as processes
from tests.chaos.hurt_processes import LEAVING_SECONDS
from tests.chaos.world import LEASE_SECONDS, SHUTDOWN_SECONDS, World

__all__ = ["A_MINUTE", "FAMILIES", "Fault"]

Strike = Callable[[World], Awaitable[float | None]]
RESCUE = LEASE_SECONDS + 5
RESUME = 5.0
GIVE_BACK = 1.0


@dataclass(frozen=True, slots=True)
class Fault:
    """A kind of fault, and within how many seconds work must go on."""

    strike: Strike
    bound_seconds: float


FAMILIES = MappingProxyType(
    {
        "kills": {
            "kill_before": Fault(processes.kill_before, RESCUE),
            "kill_open": Fault(processes.kill_open, RESCUE),
            "kill_commit": Fault(processes.kill_commit, RESCUE),
            "kill_after": Fault(processes.kill_after, RESCUE),
            "poison": Fault(processes.poison, RESCUE),
        },
        "freezes": {
            "freeze_before": Fault(processes.freeze_before, RESCUE),
            "freeze_open": Fault(processes.freeze_open, RESCUE),
            "freeze_commit": Fault(processes.freeze_commit, RESCUE),
            "freeze_after": Fault(processes.freeze_after, RESCUE),
            "freeze_briefly": Fault(processes.freeze_briefly, RESUME),
            "block_loop": Fault(processes.block_loop, RESUME),
        },
        "server": {
            "restart_immediate": Fault(database.restart_immediate, RESUME),
            "restart_fast": Fault(database.restart_fast, RESUME),
            "outage": Fault(database.outage, RESUME),
            "connection_limit": Fault(database.connection_limit, RESUME),
            "read_only": Fault(database.read_only, RESUME),
            "disk_full": Fault(database.disk_full, RESUME),
        },
        "connections": {
            "terminate_one": Fault(database.terminate_one, RESUME),
            "terminate_all": Fault(database.terminate_all, RESUME),
            "terminate_listener": Fault(database.terminate_listener, RESUME),
            "reset": Fault(database.reset, RESUME),
            "latency": Fault(database.latency, RESUME),
            "black_hole_for_one": Fault(database.black_hole_for_one, RESUME),
            "black_hole_for_all": Fault(database.black_hole_for_all, RESUME),
        },
        "stops": {
            "stop_idle": Fault(processes.stop_idle, GIVE_BACK),
            "stop_before": Fault(processes.stop_before, GIVE_BACK),
            "stop_open": Fault(processes.stop_open, GIVE_BACK),
            "stop_after": Fault(processes.stop_after, GIVE_BACK),
            "stop_blocked": Fault(processes.stop_blocked, GIVE_BACK),
            "stop_cut_off": Fault(processes.stop_cut_off, RESCUE + SHUTDOWN_SECONDS + LEAVING_SECONDS),
        },
        "claims": {
            "wake_up_lost": Fault(database.wake_up_lost, RESUME),
            "listen_lost": Fault(database.listen_lost, RESUME),
            "claim_unanswered": Fault(database.claim_unanswered, RESUME),
            "batch_half_done": Fault(database.batch_half_done, RESCUE),
            "exclusive_contended": Fault(database.exclusive_contended, RESCUE),
            "pinned_horizon": Fault(database.pinned_horizon, RESUME),
        },
    }
)
"""By family: one world serves a whole family, fault after fault."""
A_MINUTE = Fault(database.black_hole_for_a_minute, RESUME)
