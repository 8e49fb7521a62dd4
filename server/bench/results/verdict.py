"""Whether a run measured the server, and not the client or too little."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.bench.load import Load, Measured
from server.bench.records import ClientLoad, Failure, Floats, Records
from server.bench.results.latencies import latencies
from server.bench.results.statistics import FEW

_QUANTILES = {"p50": 0.5, "p99": 0.99}
_FLOORS_S = {"p50": 0.002, "p99": 0.02}
"""Lateness that is always allowed: event loops count in milliseconds, and a program that shares its
cores with others waits now and then for some slices of theirs. A client that can't keep up is late
with more than half."""
_OF_LATENCY = 0.1
"""Lateness that a latency allows, as a share of it: a request sent late by a tenth of the fastest
outcome's median shifts what was measured by at most that."""
_BUSY = 0.9
"""Above this share of a core, requests wait for the client as at a server of that load: for
about ten times as long as sending one takes."""
_ACHIEVED = 0.95
_WAITED = 0.01
"""So many requests may wait for a connection, or be cut by the end: a p99 doesn't see them."""
_FAILED = 0.5
"""Above this share of failures, figures describe the few requests that were let through."""
_FEWEST = 2 * FEW
"""Requests below which not even a median is known."""
_OF_CLIENT = ("lateness_p50_s", "lateness_p99_s", "loop_lag_p50_s", "loop_lag_p99_s", "client_cpu")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that has to hold for a run to be valid.

    Attributes:
        check: its name. value, limit: what was found, and the bound; None where there is none.
        text: a sentence for people; where `ok` is false, it says what to do.
    """

    check: str
    value: float | None
    limit: float | None
    ok: bool
    text: str

    def as_json(self) -> dict[str, Any]:
        """Return it as it stands in a result."""
        return asdict(self)


def judge(measured: Measured, load: Load) -> list[Check]:
    """Return all checks of a run; it is valid if each is ok."""
    records = measured.records.where(~measured.records.probe)
    limits_s = lateness_limits_s(records)
    checks = [
        *_of_sending(records, load, limits_s, _advice(measured.clients)),
        *_of_clients(measured.clients, limits_s),
    ]
    if load.users is None:
        checks.append(_of_rate(records, measured))
    else:
        text = (
            "users wait for their answers before they ask again (closed loop), so a slow server "
            "gets fewer requests, and latencies can't be corrected for those it didn't get"
        )
        checks.append(Check("closed_loop", None, None, True, text))
    checks += [_of_ends(records), _of_failures(records), _of_number(records)]
    return checks


def client_limit(checks: list[Check]) -> Check | None:
    """Return the failed check that says that the client was the limit, and not the server.

    A server that answers too slowly uses up all connections, which delays sending as well.
    """
    failed = {check.check: check for check in checks if not check.ok}
    limits = [failed[name] for name in _OF_CLIENT if name in failed]
    if "achieved_rate" in failed and "connections" not in failed:
        limits.append(failed["achieved_rate"])
    return limits[0] if limits else None


def lateness_limits_s(records: Records) -> dict[str, float]:
    """Return how late percentiles may be: a tenth of the fastest outcome's median TTFT, or a floor.

    Outcomes of fewer than 20 requests don't set it.
    """
    sample = latencies(records, open_loop=False)["ttft_s"]
    outcomes = records.outcome[sample.rows]
    medians = [
        float(np.median(of_one))
        for number in np.unique(outcomes)
        if len(of_one := sample.values[outcomes == number]) >= _FEWEST
    ]
    allowed = _OF_LATENCY * min(medians, default=0.0)
    return {name: max(floor, allowed) for name, floor in _FLOORS_S.items()}


def _of_sending(
    records: Records, load: Load, limits_s: Mapping[str, float], advice: str
) -> list[Check]:
    """Judge how late requests were sent; those that waited for a connection apart."""
    sent = ~np.isnan(records.sent)
    waited = _waited_for_connection(records, load.connections) & sent
    late = (records.sent - records.due)[sent & ~waited]
    share = float(waited.mean()) if len(waited) else 0.0
    checks = []
    for name, at in _QUANTILES.items():
        by = float(np.quantile(late, at)) if len(late) else 0.0
        good = f"{at:.0%} were sent within {_ms(by)} of when due"
        bad = f"{1 - at:.0%} were sent more than {_ms(by)} late: {advice}"
        checks.append(_check(f"lateness_{name}_s", by, limits_s[name], good, bad))
    return [
        *checks,
        _check("connections", share, _WAITED, f"{share:.1%} waited for a free connection",
               f"{share:.1%} waited for a free connection: use more --connections or "
               "--processes, or a lower rate"),
    ]  # fmt: skip


def _waited_for_connection(records: Records, connections: int) -> NDArray[np.bool_]:
    """Return which requests were due while their client had as many as it has connections."""
    full = np.zeros(len(records), dtype=np.bool_)
    for process in np.unique(records.process):
        own = records.process == process
        due = records.due[own]
        came = np.searchsorted(np.sort(due), due, side="left")
        ended = np.searchsorted(np.sort(records.end[own]), due, side="right")
        full[own] = came - ended >= connections
    return full


def _of_clients(clients: list[ClientLoad], limits_s: Mapping[str, float]) -> list[Check]:
    """Judge the event loops and processors of client processes, by the worst of them."""
    busy, checks = _busiest(clients), []
    for name, at in _QUANTILES.items():
        lags = [float(np.quantile(client.lags, at)) for client in clients if len(client.lags)]
        lag = max(lags, default=0.0)
        good = f"clients read {at:.0%} of answers within {_ms(lag)}"
        bad = (
            f"a client reads {1 - at:.0%} of answers more than {_ms(lag)} late, which latencies "
            f"contain: {_advice(clients)}"
        )
        checks.append(_check(f"loop_lag_{name}_s", lag, limits_s[name], good, bad))
    return [
        *checks,
        _check("client_cpu", busy, _BUSY, f"the busiest client used {busy:.0%} of a core",
               f"a client used {busy:.0%} of a core: {_advice(clients)}"),
    ]  # fmt: skip


def _busiest(clients: list[ClientLoad]) -> float:
    """Return the most of a core that a client used."""
    return max((each.cpu_s / each.wall_s for each in clients if each.wall_s > 0), default=0.0)


def _advice(clients: list[ClientLoad]) -> str:
    """Return what helps a client that is too slow: one that is busy, or one that has to wait."""
    if _busiest(clients) > _BUSY / 2:
        return "the client is too slow, so use more --processes, or a lower rate"
    return (
        "the client waits for a processor, so leave it one, use another machine, or a lower rate "
        "(more --processes don't help)"
    )


def _of_rate(records: Records, measured: Measured) -> Check:
    """Judge the rate at which sessions began against the one that was scheduled."""
    first = records.step == 0
    started = np.where(np.isnan(records.sent), records.end, records.sent)[first]
    took_s = max(measured.offered_s, _last(started) - measured.began)
    offered = measured.scheduled / measured.offered_s if measured.offered_s else 0.0
    rate = len(started) / took_s if took_s else 0.0
    achieved = min(rate / offered, 1.0) if offered else 1.0
    return _check(
        "achieved_rate", achieved, _ACHIEVED,
        f"{achieved:.1%} of the offered {offered:,.1f} sessions/s began",
        f"only {achieved:.1%} of the offered {offered:,.1f} sessions/s began: use more "
        "--processes or --connections, or a lower rate",
        at_least=True,
    )  # fmt: skip


def _of_ends(records: Records) -> Check:
    """Judge how many requests the end of the run cut, which are the slowest of all."""
    cut = records.failure == Failure.INTERRUPTED
    share = float(cut.mean()) if len(cut) else 0.0
    return _check(
        "interrupted", share, _WAITED, f"the run's end cut {share:.1%} of requests",
        f"the run's end cut {share:.1%} of requests, which are the slowest ones: let it end",
    )  # fmt: skip


def _of_failures(records: Records) -> Check:
    failed = (records.failure != Failure.NONE) & (records.failure != Failure.INTERRUPTED)
    share = float(failed.mean()) if len(failed) else 0.0
    return _check(
        "failed", share, _FAILED, f"{share:.1%} of requests failed",
        f"{share:.1%} of requests failed, and figures describe the rest: look at the errors",
    )  # fmt: skip


def _of_number(records: Records) -> Check:
    count = int((records.failure == Failure.NONE).sum())
    return _check(
        "requests", count, _FEWEST, f"{count:,} requests were answered",
        f"only {count:,} requests were answered, and not even a median is known below "
        f"{_FEWEST}: use a longer --duration or a higher rate, and look at the errors",
        at_least=True,
    )  # fmt: skip


def _check(
    name: str, value: float, limit: float, good: str, bad: str, *, at_least: bool = False
) -> Check:
    ok = value >= limit if at_least else value <= limit
    return Check(name, value, limit, ok, good if ok else bad)


def _last(times: Floats) -> float:
    return float(times.max()) if len(times) else 0.0


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"
