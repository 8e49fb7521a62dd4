"""Pieces of files: each object is found again by its number."""

import pickle
from array import array
from pathlib import Path

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.bench.workloads.files.pieces import PieceFile, content_digest, pieces
from server.config.base import ConfigError

texts = st.text('ab"\\[]{},\n')
values = st.integers(-9, 9) | texts | st.lists(texts, max_size=2) | st.dictionaries(texts, texts)
objects = st.lists(st.dictionaries(texts, values, max_size=3), max_size=5)
# A file that each example writes anew.
again = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@again
@given(objects, st.booleans(), st.sampled_from([b"\n", b"\n\n", b" \r\n"]))
def test_objects_are_found_again(tmp_path: Path, given_, is_array: bool, end: bytes) -> None:
    file = tmp_path / "a.json"
    if is_array:
        file.write_bytes(b" [" + (b"," + end).join(map(orjson.dumps, given_)) + end + b"]")
    else:
        file.write_bytes(b"".join(orjson.dumps(each) + end for each in given_))
    found = list(pieces(file))
    assert [piece.fields for piece in found] == given_
    spans = array("q", [at for piece in found for at in (piece.start, piece.end)])
    read = pickle.loads(pickle.dumps(PieceFile(file, spans)))
    assert len(read) == len(given_)
    assert [read.fields(number) for number in range(len(read))] == given_


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"a": 1}\n{"a"', r":2: should be JSON"),
        ("[1, 2]\n", None),
        ('{"a": 1}\n3\n', r":2: should be a JSON object"),
        ("[[1]]", r":1: should be a JSON object"),
        ('[{"a": 1}, {"b"', r"should be JSON: the array has no end"),
        ('[{"a": 1}, {"b"}]', r":2: should be JSON"),
        ("", None),
    ],
)
def test_what_is_wrong_has_a_line(tmp_path: Path, content: str, problem: str | None) -> None:
    file = tmp_path / "a.json"
    file.write_text(content)
    if problem is None:
        assert list(pieces(file)) == []
        return
    with pytest.raises(ConfigError, match=rf"^--workload: .*a\.json:? ?{problem}"):
        list(pieces(file))


def test_a_file_has_to_be_there_and_to_stay(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for read in (content_digest, lambda path: list(pieces(path))):
        with pytest.raises(ConfigError, match="should be a readable file: No such file"):
            read(file)
    file.write_bytes(b'{"a": 1}\n')
    read = PieceFile(file, array("q", [0, 8]))
    assert read.fields(0) == {"a": 1}
    file.write_bytes(b"[]")
    with pytest.raises(ConfigError, match="should stay as it is"):
        read.fields(0)
    digest = content_digest(file)
    file.write_bytes(b"[ ]")
    assert content_digest(file) != digest
