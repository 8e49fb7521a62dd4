"""Finished requests, and prompts that engines have answered.

This is the one place from which metrics, history, access log, prefixes and traces are fed.
"""

import asyncio
import time

from server.protocol.request import ParsedRequest
from server.protocol.usage import output_tokens
from server.telemetry.history import History
from server.telemetry.logs import Access, AccessLog
from server.telemetry.metrics import Metrics
from server.telemetry.prefixes import Prefixes
from server.telemetry.served import Served
from server.telemetry.spans import current
from server.telemetry.trace_log import TraceLog

# nginx's status for a client that left; it is only recorded, never sent.
CLIENT_GONE = 499
# Outcomes of requests that a tier has answered, or would have.
_LOOKED_UP = frozenset({"collapsed", "hit", "miss", "stale"})
_ENGINE = "engine"
_FLUSH_S = 0.2
_BATCH = 1024


class _Alike:
    """Requests of the same labels and tenant that have been noted and not counted yet."""

    __slots__ = ("saved_s", "seconds", "tokens")

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.tokens, self.saved_s = 0, 0.0


class FinishedRequests:
    """Records requests that have ended, in batches after their answers.

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
        self._noted: dict[tuple[str, str, str, str | None], _Alike] = {}
        self._count = 0
        self._lines: list[Access] = []
        self._history = History()
        self._tenants: dict[str, History] = {}
        metrics.collect_after(self.flush)

    @property
    def history(self) -> History:
        """The history of all requests."""
        self.flush()
        return self._history

    def history_of(self, tenant: str) -> History:
        """Return the history of a tenant that has a key of ours."""
        self.flush()
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
        tier, outcome, model, key, answer, saved_s, tokens, asked = served
        if status == CLIENT_GONE and outcome != "error":
            outcome = "aborted"
        if tokens is None:
            tokens = 0 if answer is None else output_tokens(answer) or 0
        if self._trace is not None and answer is not None:
            self._trace.add(time.time(), key, model, answer, (tier, outcome))
        if self._traces_spans and (span := current.get()) is not None:
            span.set_served(served)
        fallback = None
        if asked:
            fallback = asked, model
            self._metrics.count_fallback(fallback)
        if self._access.enabled:
            line = (time.time(), method, path, status, request_id, tier, outcome, seconds, fallback)
            self._lines.append(line)
        alike = self._noted.get(of := (model, tier, outcome, tenant))
        if alike is None:
            if not self._noted:
                asyncio.get_running_loop().call_later(_FLUSH_S, self.flush)
            alike = self._noted[of] = _Alike()
        # Numbers, not a record of each: a hit pays for what it allocates.
        alike.seconds.append(seconds)
        alike.tokens += tokens
        alike.saved_s += saved_s
        self._count += 1
        if self._count >= _BATCH:
            self.flush()

    def flush(self) -> None:
        """Count and log what has been noted."""
        if not self._noted:
            return
        noted, self._noted, self._count = self._noted, {}, 0
        if self._lines:
            lines, self._lines = self._lines, []
            self._access.write(lines)
        now = time.time()
        for (model, tier, outcome, tenant), alike in noted.items():
            labels = (model, tier, outcome)
            self._metrics.observe(labels, alike.seconds, alike.tokens, alike.saved_s)
            if outcome in _LOOKED_UP:
                saved_tokens = 0 if tier == _ENGINE else alike.tokens
                saved = (now, tier, saved_tokens, alike.saved_s, len(alike.seconds))
                self._history.add(*saved)
                if tenant is not None:
                    self._tenants.setdefault(tenant, History()).add(*saved)


class EnginePrompts:
    """Notes prompts after their answers, so a hit costs nothing.

    Args:
        prefixes: counts their beginnings.
        trace: has a line for each; `None` without a trace.
    """

    def __init__(self, prefixes: Prefixes, trace: TraceLog | None) -> None:
        self._prefixes, self._trace = prefixes, trace

    def note(self, request: ParsedRequest, counts: bytes, *, bypassed: bool) -> None:
        """Note a request that an engine has answered.

        Args:
            request: what was asked.
            counts: the end of the answer, which may have the token counts.
            bypassed: whether the answer may not be kept.
        """
        self._prefixes.note(request, counts)
        if self._trace is not None:
            self._trace.add_prompt(time.time(), request, counts, bypassed=bypassed)
