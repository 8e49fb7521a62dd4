"""The whole road against the real vLLM and the real model. Tests run in the order written."""

import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import openai
import psutil
import pytest

from server.config.secrets import hash_key

from .conftest import MODEL, Server, living

pytestmark = pytest.mark.engine

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
GENERATIONS = "vllm:request_success_total"
TOKENS = "vllm:generation_tokens_total"
BLOCKS, BLOCK = 8, 128
"""Of a prefix that is long enough, and the tokens of each in the CPU build of vLLM."""


def ask(server: Server, messages=QUESTION, **options):
    """Return the parsed answer and the response's Cache-Status."""
    raw = server.client.chat.completions.with_raw_response.create(
        model=MODEL, messages=messages, temperature=0, max_tokens=16, **options
    )
    return raw.parse(), raw.headers["cache-status"]


def ask_stream(server: Server, **options):
    stream, status = ask(server, stream=True, **options)
    return list(stream), status


def text_of(events) -> str:
    return "".join(e.choices[0].delta.content or "" for e in events if e.choices)


def test_the_front_answers_before_the_engine(server: Server) -> None:
    assert server.status("/health") == 200
    with pytest.raises(openai.APIStatusError) as caught:
        ask(server)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"]
    server.wait_ready()


def test_miss_then_memory_hit(server: Server) -> None:
    first, status = ask(server)
    assert "fwd=miss" in status
    # What it says depends on how the machine rounds.
    assert first.choices[0].message.content
    second, status = ask(server)
    assert "hit" in status
    assert "detail=memory" in status
    assert second.id != first.id
    assert second.choices == first.choices
    assert second.usage == first.usage


def test_a_prompt_in_a_browser(server: Server) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs Chromium, such as Debian's chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=chromium,
            # A container's /dev/shm may be too small.
            args=["--no-sandbox", "--disable-dev-shm-usage"],
            timeout=600_000,
        )
        page = browser.new_page()
        page.set_default_timeout(600_000)
        page.goto(server.url)
        page.get_by_role("textbox", name="Prompt").fill("Which river flows through Rome?")
        answer = page.locator(".answer").first
        for said in ("Answered by the engine (miss)", "Answered by memory (hit)"):
            page.get_by_role("button", name="Send").click()
            playwright.expect(answer).to_contain_text(said, timeout=600_000)
            playwright.expect(page.locator("#try button")).to_be_enabled(timeout=600_000)
        texts = page.locator(".answer .text").all_text_contents()
        assert texts == [texts[0]] * 2
        assert texts[0]
        # The page shows vLLM's own document once we have it.
        server.openapi()
        page.goto(f"{server.url}/docs")
        page.get_by_text("/v1/chat/completions").first.click()
        page.get_by_text("max_completion_tokens").first.wait_for()
        browser.close()


def test_a_body_replays_as_a_stream(server: Server) -> None:
    body, _ = ask(server)
    events, status = ask_stream(server, stream_options={"include_usage": True})
    assert "hit" in status
    assert events[0].choices[0].delta.role == "assistant"
    assert text_of(events) == body.choices[0].message.content
    *_, last = [event for event in events if event.choices]
    assert last.choices[0].finish_reason == body.choices[0].finish_reason
    assert events[-1].usage.total_tokens == body.usage.total_tokens
    events, _ = ask_stream(server)
    assert all(event.usage is None for event in events)


def test_a_stream_replays_as_stream_and_body(server: Server) -> None:
    messages = [{"role": "user", "content": "What is the capital of Italy?"}]
    first, status = ask_stream(server, messages=messages)
    assert "fwd=miss" in status
    assert all(event.usage is None for event in first)
    again, status = ask_stream(server, messages=messages)
    assert "detail=memory" in status
    assert [event.choices for event in again] == [event.choices for event in first]
    body, status = ask(server, messages=messages)
    assert "hit" in status
    assert body.choices[0].message.content == text_of(first)
    assert body.usage.completion_tokens > 0


def test_completions(server: Server) -> None:
    create = server.client.completions.with_raw_response.create
    answers = {True: [], False: []}
    for prompt, first in (("Paris is", False), ("Rome is", True)):
        for stream, status in ((first, "fwd=miss"), (first, "detail=memory"), (not first, "hit")):
            raw = create(model=MODEL, prompt=prompt, temperature=0, max_tokens=5, stream=stream)
            assert status in raw.headers["cache-status"]
            parsed = raw.parse()
            events = list(parsed) if stream else [parsed]
            choices = [event.choices[0] for event in events]
            answers[first].append("".join(choice.text for choice in choices))
            assert choices[-1].finish_reason == "length"
    for texts in answers.values():
        assert texts == [texts[0]] * 3
        assert texts[0]


def test_chance_is_not_cached(server: Server) -> None:
    for _ in range(2):
        raw = server.client.chat.completions.with_raw_response.create(
            model=MODEL, messages=QUESTION, temperature=0.7, max_tokens=4
        )
        assert raw.headers["cache-status"] == "tierserve; fwd=bypass"


def test_errors_are_the_engines_and_not_stored(server: Server) -> None:
    for _ in range(2):
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            server.client.chat.completions.create(model="no", messages=QUESTION, temperature=0)
    with pytest.raises(openai.BadRequestError, match="should be JSON"):
        server.client.post("/chat/completions", cast_to=object, content=b"{")


def test_other_routes_pass_through(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == [MODEL]
    assert server.status("/version") == 200
    assert server.status("/nowhere") == 404


def ask_with_rules(server: Server, question: str):
    system = {"role": "system", "content": "Be brief. " + "Rules are rules. " * 400}
    return ask(server, [system, {"role": "user", "content": question}])


def test_a_shared_prefix_is_reused(server: Server) -> None:
    ask_with_rules(server, "One?")
    second, status = ask_with_rules(server, "Two?")
    assert "fwd=miss" in status
    assert second.usage.prompt_tokens > 1500
    assert second.usage.prompt_tokens_details.cached_tokens > 1000


def test_identical_requests_make_one_generation(server: Server) -> None:
    before = server.metric("/metrics/engine", GENERATIONS)
    messages = [{"role": "user", "content": "Name a river."}]
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(lambda _: ask(server, messages)[0], range(200)))
    assert len({answer.choices[0].message.content for answer in answers}) == 1
    assert server.metric("/metrics/engine", GENERATIONS) - before == 1


def test_hanging_up_ends_the_generation_and_stores_nothing(server: Server) -> None:
    # The disk tier counts in the background.
    in_memory = 'tierserve_tier_stores_total{tier="memory"}'
    stored = server.metric("/metrics", in_memory)
    stream = server.client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Count."}],
        temperature=0,
        max_tokens=3000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    server.until(lambda: server.metric("/metrics/engine", "vllm:num_requests_running") == 1)
    stream.close()
    server.until(lambda: server.metric("/metrics/engine", "vllm:num_requests_running") == 0)
    assert server.metric("/metrics", in_memory) == stored


def body_and_events(server: Server) -> list[bytes]:
    """Return the question's answer in both forms, and what is new each time taken out."""
    said = []
    for stream in (False, True):
        raw = server.client.chat.completions.with_raw_response.create(
            model=MODEL, messages=QUESTION, temperature=0, max_tokens=16, stream=stream
        )
        assert "detail=" in raw.headers["cache-status"]
        fresh = rb'"id":"chatcmpl-\w+"|"created":\d+'
        said.append(re.sub(fresh, b"", raw.http_response.read()))
    return said


def end(server: Server, number: int) -> None:
    """End the server by a signal; nothing of it stays."""
    session = server.session()
    assert len(list(server.temporary.glob("tierserve-*"))) == 1
    server.stop(number)
    while living(session):
        time.sleep(0.2)
    assert list(server.temporary.glob("tierserve-*")) == []


def test_what_was_asked_before_is_answered_before_the_engine(server: Server) -> None:
    before = body_and_events(server)
    end(server, signal.SIGKILL)
    server.start()
    assert server.status("/ready") == 503
    assert body_and_events(server) == before


def test_the_disk_tier_alone_answers_alike(server: Server) -> None:
    before = body_and_events(server)
    server.stop()
    server.start(TIERSERVE__TIERS__MEMORY="null")
    assert server.status("/ready") == 503
    assert body_and_events(server) == before
    assert server.metric("/metrics", 'tierserve_tier_hits_total{tier="disk"}') == 2
    assert server.metric("/metrics", 'tierserve_tier_hits_total{tier="memory"}') == 0


def test_tenants_share_no_prefix(server: Server, tmp_path_factory) -> None:
    """From here on there are keys, and the client's is one of them."""
    file = tmp_path_factory.mktemp("tenants") / "tenants.yaml"
    file.write_text(f"one: {{keys: ['{hash_key('x')}']}}\ntwo: {{keys: ['{hash_key('y')}']}}\n")
    server.stop()
    server.start(TIERSERVE__TENANTS__FILE=str(file), TIERSERVE__TENANTS__OPEN_METRICS="true")
    server.wait_ready()
    other = server.client.with_options(api_key="y")
    system = {"role": "system", "content": "Keep it secret. " * 400}

    def cached_tokens(client: openai.OpenAI, text: str, **more) -> int:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[system, {"role": "user", "content": text}],
            max_tokens=4,
            **{"temperature": 0} | more,
        )
        assert answer.usage.prompt_tokens > 1500
        details = answer.usage.prompt_tokens_details
        return (details and details.cached_tokens) or 0

    assert cached_tokens(server.client, "One?") == 0
    assert cached_tokens(server.client, "Two?") > 1000
    # Neither what was asked alike nor what has only begun alike can be told by its timing.
    assert cached_tokens(other, "One?") == 0
    assert cached_tokens(other, "Three?", temperature=1) > 1000
    own = {"extra_body": {"cache_salt": "mine"}}
    assert cached_tokens(server.client, "Three?", **own) == 0
    assert cached_tokens(other, "Four?", **own) == 0
    # Routes that pass through are sent a salt, too.
    for client in (server.client, other):
        for times in range(2):
            said = client.responses.create(
                model=MODEL, input=f"{'Tell nobody. ' * 400}{times}", max_output_tokens=4
            )
            reused = said.usage.input_tokens_details.cached_tokens
            assert (reused > 1000) == (times > 0)
    with pytest.raises(openai.AuthenticationError):
        server.client.with_options(api_key="z").models.list()


def blocks_on_disk(server: Server) -> float:
    """Return how many blocks the prefix tier holds; it says none while it can't be read in time."""
    while not (held := server.metric("/metrics", "tierserve_prefix_blocks")):
        time.sleep(0.2)
    return held


def test_the_engine_comes_back_after_kill(server: Server) -> None:
    server.wait_ready()
    restarts = server.metric("/metrics", "tierserve_engine_restarts_total")
    ask(server)
    before = blocks_on_disk(server)
    for question in ("Three?", "Four?"):
        ask_with_rules(server, question)
    server.until(lambda: blocks_on_disk(server) >= before + BLOCKS)
    of_vllm = [process for process in living(server.session()) if process.pid != server.session()]
    assert "VLLM::EngineCore" in {process.name() for process in of_vllm}
    for process in of_vllm:
        # One may end by the end of another.
        with suppress(psutil.NoSuchProcess):
            process.kill()
    server.until(lambda: server.status("/ready") == 503)
    assert "hit" in ask(server)[1]
    with pytest.raises(openai.APIStatusError) as caught:
        ask(server, [{"role": "user", "content": "New?"}])
    assert caught.value.status_code == 503
    server.wait_ready()
    fifth, status = ask_with_rules(server, "Five?")
    assert "fwd=miss" in status
    # From disk, by this request or by the warm start.
    assert fifth.usage.prompt_tokens_details.cached_tokens >= BLOCKS * BLOCK
    assert server.metric("/metrics", "tierserve_engine_restarts_total") == restarts + 1


def respond(server: Server, *, stream: bool, **options):
    """Return what is answered to a request for a long Response, however it ends."""
    asked = {"input": "Count to a thousand, in words.", "temperature": 0, "stream": stream}
    # It takes far longer than it takes to notice that the socket is gone.
    asked["ignore_eos"] = True
    of_client = {"base_url": server.url, "headers": server.client.auth_headers, "timeout": None}
    with httpx.Client(**of_client) as client:
        try:
            return client.post("/v1/responses", json={"model": MODEL} | asked, **options)
        except httpx.HTTPError as exc:
            return exc


def test_what_a_stopping_engine_calls_whole_is_not_stored(server: Server) -> None:
    server.wait_ready()
    before = server.metric("/metrics", "tierserve_tier_entries")
    made = server.metric("/metrics/engine", TOKENS)
    with ThreadPoolExecutor() as pool:
        given = [pool.submit(respond, server, stream=stream) for stream in (False, True)]
        server.until(lambda: server.metric("/metrics/engine", TOKENS) > made + 8)
        for process in living(server.session()):
            # Neither makes it abort what it generates: only we may stop it.
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGINT)
        server.until(lambda: server.metric("/metrics/engine", TOKENS) > made + 16)
        # Then we stop it.
        (socket,) = server.temporary.glob("tierserve-*/engine.sock")
        socket.unlink()
        for each in given:
            each.result()
    server.until(lambda: server.status("/ready") == 503)
    assert server.metric("/metrics", "tierserve_tier_entries") == before
    for stream in (False, True):
        cached = respond(server, stream=stream, headers={"Cache-Control": "only-if-cached"})
        assert cached.status_code == 504


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_us_while_the_engine_loads(server: Server, number: int) -> None:
    if server.process is None:
        server.start()
    server.until(lambda: server.session() is not None and len(living(server.session())) > 1)
    end(server, number)
