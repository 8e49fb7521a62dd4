"""What of a configuration can change while the server runs, and when its files are read again."""

import asyncio
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.config import reload
from server.config.base import ConfigError, Section
from server.config.changes import is_reloaded, take_over
from server.config.load import load
from server.config.reload import ReloadCollector, Reloads, RunningConfig
from server.config.schema import Config
from tests.waiting import HANGS_S

RUNNING = {
    "models": {
        "far": {"upstreams": ["http://one:1"], "api_key": "secret"},
        "own": {"source": "embedded"},
    },
    "tiers": {"disk": {"encryption_key": "0123456789abcdef" * 4}},
}


def running(**more: dict) -> Config:
    return Config(**(RUNNING | more))


def fields(holder: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[Section, tuple[str, ...]]]:
    """Yield each field that isn't a section, by the section that has it and its path."""
    items = holder.items() if isinstance(holder, dict) else holder
    for name, value in items:
        if isinstance(value, Section) or (value and name == "models"):
            yield from fields(value, (*path, name))
        else:
            yield holder, (*path, name)


def replaced(holder: Any, path: tuple[str, ...], value: Any) -> Any:
    name, *rest = path
    if isinstance(holder, dict):
        return holder | {name: replaced(holder[name], tuple(rest), value)}
    new = replaced(getattr(holder, name), tuple(rest), value) if rest else value
    return holder.model_copy(update={name: new})


def reloaded_fields(config: Config) -> set[str]:
    """Return the paths of all fields that can change."""
    return {
        ".".join(path) for section, path in fields(config) if is_reloaded(type(section), path[-1])
    }


def test_each_field_that_can_not_change_is_named() -> None:
    config = running()
    for section, path in fields(config):
        if not is_reloaded(type(section), path[-1]):
            merged, changes = take_over(config, replaced(config, path, object()))
            assert changes == ([], [".".join(path)])
            assert merged == config


def test_what_can_change_does_and_the_rest_is_named() -> None:
    far = {"upstreams": ["http://one:1", "http://two:1"], "api_key": "other", "max_requests": 7}
    read = running(
        models={"own": {"source": "embedded", "timeout_s": 5}, "far": far, "new": far},
        cache={"ttl_s": 60, "max_answer_bytes": "8MiB"},
        tiers={"memory": None, "disk": RUNNING["tiers"]["disk"] | {"max_bytes": "2MiB"}},
    )
    merged, (taken, waiting) = take_over(running(), read)
    assert sorted(taken) == [
        "cache.ttl_s",
        "models.far.max_requests",
        "models.far.upstreams",
        "models.own.timeout_s",
        "tiers.disk.max_bytes",
    ]
    assert sorted(waiting) == [
        "cache.max_answer_bytes", "models.far.api_key", "models.new", "tiers.memory",
    ]  # fmt: skip
    assert [*merged.models] == ["far", "own"]
    assert merged.models["far"].upstreams == ("http://one:1", "http://two:1")
    assert merged.models["far"].api_key == "secret"
    assert merged.cache.ttl_s == 60
    assert (merged.tiers.memory, merged.tiers.disk.max_bytes) == (
        running().tiers.memory,
        2 * 1024**2,
    )
    assert take_over(merged, read)[1].taken == []


def test_what_fits_only_with_what_waits_waits_too() -> None:
    # Upstreams in place of an engine, and one with a password beside the key that stays.
    there = [{"source": "embedded"}, {"upstreams": ["http://u:p@one:1"]}]
    for far in there:
        read = running(models={**RUNNING["models"], "far": far})
        merged, (taken, waiting) = take_over(running(), read)
        assert (merged, taken) == (running(), [])
        assert {"models.far.upstreams", "models.far.api_key"} <= {*waiting}


async def test_a_file_is_read_when_it_is_whole_and_a_wrong_one_changes_nothing(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setenv("TIERSERVE__CACHE__VARIANTS", "2")
    file, used, noted, now = tmp_path / "c.yaml", [], asyncio.Queue(), 1000.0
    file.write_text("cache: {ttl_s: 1, variants: 3}")
    config = RunningConfig(file, Config(), used.append)
    config.use(config.read())
    assert (used.pop().cache.ttl_s, config.now.cache.variants) == (1, 2)

    async def note(*args: Any) -> None:
        await noted.put(args)

    reloads = Reloads([config], note, 0.01, clock=lambda: now)

    def metrics() -> list[float]:
        return [each.samples[0].value for each in ReloadCollector(reloads).collect()]

    async def next_note() -> tuple:
        async with asyncio.timeout(HANGS_S):
            return await noted.get()

    task = asyncio.create_task(reloads.watch())
    try:
        assert metrics() == [1, 1000]
        # As long as it is another at each look, it isn't read.
        now, look, looks = 2000.0, reload._state, iter(range(5))

        def half_written(part: RunningConfig) -> Any:
            if (number := next(looks, None)) is None:
                return look(part)
            file.write_text("cache: {ttl_s: 2}\nserver: {port: 9}" if number == 4 else "")
            return [number]

        monkeypatch.setattr(reload, "_state", half_written)
        assert await next_note() == ((file,), "they changed", [])
        assert [each.cache.ttl_s for each in used] == [2]
        assert "server.port: changes at the next start" in caplog.text
        assert "changed: cache.ttl_s\n" in caplog.text
        assert metrics() == [1, 2000]
        now = 3000.0
        file.write_text("cache: {ttl_s: 3, rules: [{ttl_s: no}]}\nserver: {prot: 9}")
        _, _, mistakes = await next_note()
        assert sorted(each.partition(":")[0] for each in mistakes) == [
            "cache.rules.0.ttl_s", "server.prot",
        ]  # fmt: skip
        assert metrics() == [0, 2000]
        reloads.ask()
        assert (await next_note())[1] == "SIGHUP"
        file.unlink()
        assert "should be a readable file" in (await next_note())[2][0]
        assert len(used) == 1
        file.write_text("cache: {ttl_s: 2}")
        assert (await next_note())[2] == []
        assert (len(used), metrics()) == (1, [1, 3000])
    finally:
        task.cancel()
    assert noted.empty()


async def test_a_config_map_is_read_where_its_link_leads_now(tmp_path: Path, caplog) -> None:
    """As Kubernetes mounts one: it moves the link to a folder, and removes the folder before."""
    for number in (1, 2):
        (folder := tmp_path / f"..{number}").mkdir()
        text = f"cache: {{ttl_s: {number}}}\ntenants: {{file: keys.yaml}}"
        (folder / "c.yaml").write_text(text)
    (tmp_path / "..data").symlink_to("..1")
    (file := tmp_path / "c.yaml").symlink_to("..data/c.yaml")
    used, noted = [], asyncio.Queue()

    async def note(*args: Any) -> None:
        await noted.put(args)

    config = RunningConfig(file, load(file), used.append)
    task = asyncio.create_task(Reloads([config], note, 0.01).watch())
    try:
        (tmp_path / "new").symlink_to("..2")
        (tmp_path / "new").replace(tmp_path / "..data")
        shutil.rmtree(tmp_path / "..1")
        async with asyncio.timeout(HANGS_S):
            assert await noted.get() == ((file,), "they changed", [])
    finally:
        task.cancel()
    assert [each.cache.ttl_s for each in used] == [2]
    # Files that it names are beside it, as they were.
    assert config.now.tenants.file == tmp_path / "..data" / "keys.yaml"
    assert "at the next start" not in caplog.text


def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    """As of `--config <(decrypt config.yaml)`."""
    os.mkfifo(pipe := tmp_path / "c.yaml")
    assert RunningConfig(pipe, Config(), print).files == ()


def test_a_file_with_a_mistake_names_it(tmp_path: Path) -> None:
    (file := tmp_path / "c.yaml").write_text("cache: {ttl: 3}")
    with pytest.raises(ConfigError, match=r"cache.ttl: unknown key; did you mean ttl_s\?"):
        RunningConfig(file, Config(), print).read()
