"""Figures of a server for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ldm.server.jobs import DONE, Event, ServerJob
from ldm.server.service import Service

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 300, 600)


class EngineCollector(Collector):
    """The present state of a service's engine."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[Metric]:
        """The figures, each with its meaning."""
        engine, counts = self.service.engine, self.service.engine.counts
        for name, text, value in (
            ("ldm_waiting_images", "Images that wait.", len(engine.waiting)),
            ("ldm_running_images", "Images that are worked on.", sum(len(piece.rows) for piece in engine.running)),
            ("ldm_capacity_pixels", "Pixels of latents that are worked on at most.", engine.most),
            ("ldm_running_pixels", "Pixels of latents that are worked on.", sum(p.pixels for p in engine.running)),
        ):
            yield GaugeMetricFamily(name, text, value)
        for name, text, total in (
            ("ldm_unet_calls", "Calls of U-Nets.", counts.calls),
            ("ldm_steps", "Steps of images made in these calls; divided by them, the fill of batches.", counts.steps),
            ("ldm_images", "Images made.", counts.images),
            ("ldm_busy_seconds", "Seconds in which the engine worked.", counts.busy),
        ):
            yield CounterMetricFamily(name, text, total)


class Metrics:
    """The figures of a service, and the times of its jobs."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(service))
        self.jobs = Counter("ldm_jobs", "Jobs that are over, by their state.", ["state"], registry=self.registry)
        self.wait = Histogram("ldm_wait_seconds", "Time of jobs in the queue.", buckets=SECONDS, registry=self.registry)
        self.run = Histogram("ldm_run_seconds", "Time from a job's start to its end.", buckets=SECONDS,
                             registry=self.registry)  # fmt: skip
        service.watchers.append(self.note)

    def note(self, job: ServerJob, event: Event) -> None:
        """Note that a job is over, and the times of one that is done."""
        if not event.last:
            return
        self.jobs.labels(job.state).inc()
        if job.state == DONE:
            waited, ran = job.seconds
            self.wait.observe(waited)
            self.run.observe(ran)

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self.registry)
