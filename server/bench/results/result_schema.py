"""The shape of `result.json`: what `tierserve bench schema` publishes, and reading checks."""

from typing import Annotated, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field

_Count = Annotated[int, Field(ge=0)]
_AtLeast0 = Annotated[float, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Interval = tuple[float, float]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Spread(_Part):
    """How values are distributed; percentiles interpolate as numpy's `linear`."""

    count: Annotated[int, Field(ge=1)]
    mean: float
    std: _AtLeast0
    min: float
    max: float
    p50: float
    p90: float
    p99: float
    p99_9: float = Field(alias="p99.9")
    ci: dict[Literal["p50", "p90", "p99", "p99.9"], _Interval]
    """95% intervals of percentiles, where there are enough values."""
    too_few: list[Literal["p50", "p90", "p99", "p99.9"]]
    """Percentiles beyond which fewer than ten values lie."""


class Figures(_Part):
    """Of some requests. Rates, tokens and latencies are of whole answers only."""

    requests: _Count
    """All that were sent, failed ones too."""
    failed: _Count
    """Those without a whole answer."""
    requests_per_s: _AtLeast0
    prompt_tokens: _Count
    completion_tokens: _Count
    cached_tokens: _Count
    """As `usage` tells; hits repeat those of their first time."""
    loaded_tokens: _Count
    """As `Cache-Status` tells of the prefix tier."""
    tokens_served_per_s: _AtLeast0
    """Of all answers."""
    tokens_generated_per_s: _AtLeast0
    """Of answers that no cache gave."""
    ttft_s: Spread | None
    """From sending to the first token."""
    tpot_s: Spread | None
    """(E2E - TTFT) / (tokens - 1)."""
    itl_s: Spread | None
    """Between tokens, of all requests pooled."""
    e2e_s: Spread | None
    """From sending to the last token."""
    ttft_due_s: Spread | None
    """From when a request was due to the first token; null in a closed loop."""
    e2e_due_s: Spread | None
    """From when a request was due to the last token; null in a closed loop."""


class CheckPart(_Part):
    """A check of the verdict."""

    check: str
    value: float | None
    limit: float | None
    ok: bool
    text: str


class WorkloadPart(_Part):
    """What was sent."""

    name: str
    digest: str
    """Equal for equal workloads."""
    seed: int
    cache: str
    """Of the server, at the start: cold, warm or steady."""


class LoadPart(_Part):
    """How it was offered."""

    rate: float | None
    """Sessions a second; null in a closed loop."""
    users: int | None
    """Of a closed loop; null in an open one."""
    arrivals: str
    burstiness: float
    speed: float
    think_s: float
    duration_s: float | None
    sessions: int | None
    processes: int
    connections: int
    timeout_s: float
    seed: int
    probe: float


class TargetPart(_Part):
    """The endpoint."""

    url: str
    model: str
    path: str


class HitRatio(_Part):
    """Of whole answers, and of their prompts' and own tokens."""

    requests: _Share | None
    tokens: _Share | None


class Reused(_Part):
    """Prompt tokens of misses that came from a prefix cache."""

    tokens: _Count
    of: _Count


class Attainment(_Part):
    """Requests that keep the objective."""

    requests: _Count
    good: _Count
    attainment: _Share
    interval: _Interval
    """Wilson's, with 95% confidence."""
    holds: bool
    """Whether the share that is wanted kept it."""
    requests_per_s: _AtLeast0
    """Those that kept it."""


class Goodput(Attainment):
    """Requests that keep the objective, whole and by outcome."""

    objective: str
    share: _Share
    """The share that is wanted."""
    outcomes: dict[str, Attainment]
    unseen: list[str]
    """Outcomes that the objective limits, and that no request had."""


class Percentiles(_Part):
    """Of a row of the series."""

    p50: float
    p99: float


class Row(_Part):
    """A second, or a longer part of a long run."""

    at_s: _AtLeast0
    """Since the schedule began."""
    width_s: _AtLeast0
    requests_per_s: dict[str, _AtLeast0]
    """Requests that ended, by outcome."""
    errors_per_s: _AtLeast0
    in_flight: int
    """Requests that were due and had no end, at the row's end."""
    ttft_s: Percentiles | None
    """Latencies are of requests that were due in the row."""
    e2e_s: Percentiles | None
    ttft_due_s: Percentiles | None
    e2e_due_s: Percentiles | None


class RampProbe(_Part):
    """A run at one rate."""

    rate: float
    """Sessions a second."""
    passed: bool
    reason: str
    client_limited: bool
    """The client was too slow, so this says nothing of the server."""
    too_few: bool
    """The objective may hold, but so few requests can't show it."""
    attainment: _Share
    interval: _Interval
    outcomes: dict[str, Attainment]


class AtKnee(_Part):
    """What a knee means for an outcome."""

    highest_kept: float | None
    """The highest probed rate at which the requests of this outcome kept the objective."""
    at_knee: Attainment | None


class RampFound(_Part):
    """The highest rate at which the objective holds."""

    rate: float | None
    """It holds there; null if it holds nowhere."""
    fails_at: float | None
    resolution: float
    limited_by: Literal["server", "client"] | None
    text: str
    outcomes: dict[str, AtKnee]
    probes: list[RampProbe]


class Result(_Part):
    """What `tierserve bench` measured. Names in `_s` are seconds, in `_per_s` rates a second."""

    version: Literal[1]
    tierserve: str
    """The version that measured."""
    valid: bool
    """Whether all checks of the verdict are ok; `compare` refuses other runs."""
    verdict: list[CheckPart]
    interrupted: bool
    """Whether Ctrl-C ended the run."""
    workload: WorkloadPart
    load: LoadPart
    target: TargetPart
    began: str
    """ISO 8601."""
    offered_s: _AtLeast0
    """For how long load was offered."""
    elapsed_s: _AtLeast0
    """Until the last answer ended; rates are over this time."""
    scheduled: _Count
    """Sessions that the schedule had."""
    machine: dict[str, str | int]
    """Of the clients."""
    whole: Figures
    outcomes: dict[str, Figures]
    """By outcome, such as memory, disk and miss; `failed` has those without a whole answer."""
    probe: Figures | None
    """Side requests of `--probe`, which are in no other figure."""
    hit_ratio: HitRatio
    prompt_tokens_reused: Reused
    errors: dict[str, Annotated[int, Field(ge=1)]]
    """Failed requests by kind."""
    goodput: Goodput | None
    series: Annotated[list[Row], Field(max_length=600)]
    ramp: RampFound | None = None
    """Of `--ramp`; the other figures are of its run at the rate that was found."""


def as_json_schema() -> str:
    """Return the JSON Schema of a result."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Result.model_json_schema(),
    }
    return orjson.dumps(schema, option=orjson.OPT_INDENT_2).decode()
