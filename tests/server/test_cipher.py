"""The key of what is encrypted at rest: how it is written, and what a wrong one does."""

import os
from base64 import b64encode
from pathlib import Path

import pytest

from server.chain import build
from server.cli import main
from server.config import ConfigError, load

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
        assert chain.tiers[-1].backend._seal._key == KEY
        await chain.close()


@pytest.mark.parametrize(
    "content", [None, "", "SECRET", KEY.hex()[1:], b64encode(KEY[1:]).decode()]
)
def test_a_key_that_is_none_is_said_and_not_shown(tmp_path: Path, capsys, content) -> None:
    if content is not None:
        (tmp_path / "key").write_text(content)
    file = config(tmp_path, "encryption_key_file: key")
    assert main(["check", "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("tiers.disk.encryption_key_file: ")
    assert not content or content not in said
    if content:
        with pytest.raises(ConfigError, match=r"tiers.disk.encryption_key: should be 32 bytes in"):
            load(config(tmp_path, f"encryption_key: '{content}'"))
    with pytest.raises(ConfigError, match="only one can hold the key"):
        load(config(tmp_path, f"encryption_key: {KEY.hex()}, encryption_key_file: key"))


async def test_a_server_does_not_start_with_another_key(tmp_path: Path) -> None:
    chain, _ = build(load(config(tmp_path, f"encryption_key: {KEY.hex()}")))
    await chain.close()
    before = (tmp_path / "disk" / "data.mdb").read_bytes()
    for fields, said in (
        (f"encryption_key: {os.urandom(32).hex()}", "it is encrypted with another key"),
        ("", "it is encrypted, and there is no key"),
    ):
        with pytest.raises(ConfigError, match=f"encryption_key: the file in .* as it is: {said}"):
            build(load(config(tmp_path, fields)))
    assert (tmp_path / "disk" / "data.mdb").read_bytes() == before
