"""Metrics of a server for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

__all__ = ["Metrics"]

Reader = Callable[[], Mapping[str, float]]


class Metrics:
    """The metrics of one server, in their own registry. Any thread may count."""

    def __init__(self, read: Reader, jobs: Reader) -> None:
        """`read`: returns the current numbers by name. `jobs`: returns the number of jobs by state."""
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "higen_http_requests", "HTTP requests answered.", ("method", "route", "status"), registry=self._registry
        )
        self.ended = Counter("higen_jobs_ended", "Jobs that have ended.", ("outcome",), registry=self._registry)
        self.frames = Counter("higen_frames", "Frames of finished videos.", registry=self._registry)
        self.seconds = Histogram(
            "higen_job_seconds",
            "Seconds from the start of a job to its end.",
            buckets=(0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800),
            registry=self._registry,
        )
        self._registry.register(_Now(read, jobs))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format 0.0.4."""
        return generate_latest(self._registry)


class _Now(Collector):
    """Metrics that are read at each request for metrics. Names that end with _total are counters, others gauges."""

    def __init__(self, read: Reader, jobs: Reader) -> None:
        self._read = read
        self._jobs = jobs

    def collect(self) -> Iterable[Metric]:
        """The metrics; prometheus_client calls this."""
        states = GaugeMetricFamily("higen_jobs", "Jobs by state.", labels=["state"])
        for state, count in self._jobs().items():
            states.add_metric([state], count)
        yield states
        for name, value in self._read().items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield kind(f"higen_{name}", f"{name.replace('_', ' ').capitalize()}.", value=value)
