"""The pages in a real Chromium, which can reach nothing but this machine."""

import asyncio
import re
import shutil
from collections.abc import AsyncIterator

import orjson
import pytest
import pytest_asyncio
import yaml
from aiohttp import web

from server.config.secrets import hash_key, new_key
from tests.server.conftest import CHAT, ROLE, WHOLE, answer, body, chunk, question, running, stream
from tests.server.prefix_blocks import opened, store_chain
from tests.server.telemetry.test_prefixes import until_the_day_is_long
from tests.servers import free_port
from tests.waiting import HANGS_S

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip("playwright.async_api", reason="needs playwright")
expect = playwright.expect
TIMEOUT_MS = HANGS_S * 1000
expect.set_options(timeout=TIMEOUT_MS)

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, such as Debian's chromium"),
]

EVIL = "<img src=x onerror=\"document.title='evil'\"><script>document.title='evil'</script>"
KEY, OTHER_KEY, ADMIN_KEY = new_key(), new_key(), new_key()
LOOKS = {
    "dark": {"color_scheme": "dark"},
    "light": {"color_scheme": "light"},
    "phone": {"viewport": {"width": 390, "height": 800}, "is_mobile": True},
}


async def evil(http: web.Request) -> web.StreamResponse:
    """An engine whose answers would be HTML, if anything took them for that."""
    asked = orjson.loads(await http.read())
    if not asked.get("stream"):
        return web.json_response(body(EVIL))
    return await stream(http, ROLE, chunk({"content": EVIL}), *WHOLE[2:])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chromium() -> AsyncIterator[playwright.Browser]:
    async with playwright.async_playwright() as driver:
        # Without its sandbox, since tests may run as root; no other host has an address.
        options = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        launching = {"executable_path": CHROMIUM, "args": options, "timeout": TIMEOUT_MS}
        browser = await driver.chromium.launch(**launching)
        yield browser
        await browser.close()


class Visit:
    """A page, and all that went wrong on it."""

    def __init__(self, page: playwright.Page) -> None:
        self.page = page
        self.wrong: list[str] = []
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("request", self._on_request)
        page.set_default_timeout(TIMEOUT_MS)

    def _on_console(self, message: playwright.ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.wrong.append(message.text)

    def _on_request(self, request: playwright.Request) -> None:
        if not re.match(r"http://127\.0\.0\.1:\d+/", request.url):
            self.wrong.append(request.url)


@pytest_asyncio.fixture(loop_scope="module")
async def visit(chromium, request) -> AsyncIterator[Visit]:
    context = await chromium.new_context(**getattr(request, "param", {}))
    made = Visit(await context.new_page())
    yield made
    await context.close()
    assert made.wrong == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guarded(_upstream, tmp_path_factory):
    """A server with two tenants and an admin port, which pages of the upstream's may ask."""
    folder = tmp_path_factory.mktemp("browser")
    tenants = {"acme": {"keys": [hash_key(KEY)]}, "globex": {"keys": [hash_key(OTHER_KEY)]}}
    (folder / "tenants.yaml").write_text(yaml.safe_dump(tenants))
    port = free_port()
    sections = {
        "models": {"a-model-of-a-long-name-" * 4: {"upstreams": [_upstream.url]}},
        "server": {"allowed_origins": [_upstream.url]},
        "tenants": {"file": "tenants.yaml"},
        "admin": {"port": port, "key": ADMIN_KEY},
    }
    store = opened(folder / "prefix")
    store_chain(store, "a", "model:m")
    counts = {"queried_tokens": 200, "loaded_tokens": 50, "saved_seconds": 90}
    store.index.save({("m", name): count for name, count in counts.items()}, {})
    store.close()
    prefix = {"path": str(folder / "prefix"), "max_bytes": "64MiB"}
    options = {
        "prefix": prefix,
        "sections": sections,
        "headers": {"Authorization": f"Bearer {KEY}"},
    }
    async with running(folder, _upstream, **options) as made:
        made.admin = f"http://127.0.0.1:{port}/admin"
        yield made


async def test_a_prompt_is_a_miss_and_then_a_hit(front, upstream, visit) -> None:
    upstream.handler = evil
    page = visit.page
    await page.goto(front.url)
    await expect(page.get_by_text("engine ready")).to_be_visible()
    # By keyboard alone.
    await page.get_by_role("textbox", name="Prompt").press("Control+Enter")
    answers = page.locator(".answer")
    await expect(answers.first).to_contain_text("Answered by the engine (miss)")
    await expect(answers.first.locator(".text")).to_have_text(EVIL)
    send = page.get_by_role("button", name="Send")
    await expect(send).to_be_enabled()
    await send.click()
    await expect(answers.first).to_contain_text("Answered by memory (hit)")
    await expect(answers.first).to_contain_text("tierserve; hit; ttl=")
    await expect(answers.first).to_contain_text("times as fast as the engine")
    assert await answers.locator(".text").all_text_contents() == [EVIL, EVIL]
    await expect(page.locator(".legend")).to_contain_text("memory 50.0 %")
    await expect(page.get_by_role("img", name="Answered by memory 50.0 %")).to_be_visible()
    await expect(page.locator("#tiers")).to_contain_text("disk")
    assert await page.title() == "tierserve"
    assert len(upstream.asked) == 1


async def test_a_prompt_may_be_sent_before_all_models_are_listed(front, upstream, visit) -> None:
    page, listed = visit.page, asyncio.Event()

    async def late(route: playwright.Route) -> None:
        await listed.wait()
        await route.continue_()

    await page.route("**/v1/models", late)
    await page.goto(front.url)
    async with page.expect_request("**/chat/completions") as sent:
        await page.get_by_role("button", name="Send").click()
    assert (await sent.value).post_data_json["model"] == "m"
    await expect(page.locator(".answer")).to_contain_text("Answered by the engine")
    async with page.expect_response("**/v1/models"):
        listed.set()


async def test_after_a_restart_the_disk_answers(upstream, visit, tmp_path) -> None:
    page = visit.page
    titles = ("Answered by the engine (miss)", "Answered by disk (hit)")
    for held, title in enumerate(titles):
        async with running(tmp_path, upstream, memory=None) as front:
            # Its file is opened beside.
            await front.until_metric('tierserve_tier_entries{tier="disk"}', held)
            await page.goto(front.url)
            await page.get_by_role("button", name="Send").click()
            await expect(page.locator(".answer")).to_contain_text(title)
            await expect(page.get_by_role("button", name="Send")).to_be_enabled()
            # It would look for a server that has gone.
            await page.goto("about:blank")
    assert len(upstream.asked) == 1


@pytest.mark.parametrize("visit", LOOKS.values(), ids=LOOKS, indirect=True)
async def test_it_can_be_read_by_everybody(front, guarded, visit) -> None:
    page = visit.page
    long = question(cache={"tags": ["a-tag-of-a-long-name-" * 5, "x" * 128]})
    await guarded.ask(long, headers={"Authorization": f"Bearer {OTHER_KEY}"})
    for target in (front.url, f"{front.url}/docs", guarded.admin):
        await page.goto(target)
        if target == guarded.admin:
            await page.get_by_label("Admin key").fill(ADMIN_KEY)
            await page.get_by_role("button", name="Use it").click()
            await expect(page.locator("#config")).to_contain_text("tiers.promote_after")
            # Labels are broken into lines, but not one letter a line.
            await expect(page.locator("#entries tbody tr").first).to_be_visible()
            row = page.locator("#entries tbody tr").filter(has_text="a-tag-of")
            assert all([(await each.bounding_box())["height"] < 400 for each in await row.all()])
        looks = await page.evaluate(_LOOK)
        assert looks["wide"] <= looks["width"]
        assert looks["unnamed"] == []
        background = _luminance(looks["colors"].pop("--card"))
        for name, color in looks["colors"].items():
            # WCAG 2.2, success criterion 1.4.3.
            lighter, darker = sorted((background, _luminance(color)), reverse=True)
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, name


async def test_a_tenant_gives_its_key_and_sees_itself(guarded, upstream, visit) -> None:
    page, mine = visit.page, question()
    await guarded.ask(mine)
    for _ in range(5):
        await guarded.ask(mine, headers={"Authorization": f"Bearer {OTHER_KEY}"})
    await page.goto(guarded.url)
    await page.get_by_label("API key").fill(new_key())
    await page.get_by_role("button", name="Use it").click()
    await expect(page.get_by_role("alert").first).to_have_text("Incorrect API key provided.")
    await page.get_by_label("API key").fill(KEY)
    await page.get_by_label("API key").press("Enter")
    await expect(page.get_by_role("heading", name="Who answered acme")).to_be_visible()
    await expect(page.locator("#day dd").first).to_have_text("1")
    await expect(page.locator("#held")).to_be_hidden()
    assert await page.context.cookies() == []
    assert await page.evaluate("[localStorage.length, sessionStorage.length]") == [0, 1]
    await page.get_by_role("button", name="Forget the key").click()
    await expect(page.get_by_role("heading", name="An API key is needed")).to_be_visible()
    await expect(page.get_by_role("heading", name="Who answered acme")).to_be_hidden()
    assert await page.evaluate("sessionStorage.length") == 0
    # The first was without a key, the second with a wrong one, the last without again.
    assert len(visit.wrong) == 3
    assert all("401 (Unauthorized)" in each for each in visit.wrong)
    visit.wrong.clear()


async def test_what_comes_after_the_key_was_forgotten_is_not_shown(guarded, visit) -> None:
    page, asked, go = visit.page, asyncio.Event(), asyncio.Event()

    async def late(route: playwright.Route) -> None:
        if "authorization" in route.request.headers:
            asked.set()
            await go.wait()
        await route.continue_()

    await page.goto(guarded.url)
    await page.get_by_label("API key").fill(KEY)
    await page.get_by_label("API key").press("Enter")
    forget = page.get_by_role("button", name="Forget the key")
    await expect(forget).to_be_visible()
    await page.route("**/overview", late)
    # As when the page is looked at again.
    await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    await asyncio.wait_for(asked.wait(), HANGS_S)
    await forget.click()
    needed = page.get_by_role("heading", name="An API key is needed")
    await expect(needed).to_be_visible()
    async with page.expect_response("**/overview") as reply:
        go.set()
    await (await reply.value).finished()
    await page.evaluate("new Promise((done) => setTimeout(done))")
    assert await needed.is_visible()
    assert await page.locator("#all").is_hidden()
    # One for each time without a key.
    assert len(visit.wrong) == 2
    visit.wrong.clear()


async def test_an_entry_is_found_looked_at_and_purged(guarded, upstream, visit) -> None:
    upstream.handler = evil
    page, asked, other = visit.page, question(cache={"tags": [EVIL]}), question()
    for each in (asked, asked, other):
        await guarded.ask(each)
    await page.goto(guarded.admin)
    await page.get_by_label("Admin key").fill(ADMIN_KEY)
    await page.get_by_role("button", name="Use it").click()
    rows = page.locator("#entries tbody tr")
    await expect(rows.filter(has_text=EVIL)).to_have_count(1)
    await page.get_by_label("Search by").select_option("tag")
    await page.get_by_label("for (empty: the most frequent)").fill(EVIL)
    await page.get_by_role("button", name="Search").click()
    await expect(rows).to_have_count(1)
    await rows.get_by_role("button").click()
    await expect(page.get_by_label("The answer's text")).to_have_text(EVIL)
    shown = page.get_by_label("The entry's content")
    await expect(shown).to_contain_text(orjson.dumps(EVIL).decode())
    purge = page.get_by_role("button", name="Purge this entry")
    await purge.click()
    await page.get_by_role("button", name="Keep").click()
    assert (await guarded.ask(asked))[1].startswith("tierserve; hit")
    await purge.click()
    await page.get_by_role("dialog").get_by_role("button", name="Purge").click()
    await expect(page.get_by_text("No entry matches.")).to_be_visible()
    await expect(shown).to_be_hidden()
    assert (await guarded.ask(asked))[1] == "tierserve; fwd=miss"
    assert (await guarded.ask(other))[1].startswith("tierserve; hit")
    await page.get_by_label("What").select_option("everything")
    await page.get_by_role("button", name="Purge…", exact=True).click()
    await page.get_by_role("dialog").get_by_role("button", name="Purge").click()
    await expect(page.locator("#purged")).to_have_text("Purged: everything.")
    assert (await guarded.ask(other))[1] == "tierserve; fwd=miss"
    assert await page.title() == "tierserve: tiers"


async def test_what_prompts_begin_with_is_shown(guarded, upstream, visit) -> None:
    await until_the_day_is_long()
    page = visit.page
    for number in range(3):
        system = {"role": "system", "content": EVIL}
        asked = question(messages=[system, {"role": "user", "content": f"Question {number}?"}])
        await guarded.ask(asked)
    await page.goto(guarded.admin)
    await page.get_by_label("Admin key").fill(ADMIN_KEY)
    await page.get_by_role("button", name="Use it").click()
    row = page.locator("#prefixes tbody tr").filter(has_text=EVIL)
    await expect(row).to_have_count(1)
    await expect(row.locator("td").nth(1)).to_have_text("3")
    await expect(row).to_contain_text("acme")
    assert await page.title() == "tierserve: tiers"


async def test_the_prefix_tier_is_shown(guarded, visit) -> None:
    page = visit.page
    await page.goto(guarded.admin)
    await page.get_by_label("Admin key").fill(ADMIN_KEY)
    await page.get_by_role("button", name="Use it").click()
    shown = page.locator("#prefix-tier")
    for text in ("in use", "3", "24.0 KiB of 64.0 MiB", "25.0 %", "90 s"):
        await expect(shown.locator("dd").filter(has_text=text)).to_have_count(1)


async def test_the_api_is_described(front, visit) -> None:
    page = visit.page
    await page.goto(f"{front.url}/docs")
    await page.get_by_label("Find a route").fill("chat")
    routes = page.locator(".operation:visible")
    await expect(routes).to_have_count(1)
    await routes.locator("summary").first.press("Enter")
    for text in ("Cache-Control", "cache", "503", "Cache-Status"):
        await expect(routes).to_contain_text(text)


_LOOK = """() => {
  const named = (field) => field.labels.length || field.ariaLabel;
  const fields = [...document.querySelectorAll("input, select, textarea")];
  const buttons = [...document.querySelectorAll("button, a")];
  const unnamed = [
    ...fields.filter((field) => !named(field)),
    ...buttons.filter((each) => !each.textContent),
  ];
  const style = getComputedStyle(document.documentElement);
  const names = ["--card", "--ink", "--quiet", "--accent", "--danger"];
  return {
    wide: document.documentElement.scrollWidth,
    width: document.documentElement.clientWidth,
    unnamed: unnamed.map((each) => each.outerHTML),
    colors: Object.fromEntries(names.map((name) => [name, style.getPropertyValue(name).trim()])),
  };
}"""


def _luminance(color: str) -> float:
    """As WCAG 2.2 defines it, of `#rrggbb`."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


_FETCH = """async ([url, key, asked]) => {
    const response = await fetch(url, {
        method: "POST",
        headers: {"Authorization": `Bearer ${key}`, "Content-Type": "application/json"},
        body: JSON.stringify(asked),
    });
    return [response.status, response.headers.get("Cache-Status"), await response.text()];
}"""


async def test_a_page_of_another_site_asks(guarded, upstream, visit) -> None:
    async def page(_: web.Request) -> web.StreamResponse:
        return web.Response(
            text="<!doctype html><link rel=icon href=data:,>", content_type="text/html"
        )

    upstream.handler = page
    await visit.page.goto(upstream.url + "/page")
    upstream.handler = answer
    url = guarded.url + CHAT
    for stream_it in (False, True):
        asked = question(stream=stream_it)
        for how in ("fwd=miss", "hit"):
            status, cache_status, text = await visit.page.evaluate(_FETCH, [url, KEY, asked])
            assert (status, cache_status.split("; ")[1], "yes" in text) == (200, how, True)
            await guarded.ask_alone(asked)
    by_chance = question(temperature=1)
    _, cache_status, _ = await visit.page.evaluate(_FETCH, [url, KEY, by_chance])
    assert cache_status == "tierserve; fwd=bypass"
