"""What the OpenAPI document says is so with the real engine, of each operation in it.

Requests are made out of the document, right and wrong, the same each time. None gets a 500 or no
response, and what is refused leaves nothing in the tiers.
"""

from typing import Any

import pytest
import requests
from schemathesis import Case
from schemathesis.core.failures import FailureGroup

from server.protocol.routes import CACHED_ROUTES
from tests.e2e.conftest import MODEL, Server
from tests.openapi import check, operations, requests_of, send

pytestmark = pytest.mark.engine

EXAMPLES = 5
ANSWER_S = 600
# vLLM's own: it has the route whatever the model is.
UNABLE = {("/v1/systemone", 501)}
TOKENS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
MOST = 2


def bounded(body: Any) -> Any:
    """Return a body that asks for little, and of the model that there is."""
    if not isinstance(body, dict):
        return body
    # Without a limit each would go on for thousands of tokens.
    limits = {name: MOST for name in TOKENS if body.get(name) is None}
    large = (name for name in (*TOKENS, "n") if type(body.get(name)) is int and body[name] > MOST)
    made = body | limits | dict.fromkeys(large, MOST)
    return made | ({"model": MODEL} if isinstance(made.get("model"), str) else {})


def test_what_the_document_says_is_so(ready: Server) -> None:
    def entries() -> float:
        return ready.metric("/metrics", "tierserve_tier_entries")

    before, answered, failures = entries(), 0, []
    with requests.Session() as session:
        for operation in operations(ready.openapi()):
            for _, case in requests_of(operation, EXAMPLES):
                case.body = bounded(case.body)
                try:
                    answered += tried(session, ready.url, case)
                except (AssertionError, FailureGroup, requests.RequestException) as exc:
                    failures.append(exc)
    if failures:
        raise BaseExceptionGroup("not as the document says", failures)
    assert answered > 50
    # Each tier may have each of them.
    assert entries() - before <= 2 * answered
    told = ready.client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Still there?"}],
        max_tokens=2,
        # By chance it would have said all that it has to say.
        extra_body={"ignore_eos": True},
    )
    assert told.choices[0].finish_reason == "length"
    log = (ready.folder / "log").read_text()
    assert "a request failed" not in log


def tried(session: requests.Session, url: str, case: Case) -> bool:
    """Send a request, and return whether it was answered."""
    response = send(session, url, case, ANSWER_S)
    check(case, response)
    status = response.status_code
    is_expected = status < 500 or (case.path, status) in UNABLE
    # A case may ask for that by its field `cache`.
    is_expected = is_expected or (status == 504 and "only-if-cached" in response.text)
    assert is_expected, (case.as_curl_command(), response.text)
    if status >= 400 and case.path in CACHED_ROUTES:
        again = send(session, url, case, ANSWER_S, **{"Cache-Control": "only-if-cached"})
        assert again.status_code >= 400, case.as_curl_command()
    return status < 300
