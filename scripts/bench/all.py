"""Runs all benchmarks but two, one after another, and prints README's table.

Left out are `policies.py`, whose traces don't come with the source, and `replicas`, which makes
networks. What the others print meanwhile goes to standard error. It takes an hour or more on two
cores, needs `scripts/setup`, wrk and nginx, and a machine that does nothing else.

Usage: all.py [NAME ...]
"""

import argparse
import subprocess
import sys
from pathlib import Path

from rows import HEAD, is_row

FOLDER = Path(__file__).parent
DATA = FOLDER.parents[1] / "tests/data"
SCRIPTS: dict[str, list[str]] = {
    "headline.py": [],
    "restart.py": [],
    "hits.py": [],
    "misses.py": [],
    "each_tier.py": [],
    "prefix.py": [],
    "routing.py": [],
    "prefix_store.py": [],
    "prefix_replay.py": [str(DATA / "mooncake_synthetic_trace_end.jsonl")],
}


def main() -> int:
    """Run them; a failure is told, and makes the status 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SCRIPTS)}")
    names = parser.parse_args().names or list(SCRIPTS)
    if unknown := [name for name in names if name not in SCRIPTS]:
        parser.error(f"there is no {unknown[0]}; there are {', '.join(SCRIPTS)}")
    rows, failed = [], []
    for name in names:
        print(f"\n== {name}", file=sys.stderr, flush=True)
        command = [sys.executable, str(FOLDER / name), *SCRIPTS[name]]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                if is_row(line):
                    rows.append(line)
                print(line, end="", file=sys.stderr, flush=True)
        if process.returncode:
            failed.append(name)
    print(HEAD)
    print(*rows, sep="", end="")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
