"""What this machine has that a configuration depends on: CPUs, memory, room on disk, GPUs."""

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_GPUS = ("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
_NVIDIA_SMI_S = 30
_CGROUP = Path("/sys/fs/cgroup")
_MEMORY_LIMITS = "memory.max", "memory/memory.limit_in_bytes"
"""A container's limit, by version 2 and 1 of control groups."""
_GIB = 1024**3


class Gpu(NamedTuple):
    """An NVIDIA GPU."""

    name: str
    memory_bytes: int


class Machine(NamedTuple):
    """What a machine has for us."""

    cpus: int
    memory_bytes: int
    free_disk_bytes: int
    """Room where the tiers on disk are by default."""
    gpus: tuple[Gpu, ...] = ()

    def __str__(self) -> str:
        """Describe the machine in a line."""
        counted = Counter(self.gpus).items()
        gpus = ", ".join(f"{n} {gpu.name} ({_gib(gpu.memory_bytes)})" for gpu, n in counted)
        return (
            f"{self.cpus} CPU{'s' * (self.cpus > 1)}, {_gib(self.memory_bytes)} of memory,"
            f" {_gib(self.free_disk_bytes)} free on disk, {gpus or 'no NVIDIA GPU'}"
        )


def this_machine(folder: Path) -> Machine:
    """Describe this machine, and the room on the disk of `folder`, which may have to be made."""
    # Before Python 3.14 `Path.is_dir` raises where a folder can't be looked into.
    there = next(each for each in (folder, *folder.parents) if os.path.isdir(each))  # noqa: PTH112
    return Machine(
        cpus=len(os.sched_getaffinity(0)),
        memory_bytes=_memory_bytes(),
        free_disk_bytes=shutil.disk_usage(there).free,
        gpus=tuple(_gpus()),
    )


def _memory_bytes() -> int:
    """Return the machine's memory, or what a container may have of it."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in _MEMORY_LIMITS:
        with suppress(OSError, ValueError):
            memory = min(memory, int((_CGROUP / name).read_text()))
    return memory


def _gpus() -> Iterator[Gpu]:
    try:
        listed = subprocess.run(  # noqa: S603
            _GPUS, capture_output=True, text=True, timeout=_NVIDIA_SMI_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return
    for line in listed.splitlines():
        name, _, mebibytes = line.rpartition(", ")
        # One that shares the machine's memory has no number.
        yield Gpu(name, int(mebibytes) * 1024**2 if mebibytes.isdecimal() else 0)


def _gib(size: int) -> str:
    return f"{size / _GIB:.0f} GiB"
