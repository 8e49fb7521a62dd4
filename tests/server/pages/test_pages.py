"""The pages over HTTP: what their files may do, and whose numbers they show."""

import re
from pathlib import Path

import pytest
import pytest_asyncio
import yaml

import server.pages
from server.config.secrets import hash_key, new_key
from tests.server.conftest import question, running
from tests.servers import free_port

pytestmark = pytest.mark.asyncio(loop_scope="module")

FOLDER = Path(server.pages.__file__).with_name("static")
FILES = sorted(FOLDER.iterdir())
KEYS = {name: new_key() for name in ("acme", "globex", "ops")}
ADMIN_KEY = new_key()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guarded(_upstream, tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    given = {name: {"keys": [hash_key(key)]} for name, key in KEYS.items()}
    given["ops"]["operator"] = True
    (folder / "tenants.yaml").write_text(yaml.safe_dump(given))
    port = free_port()
    sections = {
        "tenants": {"file": "tenants.yaml"},
        "admin": {"port": port, "key": ADMIN_KEY},
        "models": {"m": {"upstreams": [_upstream.url], "api_key": "sk-of-the-engine"}},
    }
    async with running(folder, _upstream, sections=sections) as made:
        made.admin = f"http://127.0.0.1:{port}"
        yield made


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
async def test_files_are_whole_and_have_nothing_inline_or_from_elsewhere(file: Path) -> None:
    text = file.read_text()
    assert not re.search(
        r"https?://(?!www\.w3\.org/2000/svg)|innerHTML|eval\(|document\.write", text
    )
    if file.suffix == ".html":
        assert not re.search(r"<style|style=|<script(?![^>]*src=)|\son\w+=", text)
        assert '<html lang="en">' in text
        assert 'name="viewport"' in text
    for name in re.findall(r'(?:from "\./|pages/)([\w.]+)"', text):
        assert (FOLDER / name).is_file()


async def test_they_come_with_a_policy_and_an_etag(guarded) -> None:
    paths = ["/", "/docs"] + [f"/pages/{f.name}" for f in FILES if f.suffix != ".html"]
    targets = [guarded.url + path for path in paths] + [f"{guarded.admin}/admin"]
    for target in targets:
        nobody = {"Authorization": ""}
        async with guarded.session.get(target, headers=nobody) as reply:
            assert reply.status == 200, target
            whole = await reply.read()
            headers = reply.headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-cache"
        policy = headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy
        assert "unsafe" not in policy
        assert "Set-Cookie" not in headers
        known = nobody | {"If-None-Match": headers["ETag"]}
        async with guarded.session.get(target, headers=known) as reply:
            assert (reply.status, await reply.read()) == (304, b"")
            assert reply.headers["ETag"] == headers["ETag"]
        async with guarded.session.head(target, headers=nobody) as reply:
            assert reply.status == 200
            assert int(reply.headers["Content-Length"]) == len(whole)


async def test_no_other_file_is_given_out(guarded) -> None:
    for path in ("home.html", "admin.html", "../files.py", "..%2ffiles.py", "%2e%2e/files.py", ""):
        async with guarded.session.get(f"/pages/{path}", headers=bearer(KEYS["acme"])) as reply:
            assert reply.status in (403, 404), path


async def test_our_own_paths_are_read_only(guarded, upstream) -> None:
    ours = ["/", "/docs", "/health", "/metrics", "/openapi.json", "/overview", "/pages/home.js"]
    key = bearer(KEYS["ops"])
    for target in [guarded.url + path for path in ours] + [f"{guarded.admin}/admin"]:
        for method in ("POST", "PUT", "DELETE", "TRACE", "OPTIONS"):
            async with guarded.session.request(method, target, headers=key) as reply:
                assert (reply.status, reply.headers["Allow"]) == (405, "GET, HEAD"), target
                assert (await reply.json())["error"]["code"] == 405
    assert upstream.asked == []


async def test_a_tenant_sees_itself_and_an_operator_all(guarded, upstream) -> None:
    asked = question()
    for name, times in (("acme", 3), ("globex", 1)):
        for _ in range(times):
            await guarded.ask(asked, headers=bearer(KEYS[name]))

    async def overview(target: str, key: str) -> dict:
        async with guarded.session.get(f"{target}/overview", headers=bearer(key)) as reply:
            assert reply.status == 200
            assert reply.headers["Cache-Control"] == "no-store"
            return await reply.json()

    def answered(shown: dict) -> dict[str, int]:
        return {name: sum(ring) for name, ring in shown["history"]["answered"].items()}

    acme = await overview(guarded.url, KEYS["acme"])
    assert answered(acme) == {"engine": 1, "memory": 2}
    assert acme["history"]["saved_since_start"]["tokens"] == 2
    assert acme["tenant"] == "acme"
    assert "tiers" not in acme
    assert answered(await overview(guarded.url, KEYS["globex"])) == {"engine": 1}
    everything = await overview(guarded.url, KEYS["ops"])
    assert answered(everything) == {"engine": 2, "memory": 2}
    assert [tier["tier"] for tier in everything["tiers"]] == ["memory", "disk"]
    assert everything["tiers"][0]["entries"] == 2
    assert answered(await overview(guarded.admin, ADMIN_KEY)) == {"engine": 2, "memory": 2}


async def test_the_configuration_is_shown_without_secrets(guarded) -> None:
    async with guarded.session.get(f"{guarded.admin}/config", headers=bearer(ADMIN_KEY)) as reply:
        text = await reply.text()
        assert (await reply.json())["tiers"]["promote_after"] == 2
    for secret in (ADMIN_KEY, hash_key(ADMIN_KEY), "sk-of-the-engine"):
        assert secret not in text
