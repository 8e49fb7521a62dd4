"""Finished requests: the one place from which metrics, history, access log and traces are fed."""

import time

from server.protocol.usage import output_tokens
from server.telemetry.history import History
from server.telemetry.logs import AccessLog
from server.telemetry.metrics import Metrics
from server.telemetry.served import Served
from server.telemetry.spans import current
from server.telemetry.trace_log import TraceLog

# nginx's status for a client that left; it is only recorded, never sent.
CLIENT_GONE = 499
# Outcomes of requests that a tier has answered, or would have.
_LOOKED_UP = frozenset({"collapsed", "hit", "miss", "stale"})
_ENGINE = "engine"


class FinishedRequests:
    """Records requests that have ended.

    Args:
        metrics: count every request.
        access: has a line for every request.
        trace: has a line for every request whose answer may be kept; `None` without a trace.
        traces_spans: whether requests have spans.
    """

    def __init__(
        self, metrics: Metrics, access: AccessLog, trace: TraceLog | None, *, traces_spans: bool
    ) -> None:
        self._metrics, self._access, self._trace = metrics, access, trace
        self._traces_spans = traces_spans
        self.history = History()
        """Of all requests."""
        self._tenants: dict[str, History] = {}

    def history_of(self, tenant: str) -> History:
        """Return the history of a tenant that has a key of ours."""
        return self._tenants.get(tenant) or History()

    def add(
        self,
        method: str,
        path: str,
        request_id: str,
        tenant: str | None,
        status: int,
        seconds: float,
        served: Served,
    ) -> None:
        """Note a request that has just ended; `tenant` is its name, if it has a key of ours."""
        tier, outcome, model, key, answer, saved_s = served
        if status == CLIENT_GONE and outcome != "error":
            outcome = "aborted"
        tokens = 0 if answer is None else output_tokens(answer) or 0
        self._metrics.observe(model, tier, outcome, seconds, tokens, saved_s)
        now = time.time()
        if outcome in _LOOKED_UP:
            saved_tokens = 0 if tier == _ENGINE else tokens
            self.history.add(now, tier, saved_tokens, saved_s)
            if tenant is not None:
                history = self._tenants.get(tenant)
                if history is None:
                    history = self._tenants[tenant] = History()
                history.add(now, tier, saved_tokens, saved_s)
        self._access.add(now, method, path, status, request_id, tier, outcome, seconds)
        if self._trace is not None and answer is not None:
            self._trace.add(now, key, model, answer, (tier, outcome))
        if self._traces_spans and (span := current.get()) is not None:
            span.set_served(served)
