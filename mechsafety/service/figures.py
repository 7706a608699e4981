"""The figures of ``/metrics``, in the text format of Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from mechsafety.service.worker import Worker

# others are counted together, because a client chooses the paths
PATHS = ("/generate", "/score", "/healthz", "/metrics", "/docs", "/openapi.json")
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Figures:
    """Counts of one app, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "mechsafety_requests", "Requests by path and status", ["path", "status"], registry=self.registry
        )
        self._seconds = Histogram(
            "mechsafety_request_seconds", "Seconds per request", ["path"], buckets=SECONDS, registry=self.registry
        )
        self._replies = Counter("mechsafety_replies", "Replies by how they ended", ["finish"], registry=self.registry)
        self._tokens = Counter("mechsafety_generated_tokens", "Tokens generated", registry=self.registry)
        self._waiting = Gauge("mechsafety_waiting", "Requests that wait for the model", registry=self.registry)
        self._running = Gauge("mechsafety_running", "Requests that run on the model", registry=self.registry)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def follow(self, worker: Worker) -> None:
        """Show a worker's queue."""
        self._waiting.set_function(lambda: worker.waiting)
        self._running.set_function(lambda: worker.running)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a request."""
        known = path if path in PATHS else "other"
        self._requests.labels(known, str(status)).inc()
        self._seconds.labels(known).observe(seconds)

    def reply(self, finish: str, tokens: int) -> None:
        """Count a reply."""
        self._replies.labels(finish).inc()
        self._tokens.inc(tokens)

    def text(self) -> tuple[bytes, str]:
        """The figures now, and their content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
