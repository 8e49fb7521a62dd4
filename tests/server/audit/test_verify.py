"""Tampering with an audit log, of each kind, is found at its line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.audit.chain import BEGINNING, ChainLink, sealed
from server.audit.verify import MAX_PROBLEMS, verify
from server.cli import main

KEY = bytes(range(32))
Lines = list[bytes]


def chain(lines: int, key: bytes = KEY, before: ChainLink = BEGINNING) -> Lines:
    made = []
    for number in range(lines):
        line, before = sealed(key, {"time": "t", "act": "x", "what": {"n": number}}, before)
        made.append(line)
    return made


def problems(folder: Path, lines: Lines, key: bytes = KEY) -> list[str]:
    """Return what is found, without the file's name."""
    file = folder / "a.jsonl"
    file.write_bytes(b"".join(lines))
    return [each.replace(f"{file}:", "") for each in verify([file], key).problems]


def changed(lines: Lines) -> None:
    lines[3] = lines[3].replace(b'"n":3', b'"n":9')


def resealed(lines: Lines) -> None:
    lines[3] = chain(1, before=ChainLink(3, "", BEGINNING.seal))[0]


def removed(lines: Lines) -> None:
    del lines[3:5]


def replaced(lines: Lines) -> None:
    lines[3:6] = [b'{"act":"nothing"}\n']


def moved(lines: Lines) -> None:
    lines.insert(7, lines.pop(3))


def repeated(lines: Lines) -> None:
    lines.insert(8, lines[3])


def inserted(lines: Lines) -> None:
    lines.insert(3, b'{"act":"purge"}\n')


def emptied(lines: Lines) -> None:
    lines[3] = b"\n"


def first_changed(lines: Lines) -> None:
    lines[0] = b"x" + lines[0]


@pytest.mark.parametrize(
    ("tamper", "found"),
    [
        (changed, ["4 was changed or inserted", "number 4 is missing before 5"]),
        (emptied, ["4 was changed or inserted", "number 4 is missing before 5"]),
        (first_changed, ["1 was changed or inserted"]),
        (removed, ["numbers 4 to 5 are missing before 4"]),
        (replaced, ["4 was changed or inserted", "numbers 4 to 6 are missing before 5"]),
        (moved, ["number 4 is missing before 4", "8 was moved or repeated: number 4 behind 8"]),
        (inserted, ["4 was changed or inserted"]),
        (repeated, ["9 was moved or repeated: number 4 behind 8"]),
        (resealed, ["4 doesn't follow the one before: one of them was sealed anew",
                    "5 doesn't follow the one before: one of them was sealed anew"]),
    ],
)  # fmt: skip
def test_each_kind_is_named(
    tmp_path: Path, tamper: Callable[[Lines], None], found: list[str]
) -> None:
    lines = chain(10)
    assert problems(tmp_path, lines) == []
    tamper(lines)
    assert problems(tmp_path, lines) == found


@given(st.data())
def test_no_change_of_a_byte_is_overlooked(tmp_path_factory, data: st.DataObject) -> None:
    lines = chain(6)
    number = data.draw(st.integers(0, 5))
    at = data.draw(st.integers(0, len(lines[number]) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda value: value != lines[number][at]))
    lines[number] = lines[number][:at] + bytes([value]) + lines[number][at + 1 :]
    folder = tmp_path_factory.mktemp("changed")
    is_cut = (number, at) == (5, len(lines[5]) - 1)
    assert bool(problems(folder, lines)) != is_cut


@given(st.permutations(range(6)))
def test_no_other_order_is_overlooked(tmp_path_factory, order: list[int]) -> None:
    lines = chain(6)
    found = problems(tmp_path_factory.mktemp("moved"), [lines[number] for number in order])
    assert bool(found) == (order != sorted(order))


def test_a_chain_of_another_key_is_none_of_ours(tmp_path: Path) -> None:
    assert "is it the key of this log?" in problems(tmp_path, chain(3), bytes(31) + b"1")[0]
    forged = chain(4)[:3] + chain(4, key=b"")[3:]
    assert problems(tmp_path, forged) == ["4 was changed or inserted"]


@pytest.mark.parametrize("number", [-1, 0, 10**30])
def test_a_number_that_no_line_has_is_no_line_of_ours(tmp_path: Path, number: int) -> None:
    (forged,) = chain(1, key=b"", before=ChainLink(number - 1, "", ""))
    lines = chain(3, key=b"")
    assert problems(tmp_path, [*lines, forged], b"") == ["4 was changed or inserted"]


def test_what_is_told_is_bounded(tmp_path: Path) -> None:
    lines = [line for line in chain(MAX_PROBLEMS + 100) for _ in range(2)]
    assert len(problems(tmp_path, lines)) == MAX_PROBLEMS


def test_files_are_one_chain_in_any_order(tmp_path: Path) -> None:
    lines = chain(30)
    files = [tmp_path / name for name in ("a.jsonl", "a.1.jsonl", "a.2.jsonl")]
    for file, part in zip(files, (lines[20:], lines[10:20], lines[:10]), strict=True):
        file.write_bytes(b"".join(part))
    assert verify(files, KEY).problems == verify(files[::-1], KEY).problems == []
    assert verify([files[0], files[2]], KEY).problems == [
        f"numbers 11 to 20 are missing before {files[0]}:1"
    ]
    assert verify([], KEY).lines == 0


def test_the_copy_of_the_last_line_tells_of_what_is_missing(tmp_path: Path) -> None:
    lines = chain(5)
    file, copy = tmp_path / "a.jsonl", tmp_path / "a.jsonl.last"
    copy.write_bytes(lines[4])
    assert problems(tmp_path, lines) == []
    assert problems(tmp_path, lines[:4]) == ["number 5 is missing at the end"]
    assert problems(tmp_path, lines[:2]) == ["numbers 3 to 5 are missing at the end"]
    assert problems(tmp_path, []) == ["numbers 1 to 5 are missing at the end"]
    (older := tmp_path / "a.1.jsonl").write_bytes(b"".join(lines[:4]))
    assert verify([older], KEY).problems == ["number 5 is missing at the end"]
    # The newest file may have a number in its name, too.
    (year := tmp_path / "b.2026.jsonl").write_bytes(b"".join(lines[:4]))
    (tmp_path / "b.2026.jsonl.last").write_bytes(lines[4])
    assert verify([year], KEY).problems == ["number 5 is missing at the end"]
    other = chain(1, before=ChainLink(4, "", BEGINNING.seal))
    copy.write_bytes(other[0])
    assert problems(tmp_path, lines) == ["the last line is another than its copy"]
    # A kill may have left an older one; one that isn't whole is none.
    copy.write_bytes(lines[3])
    assert problems(tmp_path, lines) == verify([file], KEY).notes == []
    for data in (b"{}", chain(5, key=b"")[4]):
        copy.write_bytes(data)
        assert "cut off the end leave no trace" in verify([file], KEY).notes[0]


def test_the_command_tells_and_ends_with_a_status(tmp_path: Path, capsys) -> None:
    (file := tmp_path / "a.jsonl").write_bytes(b"".join(chain(3, key=b"")))
    assert main(["audit", "verify", str(file)]) == 0
    out = capsys.readouterr().out
    assert "3 lines, numbers 1 to 3, the last seal is " in out
    assert "note: without a key, a log that was sealed anew as a whole looks the same" in out
    assert out.endswith("unbroken\n")
    (key := tmp_path / "audit.key").write_text(KEY.hex())
    file.write_bytes(b"".join(chain(3)[1:]) + b"{")
    assert main(["audit", "verify", str(file), "--key-file", str(key)]) == 0
    out = capsys.readouterr().out
    assert f"{file}:1 has number 2: those before were rotated away, or removed" in out
    assert f"{file}:3 has no end: it was being written" in out
    file.write_bytes(b"".join(chain(3)[::-1]))
    assert main(["audit", "verify", str(file), "--key-file", str(key)]) == 1
    assert capsys.readouterr().out.endswith("broken\n")
    assert main(["audit", "verify", str(tmp_path / "no.jsonl")]) == 2
    assert "FILE should be a readable file, not " in capsys.readouterr().err
    assert main(["audit", "verify", str(file), "--key-file", str(file)]) == 2
    assert "--key-file: " in capsys.readouterr().err
