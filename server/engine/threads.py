"""How many CPUs vLLM's CPU build leaves to others, and so how many threads compute.

By itself it leaves one for each of its workers, and another one as soon as it has a store of
prefixes; but none at all where there are no more. So with a store it would compute with fewer
threads, or with more. We have it leave as many as without (`vllm.utils.ompmultiprocessing`).
"""

import os
import platform
from collections.abc import Mapping
from math import prod
from typing import Any

from server.config.schema import MAX_WORKERS, Config
from server.engine.dtype import vllm_build

RESERVED, BINDING = "VLLM_CPU_NUM_OF_RESERVED_CPU", "VLLM_CPU_OMP_THREADS_BIND"
_RANKS = "tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size"
# By `uname`; elsewhere it leaves one for all workers together.
_ONE_FOR_EACH = ("x86_64", "amd64", "aarch64", "arm64", "riscv")


def thread_variables(
    args: Mapping[str, Any], env: Mapping[str, str], machine: str | None = None
) -> dict[str, str]:
    """Return variables for vLLM with these options and this environment.

    There are none for a GPU, or where the user has chosen. `machine` is by default this one's.
    """
    if "cpu" not in vllm_build() or RESERVED in env or BINDING in env:
        return {}
    is_one_for_each = (machine or platform.machine()).lower().startswith(_ONE_FOR_EACH)
    return {RESERVED: str(_ranks(args) if is_one_for_each else 1)}


def worker_count(config: Config, cpus: int | None = None) -> int:
    """Return how many worker processes a configuration means; `cpus` are by default ours.

    An engine on GPUs has a process for its HTTP server, one that schedules, and one for each GPU,
    which are all busy (vLLM's «Architecture Overview»). One on CPUs computes on all but those that
    it leaves to others.
    """
    if config.server.workers != "auto":
        return config.server.workers
    cpus = len(os.sched_getaffinity(0)) if cpus is None else cpus
    engines = [model.engine.args for model in config.models.values() if not model.upstreams]
    if engines and "cpu" in vllm_build():
        return max(min(cpus - 1, sum(map(_ranks, engines))), 1)
    return min(max(cpus - sum(2 + _ranks(args) for args in engines), 1), MAX_WORKERS)


def _ranks(args: Mapping[str, Any]) -> int:
    """Return how many workers an engine with these options has on this machine."""
    return max(prod(_number(args.get(name)) for name in _RANKS) // _number(args.get("nnodes")), 1)


def _number(option: Any) -> int:
    """Return an option that is a number from 1 on, as vLLM would read it; 1 if it isn't."""
    try:
        return max(int(option), 1)
    except (TypeError, ValueError):
        return 1
