"""
Every metric the service exports, in one place. Names are `interface.md`'s.

The label is `job_name`, because Prometheus renames a label `job`. No label ever
holds a business, a person or an address.
"""

import platform
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.samples import Sample

from bon_scheduler.jobs import Counts

__all__ = ["Metrics", "OldNames"]

RUN_SECONDS = (0.01, 0.05, 0.1, 0.5, 1, 5, 15, 60, 180, 600)
LATENESS_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 5, 15, 60, 300, 3600)
LETTER_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 30, 60)
PROBE_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 3)
ANSWER_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
LAG_SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5)
PREFIX = "bon_"
RUN_STATES = ("succeeded", "partial", "retrying", "dead", "held", "cancelled", "lost")
LETTER_STATES = ("sent", "logged", "refused", "unknown", "deferred")
ANSWERS = ("refreshed", "needs_reauth", "misconfigured", "transient", "ambiguous")


class Known:
    """A gauge without labels that is absent while its value is not known."""

    def __init__(self, name: str, text: str, *, registry: CollectorRegistry) -> None:
        self.name = name
        self._text = text
        self._value: float | None = None
        registry.register(self)

    def set(self, value: float | None) -> None:
        """Show the value; None: it is not known."""
        self._value = None if value is None else float(value)

    def describe(self) -> Iterator[Metric]:
        """Return the metric without its value."""
        yield GaugeMetricFamily(self.name, self._text)

    def collect(self) -> Iterator[Metric]:
        """Return the metric with its value, if that is known."""
        yield GaugeMetricFamily(self.name, self._text, value=self._value)


class OldNames:
    """What had no prefix before 0.1.0, by its old names as well; they go with the release after."""

    def __init__(self, renamed: Iterable[Counter | Gauge | Histogram | Known], *, registry: CollectorRegistry) -> None:
        self._renamed = list(renamed)
        registry.register(self)

    def describe(self) -> Iterator[Metric]:
        """Return the metrics."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """Return the metrics as they are now."""
        for metric in (each for renamed in self._renamed for each in renamed.collect()):
            name = metric.name.removeprefix(PREFIX)
            old = Metric(name, f"Old name of {metric.name}", metric.type)
            old.samples = [Sample(sample.name.removeprefix(PREFIX), *sample[1:]) for sample in metric.samples]
            yield old


class Metrics:
    """
    The metrics of one process, in a registry of their own.

    Counters of `jobs` are there from the beginning, at 0, so that the first increase is seen as one.
    """

    def __init__(self, jobs: Iterable[str] = (), *, version: str = "") -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        known = partial(Known, registry=self.registry)
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        one_job = ["job_name"]
        self._runs = counter("bon_job_runs", "Runs that ended", [*one_job, "state"])
        self._duration = histogram("bon_job_duration_seconds", "Time of one attempt", one_job, buckets=RUN_SECONDS)
        self._rows = counter("bon_job_rows", "What runs did, by their counts", [*one_job, "count"])
        text = "When a run of the job last did what it is for: the latest in the ledger at start, then on this replica"
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

        self._email_sent = counter("bon_email_sent", "Letters tried, by what became of them", ["status"])
        text = "Time of one letter's conversation with the mail server, and of recording its end"
        self._email_duration = histogram("bon_email_send_duration_seconds", text, buckets=LETTER_SECONDS)
        text = "Letters of the last seven days that may or may not have arrived"
        self.email_unknown = known("bon_email_unknown", text)

        self.pool_connections = gauge("bon_db_pool_connections", "Connections of the pool", ["state"])
        self.check_status = gauge(
            "bon_health_check_status", "1 when the dependency is up, absent when it is off or unknown", ["dependency"]
        )
        text = "Time of a dependency's check"
        self.check_duration = histogram(
            "bon_health_check_duration_seconds", text, ["dependency"], buckets=PROBE_SECONDS
        )
        text = "How late the event loop wakes a sleeper"
        self.loop_lag = histogram("bon_event_loop_lag_seconds", text, buckets=LAG_SECONDS)

        text = "Answers of the tax authority, by what they mean"
        self._shaam_requests = counter("bon_shaam_requests", text, ["result"])
        text = "From a request to its answer or time-out"
        self._shaam_duration = histogram("bon_shaam_request_duration_seconds", text, buckets=ANSWER_SECONDS)
        text = "Until the first access token expires of an active business that needs no consent"
        self.shaam_min_ttl = known("bon_shaam_token_min_ttl_seconds", text)
        self.shaam_needs_reauth = known("bon_shaam_needs_reauth", "Active businesses whose owner must consent again")
        self.shaam_failing = known("bon_shaam_failing", "Active businesses whose last refresh failed")
        text = "1 while owners are not asked to consent again: too many grants are spent for it to be their doing"
        self.consent_braked = known("bon_consent_braked", text)
        self._keep_old_names()
        self._begin_at_zero(jobs)
        self._name_build(version)

    def _keep_old_names(self) -> None:
        renamed = (
            *(self._email_sent, self._email_duration, self.email_unknown, self.pool_connections),
            *(self.check_status, self.check_duration, self.loop_lag, self._shaam_requests, self._shaam_duration),
            *(self.shaam_min_ttl, self.shaam_needs_reauth, self.shaam_failing),
        )
        OldNames(renamed, registry=self.registry)

    def _name_build(self, version: str) -> None:
        text, labels = "Which version this is, and of which Python", ["version", "python"]
        build = Gauge("bon_build_info", text, labels, registry=self.registry)
        build.labels(version, platform.python_version()).set(1)

    def _begin_at_zero(self, jobs: Iterable[str]) -> None:
        for job in jobs:
            for state in RUN_STATES:
                self._runs.labels(job, state)
            for metric in (self._duration, self.tick_lateness, self.ticks_missed, self.rescued, self.fenced):
                metric.labels(job)
        for status in LETTER_STATES:
            self._email_sent.labels(status)
        for answer in ANSWERS:
            self._shaam_requests.labels(answer)

    def shaam_answered(self, result: str, seconds: float) -> None:
        """Account for one request to the tax authority."""
        self._shaam_requests.labels(result).inc()
        self._shaam_duration.observe(seconds)

    def attempt_ended(self, job: str, state: str, seconds: float, counts: Counts) -> None:
        """Account for one attempt: its state, its time in seconds and its counts."""
        self._runs.labels(job, state).inc()
        self._duration.labels(job).observe(seconds)
        for name, count in counts.items():
            self._rows.labels(job, name).inc(count)

    def succeeded(self, job: str, now: datetime) -> None:
        """Note that a run of the job did what it is for."""
        self._last_success.labels(job).set(now.timestamp())

    def letter_tried(self, status: str, seconds: float) -> None:
        """Account for one letter: what became of it, and the seconds it took; one only logged took none."""
        self._email_sent.labels(status).inc()
        if status != "logged":
            self._email_duration.observe(seconds)

    def show_status(self, dependency: str, well: bool | None) -> None:
        """Show whether a dependency is up; None: it is off, or not known."""
        if well is not None:
            self.check_status.labels(dependency).set(well)
        elif (dependency,) in self.check_status._metrics:  # noqa: SLF001 - `remove` raises or not, by version
            self.check_status.remove(dependency)

    def forget(self, what: str) -> None:
        """Show nothing of what the database says of `what` (queue, ticks, mail or shaam): it cannot be asked."""
        match what:
            case "queue":
                self.set_queue({}, {})
            case "ticks":
                self.ticks_unaccounted.clear()
            case "mail":
                self.email_unknown.set(None)
                self.show_status("mail", None)
            case "shaam":
                for known in (self.shaam_min_ttl, self.shaam_needs_reauth, self.shaam_failing, self.consent_braked):
                    known.set(None)

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
