import dataclasses
import zipfile

import numpy as np
import orjson
import pytest

from server.bench.records import Records
from server.bench.results.figures import build_result
from server.bench.results.result import (
    RECORDS,
    RESULT,
    describe_machine,
    read_records,
    read_run,
    write_json,
    write_records,
)
from server.config.base import ConfigError

from .rows import make_measured, make_records, make_settings

RECORDS_OF_TWO = make_records([0.0, 1.0], gaps=[(0, 0.1), (1, 0.2)], probe=[False, True])


@pytest.fixture
def folder(tmp_path):
    result = build_result(make_measured(RECORDS_OF_TWO), make_settings())
    write_json(result, tmp_path / "out" / RESULT)
    write_records(RECORDS_OF_TWO, tmp_path / "out" / RECORDS)
    return tmp_path / "out"


def test_a_run_is_read_as_it_was_written(folder):
    for path in (folder, folder / RESULT):
        run = read_run(path)
        assert run.result["workload"]["digest"] == "d1"
        for field in dataclasses.fields(Records):
            ours = getattr(RECORDS_OF_TWO, field.name)
            theirs = getattr(run.records, field.name)
            np.testing.assert_allclose(theirs, ours) if field.name != "outcomes" else None
        assert run.records.outcomes == ["miss"]
    assert sorted(path.name for path in folder.iterdir()) == [RECORDS, RESULT]


def test_records_may_be_missing(folder):
    (folder / RECORDS).unlink()
    assert read_run(folder).records is None


def test_records_of_another_run_are_refused(folder):
    write_records(make_records([0.0, 1.0]), folder / RECORDS)
    with pytest.raises(ConfigError, match=r"should be of the same run as result.json"):
        read_run(folder)


def refuses(path, says):
    with pytest.raises(ConfigError, match=says) as raised:
        read_run(path)
    assert str(path) in raised.value.mistakes[0]


def test_what_is_no_result_is_refused_by_name(folder, tmp_path):
    refuses(tmp_path / "none", "No such file")
    refuses(tmp_path, "No such file")
    result = orjson.loads((folder / RESULT).read_bytes())
    for content, says in (
        (b"", "should be JSON"),
        (b"[" * 100_000, "should be JSON"),
        (b"[]", "should be a result of tierserve bench: it"),
        (b"{}", "version should be set"),
        (orjson.dumps({**result, "version": 2}), "version should be 1"),
        (orjson.dumps({**result, "whole": 3}), "whole should"),
        (orjson.dumps({**result, "more": 3}), "more"),
    ):
        (folder / RESULT).write_bytes(content)
        refuses(folder, says)


def test_damaged_records_are_refused_by_name(folder):
    file = folder / RECORDS
    whole = file.read_bytes()
    for content in (b"", whole[:300], whole[:400] + b"\xff" * 20 + whole[420:]):
        file.write_bytes(content)
        refuses(file.parent, "should be the records.npz")
    for change in (
        {"gap_row": np.array([0, 2])},
        {"outcome": np.array([0, 1])},
        {"status": np.array([200])},
        {"due": np.array(["a", "b"])},
        {"gaps": np.array([[1.0], [2.0]])},
    ):
        columns = {f.name: getattr(RECORDS_OF_TWO, f.name) for f in dataclasses.fields(Records)}
        np.savez(file, **{**columns, **change})
        refuses(file.parent, "it is damaged")


def test_records_of_objects_are_never_unpickled(folder):
    file = folder / RECORDS
    columns = {f.name: getattr(RECORDS_OF_TWO, f.name) for f in dataclasses.fields(Records)}
    np.savez(file, **{**columns, "due": np.array([print, print], dtype=object)})
    with pytest.raises(ConfigError, match="allow_pickle"):
        read_records(file)


def test_a_file_that_unpacks_to_too_much_is_refused(folder, monkeypatch):
    monkeypatch.setattr("server.bench.results.result._MOST_RECORDS_BYTES", 100)
    assert sum(each.file_size for each in zipfile.ZipFile(folder / RECORDS).infolist()) > 100
    with pytest.raises(ConfigError, match="should unpack to"):
        read_records(folder / RECORDS)
    monkeypatch.setattr("server.bench.results.result._MOST_RESULT_BYTES", 100)
    refuses(folder, "should have at most")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / RESULT).mkdir()
    with pytest.raises(ConfigError, match=r"--out: .*result.json can't be written"):
        write_json({}, tmp_path / RESULT)
    assert [path.name for path in tmp_path.iterdir()] == [RESULT]
    with pytest.raises(ConfigError, match="--out"):
        write_records(RECORDS_OF_TWO, tmp_path / RESULT)


def test_a_machine_has_processor_and_cores():
    assert describe_machine()["cores"] >= 1
    assert describe_machine()["processor"]
