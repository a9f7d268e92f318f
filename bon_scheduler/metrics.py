"""
Every metric the service exports, in one place. Names are `interface.md`'s.

The label is `job_name`, because Prometheus renames a label `job`. No label ever
holds a business, a person or an address.
"""

from collections.abc import Mapping
from datetime import datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from bon_scheduler.jobs import Counts

__all__ = ["Metrics"]

RUN_SECONDS_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1, 5, 15, 60, 180, 600)
LATENESS_SECONDS_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 5, 15, 60, 300, 3600)
LETTER_SECONDS_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 30, 60)
PROBE_SECONDS_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 3)
ANSWER_SECONDS_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
LAG_SECONDS_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5)


class Metrics:
    """The metrics of one process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        one_job = ["job_name"]
        self._runs = Counter("bon_job_runs", "Runs that ended", [*one_job, "state"], registry=self.registry)
        self._duration = Histogram(
            "bon_job_duration_seconds",
            "Time of one attempt",
            one_job,
            buckets=RUN_SECONDS_BUCKETS,
            registry=self.registry,
        )
        self._rows = Counter(
            "bon_job_rows",
            "What runs did, by their counts",
            [*one_job, "count"],
            registry=self.registry,
        )
        self._last_success = Gauge(
            "bon_job_last_success_timestamp_seconds",
            "When a run of the job last succeeded on this replica",
            one_job,
            registry=self.registry,
        )
        self.next_fire = Gauge(
            "bon_job_next_fire_timestamp_seconds", "When the job fires next", one_job, registry=self.registry
        )
        self.tick_lateness = Histogram(
            "bon_tick_lateness_seconds",
            "From fire time to the handler's first line",
            one_job,
            buckets=LATENESS_SECONDS_BUCKETS,
            registry=self.registry,
        )
        self.ticks_missed = Counter("bon_ticks_missed", "Ticks recorded as missed", one_job, registry=self.registry)
        self.ticks_unaccounted = Gauge(
            "bon_ticks_unaccounted", "Ticks that are due and not in the ledger", one_job, registry=self.registry
        )
        self.queue_depth = Gauge(
            "bon_queue_depth",
            "Runs that have not ended, or wait for a person",
            [*one_job, "state"],
            registry=self.registry,
        )
        self.queue_oldest_age = Gauge(
            "bon_queue_oldest_age_seconds",
            "How long the run that waits longest has been due",
            one_job,
            registry=self.registry,
        )
        self.rescued = Counter(
            "bon_runs_rescued",
            "Runs delivered again for want of a worker",
            one_job,
            registry=self.registry,
        )
        self.fenced = Counter(
            "bon_fenced_commits",
            "Commits refused to an attempt without its run",
            one_job,
            registry=self.registry,
        )
        self._email_sent = Counter(
            "email_sent", "Letters tried, by what became of them", ["status"], registry=self.registry
        )
        self._email_duration = Histogram(
            "email_send_duration_seconds",
            "Time of one letter's conversation with the mail server, and of recording its end",
            buckets=LETTER_SECONDS_BUCKETS,
            registry=self.registry,
        )
        self.email_unknown = Gauge(
            "email_unknown",
            "Letters of the last seven days that may or may not have arrived",
            registry=self.registry,
        )
        self.pool_connections = Gauge(
            "db_pool_connections", "Connections of the pool", ["state"], registry=self.registry
        )
        self.check_status = Gauge(
            "health_check_status", "1 when the dependency is up", ["dependency"], registry=self.registry
        )
        self.check_duration = Histogram(
            "health_check_duration_seconds",
            "Time of a dependency's check",
            ["dependency"],
            buckets=PROBE_SECONDS_BUCKETS,
            registry=self.registry,
        )
        self.loop_lag = Histogram(
            "event_loop_lag_seconds",
            "How late the event loop wakes a sleeper",
            buckets=LAG_SECONDS_BUCKETS,
            registry=self.registry,
        )

        self._shaam_requests = Counter(
            "shaam_requests", "Answers of the tax authority, by what they mean", ["result"], registry=self.registry
        )
        self._shaam_duration = Histogram(
            "shaam_request_duration_seconds",
            "From a request to its answer or time-out",
            buckets=ANSWER_SECONDS_BUCKETS,
            registry=self.registry,
        )
        self.shaam_min_ttl = Gauge(
            "shaam_token_min_ttl_seconds",
            "Until the first access token expires of an active business that needs no consent",
            registry=self.registry,
        )
        self.shaam_needs_reauth = Gauge(
            "shaam_needs_reauth", "Active businesses whose owner must consent again", registry=self.registry
        )
        self.shaam_failing = Gauge(
            "shaam_failing", "Active businesses whose last refresh failed", registry=self.registry
        )

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
        for (job, state), count in depths.items():
            self.queue_depth.labels(job, state).set(count)
        for job, age in ages.items():
            self.queue_oldest_age.labels(job).set(age)
