"""What is recorded of an act, and what happens where that is impossible."""

import asyncio
import json
import os
from contextlib import closing
from pathlib import Path

import pytest

from server.audit.actor import Actor, key_name
from server.audit.acts import Audit, AuditError
from server.audit.counted import MAX_GROUPS
from server.audit.log import AuditLog
from server.audit.verify import verify
from server.config.audit import AuditConfig
from server.config.secrets import hash_key
from tests.waiting import HANGS_S

ADMIN = Actor("admin", key_name("k"), "10.0.0.1", "id1")


@pytest.fixture(autouse=True)
def _patient(monkeypatch) -> None:
    """Let a slow disk take its time."""
    monkeypatch.setattr("server.audit.acts._WAIT_S", HANGS_S)
    monkeypatch.setattr("server.audit.log._CLOSE_S", HANGS_S)


def recording(folder: Path) -> closing[Audit]:
    return closing(Audit(AuditLog(AuditConfig(file=folder / "a.jsonl")), clock=lambda: 1e9))


def lines(folder: Path) -> list[dict]:
    made = [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]
    assert verify([folder / "a.jsonl"], b"").problems == []
    return [
        {name: value for name, value in line.items() if name not in ("seal", "previous")}
        for line in made
    ]


async def test_an_act_begins_on_disk_before_it_is_done(tmp_path: Path) -> None:
    with recording(tmp_path) as audit:
        async with audit.act("purge", ADMIN, {"tag": ["t"]}) as act:
            begun = lines(tmp_path)
            act.count = 3
        both = lines(tmp_path)
    assert begun == [
        {
            "number": 1, "time": "2001-09-09T01:46:40.000Z", "act": "purge", "who": "admin",
            "key": hash_key("k")[:11], "source": "10.0.0.1", "request_id": "id1",
            "what": {"tag": ["t"]}, "result": "begun",
        }
    ]  # fmt: skip
    assert both == [begun[0], begun[0] | {"number": 2, "count": 3, "result": "done"}]


@pytest.mark.parametrize(
    ("exc", "why"),
    [
        (ValueError("it is wrong"), "it is wrong"),
        (ValueError(), "ValueError"),
        (asyncio.CancelledError(), "it was interrupted"),
    ],
)
async def test_an_act_that_fails_says_why(tmp_path: Path, exc: BaseException, why: str) -> None:
    with recording(tmp_path) as audit:
        with pytest.raises(type(exc)):
            async with audit.act("import", ADMIN, {}):
                raise exc
        _, ended = lines(tmp_path)
    assert (ended["result"], ended["why"]) == ("failed", why)


async def test_what_can_not_be_recorded_is_not_done(tmp_path: Path) -> None:
    done = False
    with recording(tmp_path) as audit:
        (tmp_path / "a.jsonl").mkdir()
        with pytest.raises(AuditError, match="so nothing was done: Is a directory"):
            async with audit.act("purge", ADMIN, {}):
                done = True
        # A reload isn't asked for by a request: it may revoke a key.
        await audit.reloaded([Path("tenants.yaml")], "SIGHUP", [])
        (tmp_path / "a.jsonl").rmdir()
        async with audit.act("purge", ADMIN, {}):
            done = not done
    assert done
    assert [line["act"] for line in lines(tmp_path)] == ["lost_lines", "purge", "purge"]


async def test_an_act_whose_end_can_not_be_recorded_stands(tmp_path: Path, monkeypatch) -> None:
    with recording(tmp_path) as audit, monkeypatch.context() as patch:
        async with audit.act("purge", ADMIN, {}):
            patch.setattr(os, "fsync", lambda file: os.close(-1))
    assert [line["result"] for line in lines(tmp_path)] == ["begun"]


async def test_who_waits_no_more_has_a_line_all_the_same(tmp_path: Path) -> None:
    with recording(tmp_path) as audit:
        task = asyncio.create_task(audit.reloaded([], "SIGHUP", ["wrong"]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    (line,) = lines(tmp_path)
    assert (line["act"], line["result"], line["why"]) == ("reload", "failed", "wrong")


async def test_a_flood_of_refusals_is_few_lines(tmp_path: Path) -> None:
    with recording(tmp_path) as audit:
        for number in range(10_000):
            actor = Actor("", key_name(str(number)), f"10.0.0.{number % 250}", f"id{number}")
            audit.count("refused_key", actor, "/v1/models" + "x" * (number % 1000))
        audit.count("refused_route", Actor("acme", source="10.0.0.1"), "/pause")
    made = lines(tmp_path)
    assert [line["act"] for line in made] == (MAX_GROUPS + 1) * ["refused_key"] + ["refused_route"]
    assert sum(line["count"] for line in made if line["act"] == "refused_key") == 10_000
    others = [line for line in made if line["source"] == "others"]
    assert [line["count"] for line in others] == [10_000 - 10 * MAX_GROUPS]
    assert made[0]["what"] == {"path": "/v1/models", "since": "2001-09-09T01:46:40.000Z"}
    assert made[0]["source"] == "10.0.0.0"


async def test_counts_are_written_soon_at_first_and_then_seldom(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    with recording(tmp_path) as audit:
        audit.count("refused_key", ADMIN, "/a")
        assert audit._flush_at.when() <= loop.time() + 1
        audit._flush()
        audit.count("refused_key", ADMIN, "/b")
        assert audit._flush_at.when() >= audit._flushed_at + 30
        audit.count("refused_key", ADMIN, "/b")
    assert [(line["what"]["path"], line["count"]) for line in lines(tmp_path)] == [
        ("/a", 1),
        ("/b", 2),
    ]


async def test_without_a_log_nothing_is_recorded() -> None:
    audit = Audit(None)
    audit.count("refused_key", ADMIN, "/")
    await audit.reloaded([], "SIGHUP", [])
    async with audit.lifetime(), audit.act("purge", ADMIN, {}) as act:
        act.count = 1
    audit.close()
    assert not audit.is_on
