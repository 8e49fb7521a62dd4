"""The audit log of a real server: each act leaves its lines, in one chain, and no secret."""

import asyncio
import json
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from server.audit.verify import Verification, verify
from server.cli import main
from server.config.secrets import hash_key
from tests.server.admin.test_exports import entry, export
from tests.server.conftest import Front, Upstream, alike, free_port, question, running
from tests.server.workers.fleet import Fleet
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEYS = {"acme": "key-of-acme-0123456789", "ops": "key-of-ops-0123456789"}
ADMIN_KEY, WRONG_KEY = "key-of-admin-0123456789", "key-of-nobody-0123456789"
SEALING_KEY, KEY = "5e" * 32, "ab" * 32


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def sections(folder: Path) -> dict[str, dict]:
    """Write the files of tenants and of the key; returns what names them."""
    tenants = {
        name: {"keys": [hash_key(key)], "operator": name == "ops"} for name, key in KEYS.items()
    }
    (folder / "tenants.yaml").write_text(json.dumps(tenants))
    (folder / "audit.key").write_text(SEALING_KEY)
    return {
        "tenants": {"file": "tenants.yaml"},
        "admin": {"port": free_port(), "key": ADMIN_KEY},
        "log": {"audit": {"file": "audit.jsonl", "key_file": "audit.key"}},
    }


def lines(front: Front) -> list[dict]:
    text = (front.config.parent / "audit.jsonl").read_text()
    # The last may be half written.
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def of(front: Front, act: str) -> list[dict]:
    return [line for line in lines(front) if line["act"] == act]


async def until_line(front: Front, act: str, times: int = 1) -> list[dict]:
    async with asyncio.timeout(HANGS_S):
        while len(found := of(front, act)) < times:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return found


def verified(front: Front) -> Verification:
    file = front.config.parent / "audit.jsonl"
    return verify([file], bytes.fromhex(SEALING_KEY))


def admin_at(front: Front) -> str:
    return f"http://127.0.0.1:{json.loads(front.config.read_text())['admin']['port']}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def audited(_upstream: Upstream, tmp_path_factory) -> AsyncIterator[Front]:
    folder = tmp_path_factory.mktemp("audited")
    options = {"sections": sections(folder), "headers": bearer(KEYS["ops"])}
    async with running(folder, _upstream, **options) as made:
        yield made


async def ask_admin(front: Front, method: str, path: str, **options) -> tuple[int, str]:
    headers = bearer(options.pop("key", ADMIN_KEY)) | {"X-Request-Id": "mine"}
    async with (
        aiohttp.ClientSession(admin_at(front), headers=headers) as session,
        session.request(method, path, **options) as reply,
    ):
        return reply.status, await reply.text()


async def cache(front: Front, *arguments: str) -> int:
    return await asyncio.to_thread(main, ["cache", *arguments, "--config", str(front.config)])


async def test_acts_of_an_administrator_have_two_lines(audited: Front, upstream) -> None:
    asked = question(cache={"tags": ["t1"]})
    await audited.ask(asked)
    assert (await ask_admin(audited, "POST", "/purge", json={"tag": ["t1", "t2"]}))[0] == 200
    begun, done = of(audited, "purge")
    common = {
        "act": "purge", "who": "admin", "key": hash_key(ADMIN_KEY)[:11], "source": "127.0.0.1",
        "request_id": "mine", "what": {"tag": ["t1", "t2"]},
    }  # fmt: skip
    assert common.items() <= begun.items()
    assert (begun["result"], done["result"], done["count"]) == ("begun", "done", {"labels": 2})
    given = b"".join(export((KEY, entry("a", stored_at=1e9, ttl_s=1e10))))
    assert (await ask_admin(audited, "POST", "/import", data=given))[0] == 200
    _, done = of(audited, "import")
    assert done["count"]["stored"] == 1
    status, exported = await ask_admin(audited, "GET", "/export")
    _, done = of(audited, "export")
    assert (status, done["count"]) == (200, {"entries": len(exported.splitlines()) - 2})
    assert (await ask_admin(audited, "GET", f"/entries/{KEY}"))[0] == 200
    assert (await ask_admin(audited, "DELETE", f"/entries/{KEY}"))[0] == 204
    assert [(line["what"], line["result"]) for line in of(audited, "show")] == [
        ({"key": KEY}, "begun"),
        ({"key": KEY}, "done"),
    ]
    assert of(audited, "purge")[-1]["what"] == {"key": [KEY]}
    assert (await ask_admin(audited, "POST", "/compact"))[0] == 409
    assert of(audited, "compact")[-1]["why"].startswith("Stop the server first")
    # What shows no answers leaves none.
    before = len(lines(audited))
    for path in ("/stats", "/entries", "/config"):
        assert (await ask_admin(audited, "GET", path))[0] == 200
    assert len(lines(audited)) == before


async def test_the_command_s_acts_come_from_a_user_and_a_process(audited: Front) -> None:
    assert await cache(audited, "purge", "--all", "--yes") == 0
    line = of(audited, "purge")[-1]
    assert (line["who"], line["what"], line["result"]) == ("admin", {"all": True}, "done")
    assert line["source"].startswith("unix:uid=")
    assert "key" not in line


async def test_what_is_refused_is_counted(audited: Front) -> None:
    async with aiohttp.ClientSession(audited.url) as session:
        for _ in range(3):
            async with session.get("/v1/models", headers=bearer(WRONG_KEY)) as reply:
                assert reply.status == 401
        async with session.post("/pause", headers=bearer(KEYS["acme"])) as reply:
            assert reply.status == 403
        for method, path in (("POST", "/pause"), ("GET", "/is_paused"), ("POST", "/tokenize")):
            async with session.request(method, path, headers=bearer(KEYS["ops"])):
                pass
    assert (await ask_admin(audited, "GET", "/stats", key=WRONG_KEY))[0] == 401
    # The page at /admin asks for them again and again.
    for _ in range(2):
        assert (await ask_admin(audited, "GET", "/prefixes"))[0] == 200
    await until_counted(
        audited,
        {
            ("refused_key", "", WRONG_KEY, "/v1/models", "refused"): 3,
            ("refused_key", "", WRONG_KEY, "/stats", "refused"): 1,
            ("refused_route", "acme", KEYS["acme"], "/pause", "refused"): 1,
            ("operator_route", "ops", KEYS["ops"], "/pause", "allowed"): 1,
            ("show_prompts", "admin", ADMIN_KEY, "/prefixes", "allowed"): 2,
        },
    )


async def until_counted(front: Front, wanted: dict[tuple[str, ...], int]) -> None:
    """Wait for the lines of counted requests: by act, tenant, key, path and result."""
    wanted = {
        (act, who, hash_key(key)[:11], path, result): count
        for (act, who, key, path, result), count in wanted.items()
    }
    found: Counter[tuple[str, ...]] = Counter()
    async with asyncio.timeout(HANGS_S):
        while found != wanted:
            await asyncio.sleep(0.05)
            found = Counter()
            for line in lines(front):
                if line["act"].startswith(("refused", "operator", "show_p")):
                    who, what = line.get("who", ""), line["what"]["path"]
                    found[line["act"], who, line["key"], what, line["result"]] += line["count"]


async def test_reloads_have_their_files_and_mistakes(audited: Front) -> None:
    file = audited.config.parent / "tenants.yaml"
    audited.process.send_signal(signal.SIGHUP)
    lines = await until_line(audited, "reload", 2)
    assert [(line["who"], line["result"]) for line in lines] == 2 * [("host", "done")]
    assert [line["what"] for line in lines] == [
        {"files": [str(each)], "cause": "SIGHUP"} for each in (audited.config, file)
    ]
    right = file.read_text()
    file.write_text("{")
    line = (await until_line(audited, "reload", 3))[-1]
    assert (line["what"]["cause"], line["result"]) == ("they changed", "failed")
    assert "is no YAML" in line["why"]
    file.write_text(right)
    await until_line(audited, "reload", 4)


async def test_a_disk_that_fails_stops_acts_and_nothing_else(audited: Front, upstream) -> None:
    file = audited.config.parent / "audit.jsonl"
    away = file.rename(file.with_suffix(".away"))
    file.mkdir()
    asked = question()
    await audited.ask_alone(asked)
    status, text = await ask_admin(audited, "POST", "/purge", json={"all": True})
    assert status == 503
    assert "The audit log can't be written, so nothing was done: Is a directory." in text
    assert "; hit" in (await audited.ask(asked))[1]
    file.rmdir()
    away.rename(file)
    assert (await ask_admin(audited, "POST", "/purge", json={"all": True}))[0] == 200


async def test_it_is_one_chain_without_secrets(audited: Front) -> None:
    found = verified(audited)
    assert (found.problems, found.notes) == ([], [])
    text = (audited.config.parent / "audit.jsonl").read_text()
    secrets = (*KEYS.values(), ADMIN_KEY, WRONG_KEY, SEALING_KEY, "question")
    assert [secret for secret in secrets if secret in text] == []
    assert all(hash_key(key) not in text for key in (*KEYS.values(), ADMIN_KEY))


async def test_kills_starts_and_acts_without_a_server_are_in_the_chain(
    tmp_path: Path, upstream: Upstream
) -> None:
    front = Front(tmp_path, alike(upstream.url), sections=sections(tmp_path))
    front.headers = bearer(KEYS["ops"])
    await front.start()
    await front.ask(question())
    # It is written while the server begins to answer.
    (start,) = await until_line(front, "start")
    assert (start["what"]["pid"], start["what"]["workers"]) == (front.process.pid, 1)
    front.process.kill()
    await front.stop()
    for arguments in (("purge", "--tag", "t"), ("compact",), ("verify", "--repair"), ("stats",)):
        assert await cache(front, *arguments) == 0
    assert [(line["act"], line["result"], line["who"]) for line in lines(front)[1:]] == [
        (act, result, "host")
        for act in ("purge", "compact", "repair")
        for result in ("begun", "done")
    ]
    await front.start()
    async with aiohttp.ClientSession(front.url) as session:
        await session.get("/v1/models", headers=bearer(WRONG_KEY))
    await front.stop()
    # What is counted is written before the end.
    assert {line["act"] for line in lines(front)[-2:]} == {"stop", "refused_key"}
    found = verified(front)
    assert found.problems == found.notes == []


async def test_workers_and_their_master_write_one_chain(tmp_path: Path, upstream: Upstream) -> None:
    made = Fleet(
        tmp_path, alike(upstream.url), sections=sections(tmp_path), headers=bearer(KEYS["ops"])
    )
    async with made as fleet:
        for client in fleet.clients.values():
            async with client.session.get("/v1/models", headers=bearer(WRONG_KEY)) as reply:
                assert reply.status == 401
        assert (await fleet.admin("POST", "/purge", json={"all": True}))[0] == 200
        fleet.process.send_signal(signal.SIGHUP)
        await until_line(fleet, "reload", 2)
    assert [line["what"].get("workers") for line in of(fleet, "start")] == [2]
    assert sum(line["count"] for line in of(fleet, "refused_key")) == 2
    assert [line["result"] for line in of(fleet, "purge")] == ["begun", "done"]
    assert len(of(fleet, "stop")) == 1
    found = verified(fleet)
    assert (found.problems, found.notes) == ([], [])


async def test_a_server_that_can_not_record_its_start_does_not_serve(tmp_path: Path) -> None:
    made = sections(tmp_path)
    made["log"]["audit"]["file"] = "no/audit.jsonl"
    front = Front(tmp_path, alike("http://127.0.0.1:1"), sections=made)
    ended = subprocess.run(front.command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert "log.audit.file: should be a file that we can write, not " in ended.stderr
