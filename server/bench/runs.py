"""A run of a plan, and the runs of a ramp."""

from dataclasses import replace
from typing import Any, NamedTuple

from server.bench.cache_state import CacheState
from server.bench.clients.run import run_load
from server.bench.load import Load, Measured
from server.bench.plan import Plan
from server.bench.report.progress import LiveProgress, say
from server.bench.report.units import three_digits
from server.bench.results.figures import build_result
from server.bench.results.objective import Objective
from server.bench.results.ramp import Probe, Ramp, judge_probe
from server.bench.results.result import Settings
from server.bench.warming import warm
from server.bench.workload import Workload
from server.bench.workloads import build
from server.bench.workloads.base import BuiltWorkload
from server.config.base import ConfigError

_SIDE_WORKLOAD, _SIDE_TOKENS = "zipf:prompts=1", 16
"""The requests of `--probe`: one small one again and again, a hit wherever answers are cached."""
_FIRST_RATE = 1.0


class Finished(NamedTuple):
    """A run's result, and what it was made of."""

    result: dict[str, Any]
    measured: Measured


def build_workload(plan: Plan, state: CacheState) -> BuiltWorkload[Any]:
    """Return the plan's workload, for the state of the cache that it wants.

    Raises:
        ConfigError: it is wrong, or has no times of its own although the load wants them.
    """
    workload = build(plan.workload, state.common(plan.common))
    if plan.load.arrivals == "trace" and workload.times(1) is None:
        should = "trace is for workloads that have times of their own"
        raise ConfigError([f"--arrivals: {should}; {plan.workload} has none"])
    return workload


def run_once(plan: Plan, workload: BuiltWorkload[Any], state: CacheState) -> Finished:
    """Warm the cache if that is wanted, run the plan's load, and return the result."""
    warm(state, workload, plan.target, plan.load.timeout_s)
    measured = _run(plan, state, workload, plan.load)
    return Finished(build_result(measured, _settings(plan, workload, plan.load)), measured)


def find_knee(
    plan: Plan, workload: BuiltWorkload[Any], objective: Objective, state: CacheState
) -> Finished:
    """Search the highest rate at which an objective holds, until Ctrl-C.

    Returns the run at that rate, or the last one where none holds, with `ramp` in its result. A
    probe that was interrupted says nothing of its rate.
    """
    ramp, best, interrupted = Ramp(plan.load.rate or _FIRST_RATE), None, False
    while not interrupted and (rate := ramp.next_rate()) is not None:
        common = state.common(plan.common, len(ramp.probes))
        probed = workload.with_common(common)
        if not ramp.probes:
            warm(state, probed, plan.target, plan.load.timeout_s)
        probe, finished = _probe(plan, probed, objective, state, rate)
        interrupted = finished.measured.interrupted
        if not interrupted:
            ramp.tell(probe)
            verdict = "holds" if probe.passed else "may hold" if probe.too_few else "fails"
            say(f"{three_digits(rate)} sessions/s {verdict}: {probe.reason}")
        # Each rate that passes is higher than those before that did.
        if not any(each.passed for each in ramp.probes) or (probe.passed and not interrupted):
            best = finished
    if best is None:
        raise ValueError("a ramp begins with a rate")
    result = {**best.result, "ramp": ramp.result(), "interrupted": interrupted}
    return Finished(result, best.measured)


def _probe(
    plan: Plan,
    workload: BuiltWorkload[Any],
    objective: Objective,
    state: CacheState,
    rate: float,
) -> tuple[Probe, Finished]:
    load = replace(plan.load, rate=rate)
    measured = _run(plan, state, workload, load, f"{three_digits(rate)}/s:")
    settings = _settings(plan, workload, load)
    probe = judge_probe(rate, measured, settings, objective)
    return probe, Finished(build_result(measured, settings), measured)


def _run(plan: Plan, state: CacheState, workload: Workload, load: Load, name: str = "") -> Measured:
    side = None
    if load.probe:
        common = replace(state.common(plan.common), max_tokens=_SIDE_TOKENS)
        side = build(_SIDE_WORKLOAD, common)
        # Else all would wait with the first one, which is a miss.
        warm(replace(state, mode="warm"), side, plan.target, load.timeout_s)
    progress = LiveProgress(name)
    try:
        return run_load(plan.target, workload, load, progress, side)
    finally:
        progress.close()


def _settings(plan: Plan, workload: BuiltWorkload[Any], load: Load) -> Settings:
    return Settings(
        workload=workload.name,
        digest=workload.digest(),
        seed=plan.common.seed,
        cache=plan.cache,
        load=load,
        target=plan.target,
        model=plan.common.model,
        path=workload.session(0).steps[0].path,
        objective=plan.objective,
    )
