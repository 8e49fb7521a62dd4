"""The load generator of benchmarks: wrk, which asks prepared questions in turn.

Every response has to be a 200 with at least the expected bytes; one that isn't fails the benchmark.
"""

import resource
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROUTE = "/v1/chat/completions"
# The requests are made before the measurement: Lua only hands them out.
_SCRIPT = """
local requests, rests, at, asked = {{}}, {{}}, 0, 0
function init()
  {headers}
  for line in io.lines({file!r}) do
    local whole = wrk.format("POST", {route!r}, nil, line)
    local second = whole:find("\\n") + 1
    local first = whole:sub(1, second - 1) .. "traceparent: 00-"
    requests[#requests + 1] = {new_heads} and first or whole
    rests[#rests + 1] = "\\r\\n" .. whole:sub(second)
  end
end
function request()
  at = at % #requests + 1
  if not {new_heads} then
    return requests[at]
  end
  asked = asked + 1
  return requests[at] .. ("%032x-0000000000000001-01"):format(asked) .. rests[at]
end
function done(all)
  local e = all.errors
  print(("result %d %d %d %d"):format(all.requests, all.duration, all.bytes,
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""


@dataclass(frozen=True)
class LoadResult:
    """What one run of wrk has seen."""

    rate: float
    """Responses a second."""
    cores: float
    """Cores that wrk used, on average."""
    seconds: float
    """How long the run took (s)."""


class Load:
    """Questions that wrk asks, from some of the machine's cores.

    Args:
        folder: where their file and wrk's script are written.
        questions: the bodies, without line feeds.
        headers: of each request.
        response_bytes: the least that each response has.
        new_heads: whether each request has a trace id of its own.
    """

    def __init__(
        self,
        folder: Path,
        questions: Sequence[bytes],
        headers: dict[str, str],
        response_bytes: int,
        *,
        new_heads: bool = False,
    ) -> None:
        self.questions, self.headers, self._response_bytes = questions, headers, response_bytes
        file, self._script = folder / "questions", folder / "load.lua"
        file.write_bytes(b"\n".join(questions))
        lines = [f'wrk.headers["{name}"] = "{value}"' for name, value in headers.items()]
        self._script.write_text(
            _SCRIPT.format(
                file=str(file),
                route=ROUTE,
                headers="\n  ".join(lines),
                new_heads=str(new_heads).lower(),
            )
        )

    def run(self, url: str, cores: Sequence[int], seconds: int, connections: int) -> LoadResult:
        """Ask the server at `url` for some seconds, from one thread for each of the `cores`.

        Raises:
            ValueError: a response was an error, too short, or did not come.
        """
        on = ",".join(map(str, cores))
        threads = min(len(cores), connections)
        command = ["taskset", "-c", on, "wrk", f"-t{threads}", f"-c{connections}", f"-d{seconds}s",
                   "--timeout", "30s", "-s", str(self._script), url]  # fmt: skip
        before = _children_cpu_s()
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        cpu_s = _children_cpu_s() - before
        result = [line.split()[1:] for line in output.splitlines() if line.startswith("result ")]
        requests, took_us, got_bytes, errors = map(int, result[0]) if result else (0, 1, 0, 1)
        if errors or not requests or got_bytes < requests * self._response_bytes:
            raise ValueError(f"{url} did not give the expected answers:\n{output}")
        took_s = took_us / 1e6
        return LoadResult(requests / took_s, cpu_s / took_s, took_s)


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
