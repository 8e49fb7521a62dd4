"""Who has a folder open, who died, and who may write."""

import fcntl
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.tiers.child import Child
from tests.waiting import HANGS_S
from tiers.file_locks import set_lock
from tiers.prefix_kv import folder as folder_module
from tiers.prefix_kv.folder import MAX_DEATHS, Folder


def join(path: Path) -> Folder:
    folder = Folder(path)
    with folder.writing():
        folder.join()
    return folder


def join_for_ever(connection: Connection, path: Path) -> None:
    folder = join(path)
    connection.send(folder.owner)
    connection.recv()


def test_who_has_it_open_is_known_until_it_closes_or_dies(tmp_path) -> None:
    ours = join(tmp_path)
    assert not ours.is_shared()
    assert not ours.is_alive(ours.owner)
    other = join(tmp_path)
    assert ours.is_shared()
    assert ours.is_alive(other.owner)
    other.leave()
    assert not ours.is_alive(other.owner or ours.owner + 1)
    with Child(join_for_ever, tmp_path) as child:
        owner = child.connection.recv()
        assert ours.is_alive(owner)
    assert not ours.is_alive(owner)
    assert not ours.is_shared()
    ours.leave()


def test_deaths_in_a_row_are_counted_until_one_closes(tmp_path) -> None:
    def kill(times: int) -> None:
        for _ in range(times):
            with Child(join_for_ever, tmp_path) as child:
                child.connection.recv()

    kill(MAX_DEATHS - 1)
    join(tmp_path).leave()
    kill(MAX_DEATHS)
    folder = join(tmp_path)
    assert folder.may_kill
    folder.mark_whole()
    assert not folder.may_kill
    folder.leave()


def test_another_process_that_closes_does_not_hide_a_death(tmp_path) -> None:
    """As a worker does whose engine was killed by the index."""
    for _ in range(MAX_DEATHS):
        worker = join(tmp_path)
        with Child(join_for_ever, tmp_path) as engine:
            engine.connection.recv()
        worker.leave()
    folder = join(tmp_path)
    assert folder.may_kill
    folder.leave()


def test_deaths_on_purpose_are_forgiven(tmp_path) -> None:
    for _ in range(MAX_DEATHS):
        server = join(tmp_path)
        with Child(join_for_ever, tmp_path) as engine:
            engine.connection.recv()
        server.forgive_deaths()
        server.leave()
    folder = join(tmp_path)
    assert not folder.may_kill
    folder.leave()


def test_marks_are_kept(tmp_path) -> None:
    folder = join(tmp_path)
    assert not folder.is_ours
    assert not folder.is_damaged
    folder.mark_ours()
    folder.mark_damaged()
    folder.leave()
    folder = join(tmp_path)
    assert folder.is_ours
    assert folder.is_damaged
    folder.mark_whole()
    assert not folder.is_damaged
    folder.leave()


def test_one_writes_at_a_time_and_may_nest(tmp_path, monkeypatch) -> None:
    ours, theirs = join(tmp_path), join(tmp_path)
    monkeypatch.setattr(folder_module, "LOCK_WAIT_S", 0.01)
    failures: list[Exception] = []

    def write() -> None:
        try:
            with ours.writing():
                pass
        except TimeoutError as exc:
            failures.append(exc)

    with ours.writing():
        with ours.writing(), pytest.raises(TimeoutError), theirs.writing():
            pass
        # The inner one hasn't given up the lock, and another thread isn't let in either.
        with pytest.raises(TimeoutError), theirs.writing():
            pass
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    assert len(failures) == 1
    # Who waits for the lock has the turn, and comes before who asks later.
    set_lock(theirs._file, fcntl.F_WRLCK, folder_module._TURN)
    with pytest.raises(TimeoutError), ours.writing():
        pass
    set_lock(theirs._file, fcntl.F_UNLCK, folder_module._TURN)
    with theirs.writing():
        pass
    ours.leave()
    theirs.leave()


def write_for_ever(connection: Connection, path: Path) -> None:
    folder_module.LOCK_WAIT_S = HANGS_S
    folder = join(path)
    connection.send("open")
    while True:
        with folder.writing():
            sum(range(10_000))


def test_who_waits_gets_its_turn(tmp_path) -> None:
    with Child(write_for_ever, tmp_path) as one, Child(write_for_ever, tmp_path) as two:
        for child in (one, two):
            assert child.connection.recv() == "open"
        ours = join(tmp_path)
        for _ in range(20):
            with ours.writing():
                assert ours.is_shared()
        ours.leave()


def test_too_many_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(folder_module, "_SLOTS", 1)
    ours = join(tmp_path)
    with pytest.raises(OSError, match="1 processes"):
        join(tmp_path)
    ours.leave()
