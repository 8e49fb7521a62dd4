"""Where a process reports what it does, beside its metrics: logs, the trace, the spans."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from server.audit.acts import Audit, open_audit
from server.config.schema import Config
from server.telemetry.logs import LogStream, configure
from server.telemetry.trace_log import TraceLog
from server.web.request import Endpoint, Traced


@dataclass(frozen=True, slots=True)
class Outputs:
    """The outputs of one process."""

    log: LogStream
    audit: Audit
    trace: TraceLog | None
    traced: Traced
    """Adds spans to requests, if they are traced."""

    def close(self) -> None:
        """Write what is queued."""
        if self.trace is not None:
            self.trace.close()
        self.audit.close()
        self.log.close()


@contextmanager
def open_outputs(config: Config) -> Iterator[Outputs]:
    """Set up the logs of this process, the trace, and the spans; write what is queued at the end.

    Raises:
        ConfigError: the file of the trace or of the audit log can't be written.
    """
    with ExitStack() as stack:
        log = configure(config.log)
        stack.callback(log.close)
        audit = stack.enter_context(open_audit(config.log.audit, checks=True))
        trace: TraceLog | None = None
        traced: Traced = _untraced
        if config.log.trace is not None:
            trace = TraceLog(config.log.trace, config.log.trace_max_bytes)
            stack.callback(trace.close)
        if config.tracing is not None:
            # Imported here, since it needs an extra.
            from server.web.tracing import Tracing

            tracing = Tracing(config.tracing)
            stack.callback(tracing.close)
            traced = tracing.traced
        yield Outputs(log, audit, trace, traced)


def _untraced(endpoint: Endpoint, _: str | None = None) -> Endpoint:
    return endpoint
