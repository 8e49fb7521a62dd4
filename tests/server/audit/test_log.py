"""The file of an audit log: what was reported as written is there, sealed, and goes on."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from server.audit.log import AuditLog, copy_of_last, rotated
from server.audit.verify import Verification, verify
from server.config.audit import AuditConfig
from server.config.base import ConfigError
from tests.waiting import HANGS_S

KEY = bytes(range(32))


def config(folder: Path, *, files: int = 8, keyed: bool = True) -> AuditConfig:
    """A log whose files have the least size."""
    key_file = folder / "audit.key"
    key_file.write_text(KEY.hex())
    return AuditConfig(
        file=folder / "a.jsonl",
        key_file=key_file if keyed else None,
        max_bytes=64 * 1024,
        files=files,
    )


def opened(made: AuditConfig) -> AuditLog:
    log = AuditLog(made)
    log.check()
    return log


def put(log: AuditLog, number: int, **more: object) -> OSError | None:
    """Have an entry written, and wait; returns the error."""
    done, errors = threading.Event(), []

    def note(error: OSError | None) -> None:
        errors.append(error)
        done.set()

    log.submit({"time": "2026-11-29T00:00:00.000Z", "act": "x", "what": {"n": number}} | more, note)
    assert done.wait(HANGS_S)
    return errors[0]


def found_in(folder: Path, key: bytes = KEY) -> Verification:
    return verify([*folder.glob("a*.jsonl")], key)


def acts(folder: Path) -> list[str]:
    lines = (folder / "a.jsonl").read_text().splitlines()
    return [line.split('"act":"')[1].split('"')[0] for line in lines]


@pytest.mark.parametrize("keyed", [True, False])
def test_lines_are_one_chain_over_restarts(tmp_path: Path, keyed: bool) -> None:
    made = config(tmp_path, keyed=keyed)
    for start in (0, 10):
        log = opened(made)
        for number in range(start, start + 10):
            assert put(log, number, path="\ud800\n\x1b") is None
        log.close()
    found = found_in(tmp_path, KEY if keyed else b"")
    assert (found.lines, found.first, found.last.number) == (20, 1, 20)
    assert found.problems == found.notes == []
    assert (tmp_path / "a.jsonl").read_bytes().isascii()
    assert (tmp_path / "a.jsonl").stat().st_mode & 0o077 == 0


def test_it_goes_on_over_rotations_and_keeps_so_many_files(tmp_path: Path) -> None:
    made = config(tmp_path, files=3)
    for start in range(0, 1600, 400):
        log = opened(made)
        for number in range(start, start + 400):
            done = put if number == start + 399 else lambda log, n: log.submit(entry(n), ignore)
            done(log, number)
        log.close()
    names = sorted(path.name for path in tmp_path.glob("a*.jsonl"))
    assert names == ["a.1.jsonl", "a.2.jsonl", "a.jsonl"]
    sizes = [path.stat().st_size for path in tmp_path.glob("a*.jsonl")]
    assert max(sizes) < 64 * 1024 + 64 * 300
    found = found_in(tmp_path)
    assert found.problems == []
    assert found.last.number == 1600
    (note,) = found.notes
    assert f"has number {found.first}: those before were rotated away, or removed" in note


def entry(number: int) -> dict:
    return {"time": "", "act": "x", "what": {"n": number}}


def ignore(_: OSError | None) -> None:
    pass


def test_it_is_one_chain_wherever_somebody_moves_the_files(tmp_path: Path) -> None:
    """Several processes write, and logrotate gives each file a name that we don't know."""
    made = config(tmp_path)
    logs = [opened(made), opened(made)]
    for number, log in enumerate((*logs, logs[0], logs[1])):
        put(log, number)
        put(log, number)
        made.file.rename(tmp_path / f"a.jsonl-{number}")
    for log in logs:
        log.close()
    log = opened(made)
    put(log, 4)
    log.close()
    found = verify([made.file, *tmp_path.glob("a.jsonl-*")], KEY)
    assert (found.lines, found.problems, found.notes) == (9, [], [])
    assert acts(tmp_path) == ["x"]


def test_a_line_that_was_cut_is_removed_and_counted(tmp_path: Path) -> None:
    made = config(tmp_path)
    log = opened(made)
    put(log, 0)
    log.close()
    with made.file.open("ab") as file:
        file.write(b'{"number":2,"ti')
    cut = found_in(tmp_path)
    assert cut.problems == []
    assert "2 has no end: it was being written, or a kill or a full disk cut it" in cut.notes[0]
    log = opened(made)
    put(log, 1)
    log.close()
    assert acts(tmp_path) == ["x", "cut_line", "x"]
    assert '"count":15' in made.file.read_text()
    assert found_in(tmp_path).problems == []


@pytest.mark.parametrize("is_running", [True, False])
def test_lines_cut_off_the_end_leave_a_gap(tmp_path: Path, is_running: bool) -> None:
    made = config(tmp_path)
    log = opened(made)
    for number in range(3):
        put(log, number)
    if not is_running:
        log.close()
    lines = made.file.read_bytes().splitlines(keepends=True)
    os.truncate(made.file, len(lines[0]))
    assert found_in(tmp_path).problems == ["numbers 2 to 3 are missing at the end"]
    if not is_running:
        log = opened(made)
    put(log, 3)
    log.close()
    (problem,) = found_in(tmp_path).problems
    assert problem == f"numbers 2 to 3 are missing before {made.file}:2"


def test_without_the_copy_of_the_last_line_it_goes_on_and_says_so(tmp_path: Path) -> None:
    made = config(tmp_path)
    for number in range(2):
        log = opened(made)
        put(log, number)
        log.close()
        copy_of_last(made.file).unlink()
    assert acts(tmp_path) == ["x", "lost_copy", "x"]
    assert found_in(tmp_path).problems == []


def test_another_key_begins_another_chain_in_another_file(tmp_path: Path) -> None:
    made = config(tmp_path)
    log = opened(made)
    put(log, 0)
    log.close()
    (tmp_path / "audit.key").write_text(bytes(32).hex())
    log = opened(made)
    put(log, 1)
    log.close()
    assert acts(tmp_path) == ["new_chain", "x"]
    assert verify([made.file], bytes(32)).problems == []
    assert verify([rotated(made.file, 1)], KEY).problems == []
    assert "no line has a seal of this key" in verify([made.file], KEY).problems[0]


def test_what_the_disk_does_not_take_is_an_error_and_counted(
    tmp_path: Path, monkeypatch, caplog
) -> None:
    log = opened(config(tmp_path))
    put(log, 0)

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        errors = [put(log, number) for number in (1, 2)]
    assert all(error is not None and error.errno == 28 for error in errors)
    assert put(log, 3) is None
    log.close()
    assert acts(tmp_path) == ["x", "lost_lines", "x"]
    assert '"count":2' in (tmp_path / "a.jsonl").read_text()
    assert found_in(tmp_path).problems == []
    told = [
        record.message.partition("a.jsonl ")[2]
        for record in caplog.records
        if record.name == "server.audit.log"
    ]
    assert told == ["can't be written: No space left on device", "can be written again"]


def test_a_line_that_would_be_too_long_has_a_digest(tmp_path: Path) -> None:
    log = opened(config(tmp_path))
    put(log, 0, what={"key": ["k" * 500] * 1000})
    put(log, 1)
    log.close()
    first = (tmp_path / "a.jsonl").read_text().splitlines()[0]
    assert '"what":{"sha256":"' in first
    assert len(first) < 1000
    assert found_in(tmp_path).problems == []


@pytest.mark.parametrize(
    ("made", "field"),
    [
        ({"file": "no/a.jsonl"}, r"log\.audit\.file: should be a file that we can write"),
        ({"file": "a.jsonl", "key_file": "no.key"}, r"log\.audit\.key_file: .*No such file"),
        ({"file": "a.jsonl", "key_file": "short"}, r"log\.audit\.key_file: .*32 bytes in hex"),
    ],
)
def test_what_can_not_be_used_is_named(tmp_path: Path, made: dict[str, str], field: str) -> None:
    (tmp_path / "short").write_text("abc")
    with pytest.raises(ConfigError, match=field):
        opened(AuditConfig(**{name: tmp_path / path for name, path in made.items()}))


WRITER = """
import sys
from pathlib import Path
from tests.server.audit.test_log import config, opened, put
log = opened(config(Path(sys.argv[1])))
for number in range(int(sys.argv[2])):
    assert put(log, number) is None
    print(number, flush=True)
log.close()
"""


def writer(folder: Path, lines: int) -> subprocess.Popen:
    command = [sys.executable, "-c", WRITER, str(folder), str(lines)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def test_several_processes_write_one_chain(tmp_path: Path) -> None:
    config(tmp_path)
    writers = [writer(tmp_path, 100) for _ in range(2)]
    for each in writers:
        each.communicate()
        assert each.returncode == 0
    found = found_in(tmp_path)
    assert (found.lines, found.last.number, found.problems) == (200, 200, [])


def test_a_kill_loses_no_line_that_was_reported(tmp_path: Path) -> None:
    config(tmp_path)
    reported = 0
    for number in range(3):
        killed = writer(tmp_path, 100_000)
        assert killed.stdout is not None
        for _ in range(20 + number):
            killed.stdout.readline()
        killed.send_signal(signal.SIGKILL)
        rest, _ = killed.communicate()
        reported += 20 + number + rest.count(b"\n")
    found = found_in(tmp_path)
    assert found.problems == []
    # A cut line of an earlier kill is counted in a line of its own, and many lines rotate.
    assert found.last.number >= reported
