"""The key of what is encrypted at rest: how it is written, and what a wrong one does."""

import asyncio
import os
import subprocess
from base64 import b64encode
from pathlib import Path

import orjson
import pytest

from server.cache import build
from server.cli import main
from server.config.base import ConfigError
from server.config.load import load
from tests.server.conftest import Front, Upstream, alike, question
from tests.waiting import HANGS_S
from tiers.disk.marks import IN_USE

KEY = os.urandom(32)


def config(folder: Path, fields: str) -> Path:
    file = folder / "c.yaml"
    disk = f"path: {folder}/disk, max_bytes: 1MiB"
    upstreams = "models: {m: {upstreams: ['http://127.0.0.1:1']}}\nadmin: {socket: null}\n"
    file.write_text(f"{upstreams}tiers: {{disk: {{{disk}{fields and ', ' + fields}}}}}\n")
    return file


@pytest.mark.parametrize(
    "key",
    [KEY.hex(), KEY.hex().upper(), b64encode(KEY).decode()],
    ids=["lower", "upper", "base64"],
)
@pytest.mark.parametrize("in_file", [False, True])
async def test_a_key_is_written_in_hexadecimal_or_base64(tmp_path, capsys, key, in_file) -> None:
    (tmp_path / "key").write_text(f"{key}\n")
    field = "encryption_key_file: key" if in_file else f"encryption_key: '{key}'"
    file = config(tmp_path, field)
    assert main(["check", "--config", str(file)]) == 0
    printed = capsys.readouterr().out
    assert key not in printed
    assert f"encryption_key_file: {tmp_path}/key" in printed or not in_file
    for _ in range(2):
        chain, _ = build(load(file))
        assert chain.tiers[-1].backend._cipher._key == KEY
        await chain.close()


@pytest.mark.parametrize(
    "content",
    [None, "", "SECRET", KEY.hex()[1:], b64encode(KEY[1:]).decode()],
    ids=["missing", "empty", "word", "hex", "base64"],
)
def test_a_key_that_is_none_is_said_and_not_shown(tmp_path: Path, capsys, content) -> None:
    if content is not None:
        (tmp_path / "key").write_text(content)
    file = config(tmp_path, "encryption_key_file: key")
    assert main(["check", "--config", str(file)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("tiers.disk.encryption_key_file: ")
    assert not content or content not in message
    if content:
        with pytest.raises(ConfigError, match=r"tiers.disk.encryption_key: should be 32 bytes in"):
            load(config(tmp_path, f"encryption_key: '{content}'"))
    with pytest.raises(ConfigError, match="only one can hold the key"):
        load(config(tmp_path, f"encryption_key: {KEY.hex()}, encryption_key_file: key"))


async def test_a_server_does_not_start_with_another_key(tmp_path: Path) -> None:
    chain, _ = build(load(config(tmp_path, f"encryption_key: {KEY.hex()}")))
    await chain.close()
    before = (tmp_path / "disk" / "data.mdb").read_bytes()
    for fields, message in (
        (f"encryption_key: {os.urandom(32).hex()}", "it is encrypted with another key"),
        ("", "it is encrypted, and there is no key"),
    ):
        with pytest.raises(
            ConfigError, match=f"encryption_key: the file in .* as it is: {message}"
        ):
            build(load(config(tmp_path, fields)))
    assert (tmp_path / "disk" / "data.mdb").read_bytes() == before


@pytest.mark.asyncio(loop_scope="module")
async def test_a_server_that_was_killed_does_not_go_on_with_another_key(
    upstream: Upstream, tmp_path: Path
) -> None:
    """It learns of the key at its start or, where the file has to be verified, after that."""
    disk = {"path": str(tmp_path / "disk"), "max_bytes": "4MiB", "encryption_key": KEY.hex()}
    front = Front(tmp_path, alike(upstream.url), disk=disk)
    await front.start()
    await front.ask(question())
    front.process.kill()
    await front.stop()
    changed = orjson.loads(front.config.read_bytes())
    changed["tiers"]["disk"]["encryption_key"] = os.urandom(32).hex()
    front.config.write_bytes(orjson.dumps(changed))
    for is_trusted in (True, False):
        if not is_trusted:
            (tmp_path / "disk" / IN_USE).unlink()
        process = await asyncio.create_subprocess_exec(*front.command, stderr=subprocess.PIPE)
        _, message = await asyncio.wait_for(process.communicate(), HANGS_S)
        assert process.returncode == (2 if is_trusted else 1)
        assert b"it is encrypted with another key" in message
