"""The command `tierserve bench`: the road of a run, from its options to its exit status."""

import argparse
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from server.config.base import ConfigError

if TYPE_CHECKING:
    from server.bench.plan import Plan
    from server.bench.runs import Finished

_NEEDED = ("httptools", "matplotlib", "numpy")
_FAILED, _INTERRUPTED = 1, 130
"""Exit statuses; the second is what shells give a program that SIGINT has ended."""


def run(options: argparse.Namespace) -> int:
    """Run the command; returns its exit status.

    Raises:
        ConfigError: an option is wrong, the target can't be reached, or a file can't be used.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ConfigError([f"bench: needs {' and '.join(missing)}: install tierserve[bench]"])
    match options.what:
        case ["schema"]:
            _check_alone(options)
            from server.bench.results.result_schema import as_json_schema

            print(as_json_schema())
            return 0
        case ["compare", *files]:
            return _compare(files, options)
        case _:
            return _load(options)


def _compare(files: list[str], options: argparse.Namespace) -> int:
    from server.bench.results.compare import as_text, compare, fails
    from server.bench.results.result import read_run

    _check_alone(options, "fail_if", "json")
    if len(files) != 2:
        raise ConfigError(["compare: should have two results, A and B: DIR or result.json"])
    first, second = (read_run(Path(file)) for file in files)
    found = compare(first, second, options.fail_if or ())
    print(_as_json(found) if options.json else as_text(found))
    return _FAILED * fails(found)


def _check_alone(options: argparse.Namespace, *names: str) -> None:
    """Raise options that belong to a run, and not to `compare` or `schema`."""
    known = {"command", "what", *names}
    given = [name for name, value in vars(options).items() if value not in (None, False)]
    if wrong := [name for name in given if name not in known]:
        listed = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
        raise ConfigError([f"{listed}: should be left out; {options.what[0]} sends no requests"])


def _load(options: argparse.Namespace) -> int:
    from server.bench.clients.run import ClientError
    from server.bench.plan import make_plan
    from server.bench.report.progress import say
    from server.bench.runs import build_workload, find_knee, run_once
    from server.bench.target import find_model, is_ready
    from server.bench.warming import entries_removed, state_for

    plan = make_plan(options)
    plan = plan.of_model(find_model(plan.target, plan.common.model or None))
    state = state_for(plan.target, plan.cache)
    workload = build_workload(plan, state)
    if not is_ready(plan.target):
        say("the target isn't ready: requests that miss will fail")
    try:
        with entries_removed(state, plan.target, plan.admin):
            if plan.ramp and plan.objective is not None:
                finished = find_knee(plan, workload, plan.objective, state)
            else:
                finished = run_once(plan, workload, state)
            try:
                _write(plan, finished)
            finally:
                # What was measured is shown even where it can't be written.
                _show(plan, finished)
    except ClientError as exc:
        say(f"the run failed: {exc}")
        return _FAILED
    return _status(finished)


def _write(plan: "Plan", finished: "Finished") -> None:
    if plan.out is None:
        return
    from server.bench.report.page import write_page
    from server.bench.report.progress import say
    from server.bench.results.formats import as_benchmark_reports, as_vllm
    from server.bench.results.result import RECORDS, RESULT, write_json, write_records

    result, measured = finished.result, finished.measured
    write_json(result, plan.out / RESULT)
    write_records(measured.records, plan.out / RECORDS)
    write_page(result, measured.records, measured.began, plan.out / "report.html")
    if "vllm" in plan.formats:
        write_json(as_vllm(result, measured.records), plan.out / "vllm.json")
    if "br" in plan.formats:
        for name, report in as_benchmark_reports(result).items():
            write_json(report, plan.out / f"benchmark_report_{name}.json")
    say(f"written to {plan.out}")


def _show(plan: "Plan", finished: "Finished") -> None:
    from server.bench.report.table import as_text

    print(_as_json(finished.result) if plan.as_json else as_text(finished.result), flush=True)


def _status(finished: "Finished") -> int:
    result = finished.result
    if result["interrupted"]:
        return _INTERRUPTED
    if (ramp := result.get("ramp")) is not None:
        return _FAILED * (ramp["rate"] is None)
    goodput = result["goodput"]
    return _FAILED * (not result["valid"] or (goodput is not None and not goodput["holds"]))


def _as_json(content: Mapping[str, Any]) -> str:
    return orjson.dumps(content, option=orjson.OPT_INDENT_2).decode()
