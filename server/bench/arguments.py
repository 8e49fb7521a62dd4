"""The arguments of the command `tierserve bench`.

They are apart from `commands`, so that other commands start without its imports. All are text and
None where they aren't given: `plan` says what each has to be.
"""

import argparse
from pathlib import Path

_USAGE = """tierserve bench URL [OPTION ...]
       tierserve bench compare A B [--fail-if EXPR] [--json]
       tierserve bench schema"""
_EPILOG = """\
URL is an OpenAI-compatible endpoint, such as http://127.0.0.1:8000. compare sets two results (DIR
or result.json) side by side, and schema prints the JSON Schema of results. server/bench/README.md
explains workloads, figures and file formats. Exit status: 0; 1 where the run is invalid, misses its
objective, or --fail-if holds; 2 for wrong use; 130 after Ctrl-C."""


def add_bench_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    text = "load an endpoint, and say which tier answered and how fast"
    command = commands.add_parser(
        "bench",
        help=text,
        description=text,
        usage=_USAGE,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("what", nargs="+", metavar="URL", help=argparse.SUPPRESS)
    _add_requests(command.add_argument_group("requests"))
    _add_load(command.add_argument_group("load"))
    _add_judgement(command.add_argument_group("judgement"))
    _add_output(command.add_argument_group("output"))


def _add_requests(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--workload", metavar="SPEC", help="NAME[:option=value,...] or a file (default: search)")
    add("--model", metavar="M", help="default: the first of /v1/models")
    add("--route", metavar="R", help="chat, completions, responses, messages or embeddings")
    add(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="ask for streams or bodies (default: streams, but bodies of embeddings)",
    )
    add("--max-tokens", metavar="N", help="of each answer (default: the workload's)")
    add("--ignore-eos", action="store_true", help="answers have --max-tokens tokens (vLLM's field)")
    add("--temperature", metavar="T", help="default 0; other answers aren't kept by caches")
    add("--api-key", metavar="KEY", help="default: TIERSERVE_API_KEY or OPENAI_API_KEY")
    add("--header", action="append", metavar="'NAME: VALUE'", help="sent with each request")
    add("--outcome-header", metavar="NAME", help="names the outcome (default: Cache-Status, ...)")
    add("--cache", metavar="STATE", help="cold, warm or steady: how a run begins (default: cold)")
    add(
        "--admin",
        metavar="URL|SOCKET",
        help="of a tierserve elsewhere; TIERSERVE_ADMIN_KEY is its key",
    )
    add("--seed", metavar="N", help="of prompts, arrivals and thinking (default 0)")


def _add_load(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--rate", metavar="R", help="open loop: sessions a second, whatever the server does")
    add("--users", metavar="N", help="closed loop: each waits for its answer (default: 1)")
    add("--arrivals", metavar="A", help="poisson, gamma:B, constant or trace (its own times)")
    add("--speed", metavar="X", help="how many times as fast as in the trace (default 1)")
    add("--think", metavar="S", help="mean seconds that users think (default 0)")
    add("--duration", metavar="S", help="seconds in which sessions begin (default 30)")
    add("--requests", metavar="N", help="sessions, in place of a duration; most are one request")
    add("--processes", metavar="P", help="client processes (default 1)")
    add("--connections", metavar="N", help="of each process at a time, at most (default 2048)")
    add("--timeout", metavar="S", help="seconds until the next byte (default 600)")
    add("--probe", metavar="R", help="small requests a second beside the load")


def _add_judgement(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--objective", metavar="O", help="such as ttft=200ms,itl=50ms@99%%")
    add("--ramp", action="store_true", help="find the highest rate at which the objective holds")
    text = "compare: such as 'miss.ttft.p50 > 1.1x'; may be given again"
    add("--fail-if", action="append", metavar="EXPR", help=text)


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--out", type=Path, metavar="DIR", help="gets result.json and report.html")
    add("--format", metavar="F,...", help="also written to DIR: vllm, br (Benchmark Report 0.2.1)")
    add("--json", action="store_true", help="print JSON instead of tables")
