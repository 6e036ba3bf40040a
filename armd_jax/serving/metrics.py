"""What a server counts and measures, in the form of Prometheus."""

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class Metrics:
    """The figures of one server; two servers of a process share none.

    requests: answered requests, by path and HTTP status; 499 if the client went away before the answer was whole.
    request_seconds: from the arrival of a request to the end of its answer, by path. first_token_seconds: from the
    arrival of a text in the queue to the first network call that made a token of it. batch_rows: texts per batch.
    tokens: given by requests and read ("prompt"), or drawn ("generated"). calls: network calls that drew tokens.
    """

    def __init__(self, waiting: Callable[[], int], active: Callable[[], int]) -> None:
        """waiting, active: give the number of texts in the queue, and of those that are being written."""
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("armd_requests", "Answered requests.", ["path", "status"], registry=registry)
        self.request_seconds = Histogram(
            "armd_request_seconds", "Seconds until an answer is whole.", ["path"], buckets=_SECONDS, registry=registry
        )
        self.first_token_seconds = Histogram(
            "armd_first_token_seconds", "Seconds until a text begins.", buckets=_SECONDS, registry=registry
        )
        self.batch_rows = Histogram("armd_batch_rows", "Texts per batch.", buckets=_ROWS, registry=registry)
        self.tokens = Counter("armd_tokens", "Tokens that were read and drawn.", ["kind"], registry=registry)
        self.calls = Counter("armd_network_calls", "Network calls that drew tokens.", registry=registry)
        queue = Gauge("armd_queue_length", "Texts that wait.", registry=registry)
        queue.set_function(waiting)
        rows = Gauge("armd_active_rows", "Texts that are being written.", registry=registry)
        rows.set_function(active)

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)
