"""Two replicas, Redis and two engines, each on a machine of its own: what they promise each other.

Machines are network namespaces with an address each, and the replicas run `configs/replicas.yaml`
as it is, but for the folder of their disk tier and the number of workers. The engines count what
they generate (`counting_engine.py`); with `--vllm` they are real ones of the embedded model, for
`generations` alone.

`generations`: each key is asked at both replicas at once, or at the second while and after the
first generates. `purges`: one replica purges while clients keep asking the other. `routing`: which
engine each replica sends a prompt to, idle and under load. `kill`: one replica is killed under
load, and while it generates what the other waits for. `redis`: it is slow, stopped, unplugged.
`partition`: one replica alone can't reach it, purges go on on both sides, and it comes back.
`sizes`: what an answer costs in Redis, on disk, in memory and in CPU time.

With `--ahead S` the clock of the second replica is so many seconds ahead. Needs root, iproute2 and
redis-server. Usage: .venv/bin/python scripts/bench/replicas [PART ...] [--ahead S] [--vllm]
"""

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parent))

from fleet import Fleet  # noqa: E402
from parts import PARTS  # noqa: E402

_INSIDE = "TIERSERVE_BENCH_INSIDE"
_NEEDS = ("unshare", "nsenter", "ip", "mount", "redis-server")


def main() -> int:
    """Run the parts; the status is 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=" or ".join(PARTS))
    parser.add_argument("--ahead", type=float, default=0, metavar="S",
                        help="seconds by which the second replica's clock is ahead")  # fmt: skip
    parser.add_argument("--vllm", action="store_true", help="with real engines")
    parser.add_argument("--when-unreachable", default="serve", choices=("serve", "miss"))
    options = parser.parse_args()
    parts = options.parts or (["generations"] if options.vllm else list(PARTS))
    if unknown := [name for name in parts if name not in PARTS]:
        parser.error(f"there is no {unknown[0]}; there are {', '.join(PARTS)}")
    if options.vllm and parts != ["generations"]:
        parser.error("real engines don't number their answers, so they have generations only")
    if _INSIDE not in os.environ:
        _enter_namespaces()
    with tempfile.TemporaryDirectory(prefix="tierserve-replicas-") as folder:
        return asyncio.run(_run(Path(folder), parts, options))


async def _run(folder: Path, parts: list[str], options: argparse.Namespace) -> int:
    broken: list[str] = []
    fleet = Fleet(
        folder,
        ahead_s=options.ahead,
        is_vllm=options.vllm,
        when_unreachable=options.when_unreachable,
    )
    try:
        await fleet.start()
        for name in parts:
            print(f"\n== {name}", flush=True)
            broken += [f"{name}: {each}" for each in await PARTS[name](fleet)]
    finally:
        await fleet.stop()
    print("\nbroken: " + ("nothing" if not broken else "\n        ".join(broken)))
    return int(bool(broken))


def _enter_namespaces() -> None:
    """Run this again where networks and mounts are its own."""
    missing = [name for name in _NEEDS if shutil.which(name) is None]
    if missing:
        sys.exit(f"needs {', '.join(missing)}")
    into = ["unshare", "--net", "--mount"]
    if subprocess.run([*into, "true"], check=False).returncode:
        sys.exit("may not make network namespaces here; it needs root")
    os.environ[_INSIDE] = "1"
    os.execvp(into[0], [*into, sys.executable, *sys.argv])  # noqa: S606


if __name__ == "__main__":
    sys.exit(main())
