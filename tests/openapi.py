"""Requests out of an OpenAPI document, and whether what they get is as it says, by Schemathesis."""

from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy
from requests import Session
from schemathesis import APIOperation, Case, GenerationMode, Response
from schemathesis.specs.openapi import checks

_CHECKS = [
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.status_code_conformance,
]
# Keys are the tests' to send.
_CONFIG = {"generation": {"with-security-parameters": False}}
schemathesis.serializer.alias("application/jsonl", "text/plain")
RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE


def operations(document: dict[str, Any]) -> list[APIOperation]:
    """Return all that a document describes."""
    config = schemathesis.Config.from_dict(_CONFIG)
    schema = schemathesis.openapi.from_dict(document, config=config)
    return [operation.ok() for operation in schema.get_all_operations()]


def requests_of(operation: APIOperation, most: int) -> list[tuple[GenerationMode, Case]]:
    """Return up to `most` requests as the document has them, and as many others.

    They are the same each time.
    """
    # Of what has neither body nor query nothing can be wrong.
    modes = [RIGHT, WRONG] if operation.body or operation.query else [RIGHT]
    return [
        (mode, case)
        for mode in modes
        for case in _drawn(operation.as_strategy(generation_mode=mode), most)
    ]


def _drawn(strategy: SearchStrategy[Case], most: int) -> list[Case]:
    drawn: list[Case] = []

    @settings(
        database=None,
        deadline=None,
        derandomize=True,
        max_examples=most,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def draw(case: Case) -> None:
        drawn.append(case)

    draw()
    return drawn


def send(session: Session, url: str, case: Case, timeout_s: float, **headers: str) -> Response:
    """Send a request; it is a failure if nothing comes back for `timeout_s`."""
    return case.call(url, session=session, headers=headers or None, timeout=timeout_s)


def check(case: Case, response: Response) -> None:
    """Fail unless the response has a status, headers, a type and a shape that are described."""
    case.validate_response(response, checks=_CHECKS)
