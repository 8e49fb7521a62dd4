"""What a run is to do, from the command's options.

Every mistake is found here, before a request is sent.
"""

import argparse
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from server.bench.cache_state import DEFAULT, MODES, Admin, Mode
from server.bench.clients.http_client import check_target
from server.bench.clients.outcomes import OUTCOMES
from server.bench.load import Load, Target
from server.bench.results.objective import Objective, parse
from server.bench.workloads import Common
from server.bench.workloads.requests import ROUTES
from server.config.base import ConfigError

FORMATS = ("vllm", "br")
_DURATION_S = 30.0
_MOST_PROCESSES, _MOST_USERS, _MOST_CONNECTIONS = 256, 100_000, 65_536
_Choice = TypeVar("_Choice", bound=str)
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""A header's name by RFC 9110, 5.6.2."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A run, as its options describe it.

    Attributes:
        workload: as it was given. common: what its requests have in common; the model is empty
            where none was given. cache: how the run begins, one of `MODES`.
        admin: where the run's entries are removed; None looks on this machine.
        load, target: when requests are sent, and to whom.
        objective: what requests have to keep. ramp: whether the highest rate for it is searched.
        out: the folder of files; formats: which of `FORMATS` are written there, too.
        as_json: whether JSON is printed.
    """

    workload: str
    common: Common
    cache: Mode
    admin: Admin | None
    load: Load
    target: Target
    objective: Objective | None
    ramp: bool
    out: Path | None
    formats: tuple[str, ...]
    as_json: bool

    def of_model(self, model: str) -> "Plan":
        """Return the plan with the model that requests name."""
        return replace(self, common=replace(self.common, model=model))


class _Options:
    """Reads options and collects what is wrong with them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self.mistakes: list[str] = []

    def wrong(self, name: str, should: str) -> None:
        self.mistakes.append(f"{name}: {should}")

    def text(self, name: str) -> Any:
        return getattr(self._options, name.replace("-", "_"))

    def is_given(self, name: str) -> bool:
        return self.text(name) is not None

    def choice(self, name: str, among: tuple[_Choice, ...], default: _Choice) -> _Choice:
        given = self.text(name)
        if given is None:
            return default
        for each in among:
            if each == given:
                return each
        self.wrong(f"--{name}", f"should be one of {', '.join(among)}, not {given!r}")
        return default

    def number(self, name: str, *, positive: bool = True) -> float | None:
        """Return a finite number, greater than 0 or, if not `positive`, at least 0."""
        given = self.text(name)
        if given is None:
            return None
        try:
            value = float(given)
        except ValueError:
            value = math.nan
        if math.isfinite(value) and (value > 0 or (value == 0 and not positive)):
            return value
        bound = "greater than 0" if positive else "of at least 0"
        self.wrong(f"--{name}", f"should be a number {bound}, not {given}")
        return None

    def count(self, name: str, *, least: int = 1, most: int | None = None) -> int | None:
        given = self.text(name)
        if given is None:
            return None
        is_right = re.fullmatch(r"[0-9]{1,15}", given) and int(given) >= least
        if is_right and (most is None or int(given) <= most):
            return int(given)
        bounds = f"of at least {least}" if most is None else f"from {least} to {most:,}"
        self.wrong(f"--{name}", f"should be a whole number {bounds}, not {given}")
        return None


def make_plan(options: argparse.Namespace) -> Plan:
    """Return the plan.

    Raises:
        ConfigError: options are wrong; it names all of these.
    """
    read = _Options(options)
    if len(options.what) > 1:
        read.wrong("URL", f"should be one, not {' '.join(options.what)}")
    if read.is_given("fail-if"):
        read.wrong("--fail-if", "is of `bench compare A B`; a run has --objective")
    seed = read.count("seed", least=0) or 0
    plan = Plan(
        workload=read.text("workload") or "search",
        common=_common(read, seed),
        cache=read.choice("cache", MODES, DEFAULT),
        admin=_admin(read),
        load=_load(read, seed),
        target=_target(read, options),
        objective=_objective(read),
        ramp=options.ramp,
        out=options.out,
        formats=_formats(read, options),
        as_json=options.json,
    )
    if plan.ramp and not read.is_given("objective"):
        read.wrong("--ramp", "needs an --objective, such as ttft=200ms@99%")
    if plan.ramp and (read.is_given("users") or plan.load.arrivals == "trace"):
        read.wrong("--ramp", "searches a rate, so --users and --arrivals trace don't go with it")
    if plan.ramp and read.is_given("requests"):
        read.wrong("--ramp", "has probes of equal length: give --duration in place of --requests")
    if read.mistakes:
        raise ConfigError(read.mistakes)
    return plan


def _common(read: _Options, seed: int) -> Common:
    route = read.choice("route", ROUTES, "chat")
    if route == "embeddings" and read.text("stream"):
        read.wrong("--stream", "doesn't go with --route embeddings, whose answers are bodies")
    temperature = read.number("temperature", positive=False)
    return Common(
        model=read.text("model") or "",
        route=route,
        stream=read.text("stream") is not False,
        max_tokens=read.count("max-tokens"),
        temperature=0.0 if temperature is None else temperature,
        seed=seed,
        ignore_eos=bool(read.text("ignore-eos")),
    )


def _admin(read: _Options) -> Admin | None:
    given = read.text("admin")
    if given is None:
        return None
    if "://" not in given and not Path(given).is_socket():
        read.wrong("--admin", f"should be a URL or a socket of tierserve, not {given!r}")
    return Admin(given, os.environ.get("TIERSERVE_ADMIN_KEY", ""))


def _objective(read: _Options) -> Objective | None:
    given = read.text("objective")
    if given is None:
        return None
    try:
        return parse(given, None if read.is_given("outcome-header") else OUTCOMES)
    except ConfigError as exc:
        read.mistakes += exc.mistakes
        return None


def _load(read: _Options, seed: int) -> Load:
    rate, users = read.number("rate"), read.count("users", most=_MOST_USERS)
    if read.is_given("rate") and read.is_given("users"):
        read.wrong("--rate", "and --users are two kinds of load: give one of them")
    arrivals, burstiness = _arrivals(read)
    if arrivals == "trace" and (read.is_given("rate") or read.is_given("users")):
        read.wrong("--arrivals", "trace has its own times: give --speed in place of a rate")
    if read.is_given("speed") and arrivals != "trace":
        read.wrong("--speed", "is of --arrivals trace; a rate is given by --rate")
    if read.is_given("arrivals") and arrivals != "trace" and not _is_open(read):
        read.wrong("--arrivals", "are of an open loop: give --rate, too")
    if read.is_given("duration") and read.is_given("requests"):
        read.wrong("--duration", "and --requests both end a run: give one of them")
    duration, sessions = read.number("duration"), read.count("requests")
    if sessions is None and duration is None and arrivals != "trace":
        duration = _DURATION_S
    is_closed = arrivals != "trace" and not _is_open(read)
    if read.is_given("think") and not is_closed:
        read.wrong("--think", "is of users, who wait for answers: give --users in place of a rate")
    return Load(
        rate=rate if arrivals != "trace" else None,
        users=users or 1 if is_closed else None,
        arrivals=arrivals,
        burstiness=burstiness,
        speed=read.number("speed") or 1.0,
        think_s=read.number("think", positive=False) or 0.0,
        duration_s=duration,
        sessions=sessions,
        processes=read.count("processes", most=_MOST_PROCESSES) or 1,
        connections=read.count("connections", most=_MOST_CONNECTIONS) or 2048,
        timeout_s=read.number("timeout") or 600.0,
        seed=seed,
        probe=read.number("probe") or 0.0,
    )


def _is_open(read: _Options) -> bool:
    # A ramp begins at a rate of 1 where none is given.
    return read.is_given("rate") or bool(read.text("ramp"))


def _arrivals(read: _Options) -> tuple[str, float]:
    given = read.text("arrivals") or "poisson"
    name, colon, shape = given.partition(":")
    try:
        burstiness = float(shape) if colon else 1.0
    except ValueError:
        burstiness = math.nan
    if name == "gamma" and colon and math.isfinite(burstiness) and burstiness > 0:
        return name, burstiness
    if given not in ("poisson", "constant", "trace"):
        should = "should be poisson, constant, trace, or gamma:B with a B greater than 0"
        read.wrong("--arrivals", f"{should}, not {given!r}")
        return "poisson", 1.0
    return given, 1.0


def _target(read: _Options, options: argparse.Namespace) -> Target:
    headers = []
    for given in options.header or ():
        name, colon, value = given.partition(":")
        value = value.strip()
        if not (colon and _TOKEN.fullmatch(name) and value.isprintable() and value.isascii()):
            # A value may be secret.
            read.wrong("--header", "should be 'NAME: VALUE' in printable ASCII")
        elif name.lower() in ("content-length", "transfer-encoding", "connection", "host"):
            read.wrong("--header", f"{name} is set by the connection itself")
        else:
            headers.append((name, value))
    key = read.text("api-key")
    for variable in ("TIERSERVE_API_KEY", "OPENAI_API_KEY"):
        key = os.environ.get(variable) if key is None else key
    if key and not (key.isprintable() and key.isascii()):
        read.wrong("--api-key", "should be printable ASCII")
    elif key and not any(name.lower() == "authorization" for name, _ in headers):
        headers.append(("Authorization", f"Bearer {key}"))
    outcome = read.text("outcome-header")
    if outcome is not None and not _TOKEN.fullmatch(outcome):
        read.wrong("--outcome-header", f"should be the name of a header, not {outcome!r}")
    # Clients' base URLs end in `/v1`.
    url = options.what[0].rstrip("/").removesuffix("/v1").rstrip("/")
    target = Target(url, tuple(headers), outcome)
    if "@" in url:
        read.wrong("URL", "should have no user and password: give --api-key or --header")
        return target
    try:
        check_target(target)
    except ConfigError as exc:
        read.mistakes += exc.mistakes
    return target


def _formats(read: _Options, options: argparse.Namespace) -> tuple[str, ...]:
    formats = tuple(options.format.split(",")) if options.format else ()
    for each in formats:
        if each not in FORMATS:
            read.wrong("--format", f"should be some of {', '.join(FORMATS)}, not {each!r}")
    if options.format and options.out is None:
        read.wrong("--format", "needs --out DIR, where files are written")
    if options.out is not None:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            should = f"should be a folder that can be made, not {options.out}"
            read.wrong("--out", f"{should}: {exc.strerror}")
        else:
            if not os.access(options.out, os.W_OK | os.X_OK):
                read.wrong("--out", f"should be a writable folder, not {options.out}")
    return formats
