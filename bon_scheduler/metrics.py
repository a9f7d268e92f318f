"""
Every metric the service exports, in one place. Names are `interface.md`'s.

The label is `job_name`, because Prometheus renames a label `job`. No label ever
holds a business, a person or an address.
"""

from collections.abc import Mapping
from datetime import datetime
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from bon_scheduler.jobs import Counts

__all__ = ["Metrics"]

RUN_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 5, 15, 60, 180, 600)
LATENESS_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 5, 15, 60, 300, 3600)
LETTER_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 30, 60)
PROBE_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 3)
ANSWER_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
LAG_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5)


class Metrics:
    """The metrics of one process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        one_job = ["job_name"]
        self._runs = counter("bon_job_runs", "Runs that ended", [*one_job, "state"])
        self._duration = histogram("bon_job_duration_seconds", "Time of one attempt", one_job, buckets=RUN_SECONDS)
        self._rows = counter("bon_job_rows", "What runs did, by their counts", [*one_job, "count"])
        text = "When a run of the job last succeeded on this replica"
        self._last_success = gauge("bon_job_last_success_timestamp_seconds", text, one_job)
        self.next_fire = gauge("bon_job_next_fire_timestamp_seconds", "When the job fires next", one_job)
        text = "From fire time to the handler's first line"
        self.tick_lateness = histogram("bon_tick_lateness_seconds", text, one_job, buckets=LATENESS_SECONDS)
        self.ticks_missed = counter("bon_ticks_missed", "Ticks recorded as missed", one_job)
        text = "Ticks that are due and not in the ledger"
        self.ticks_unaccounted = gauge("bon_ticks_unaccounted", text, one_job)
        text = "Runs that have not ended, or wait for a person; 10,000 of each kind at most"
        self.queue_depth = gauge("bon_queue_depth", text, [*one_job, "state"])
        text = "How long the run that waits longest has been due"
        self.queue_oldest_age = gauge("bon_queue_oldest_age_seconds", text, one_job)
        self.brake_held = gauge("bon_brake_held", "Runs that the brake holds until a person decides", one_job)
        text = "1 where the last rehearsal says that the brake would hold the job's next run"
        self.rehearsal_would_hold = gauge("bon_rehearsal_would_hold", text, one_job)
        self.rescued = counter("bon_runs_rescued", "Runs released because their worker was declared dead", one_job)
        self.fenced = counter("bon_fenced_commits", "Commits refused to an attempt without its run", one_job)

        self._email_sent = counter("email_sent", "Letters tried, by what became of them", ["status"])
        text = "Time of one letter's conversation with the mail server, and of recording its end"
        self._email_duration = histogram("email_send_duration_seconds", text, buckets=LETTER_SECONDS)
        text = "Letters of the last seven days that may or may not have arrived"
        self.email_unknown = gauge("email_unknown", text)

        self.pool_connections = gauge("db_pool_connections", "Connections of the pool", ["state"])
        self.check_status = gauge("health_check_status", "1 when the dependency is up", ["dependency"])
        text = "Time of a dependency's check"
        self.check_duration = histogram("health_check_duration_seconds", text, ["dependency"], buckets=PROBE_SECONDS)
        text = "How late the event loop wakes a sleeper"
        self.loop_lag = histogram("event_loop_lag_seconds", text, buckets=LAG_SECONDS)

        text = "Answers of the tax authority, by what they mean"
        self._shaam_requests = counter("shaam_requests", text, ["result"])
        text = "From a request to its answer or time-out"
        self._shaam_duration = histogram("shaam_request_duration_seconds", text, buckets=ANSWER_SECONDS)
        text = "Until the first access token expires of an active business that needs no consent"
        self.shaam_min_ttl = gauge("shaam_token_min_ttl_seconds", text)
        self.shaam_needs_reauth = gauge("shaam_needs_reauth", "Active businesses whose owner must consent again")
        self.shaam_failing = gauge("shaam_failing", "Active businesses whose last refresh failed")
        text = "1 while owners are not asked to consent again: too many grants are spent for it to be their doing"
        self.consent_braked = gauge("bon_consent_braked", text)

    def shaam_answered(self, result: str, seconds: float) -> None:
        """Account for one request to the tax authority."""
        self._shaam_requests.labels(result).inc()
        self._shaam_duration.observe(seconds)

    def attempt_ended(self, job: str, state: str, seconds: float, counts: Counts, now: datetime) -> None:
        """Account for one attempt: its state, its time in seconds and its counts."""
        self._runs.labels(job, state).inc()
        self._duration.labels(job).observe(seconds)
        for name, count in counts.items():
            self._rows.labels(job, name).inc(count)
        if state in {"succeeded", "partial"}:
            self._last_success.labels(job).set(now.timestamp())

    def letter_tried(self, status: str, seconds: float) -> None:
        """Account for one letter: what became of it, and the seconds it took; one only logged took none."""
        self._email_sent.labels(status).inc()
        if status != "logged":
            self._email_duration.observe(seconds)

    def set_queue(self, depths: Mapping[tuple[str, str], int], ages: Mapping[str, float]) -> None:
        """Show the queue as it is now: runs by (job, state), and the oldest due run's age in seconds."""
        self.queue_depth.clear()
        self.queue_oldest_age.clear()
        self.brake_held.clear()
        for (job, state), count in depths.items():
            self.queue_depth.labels(job, state).set(count)
            if state == "held":
                self.brake_held.labels(job).set(count)
        for job, age in ages.items():
            self.queue_oldest_age.labels(job).set(age)
