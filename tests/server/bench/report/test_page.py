"""The page: whole, alone, and safe whatever others named."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from server.bench.report.page import as_page, write_page
from server.bench.report.plots import draw
from server.config.base import ConfigError
from tests.server.bench.made import BEGAN, CLOSED, measured, records, result

VOID = {"meta", "br", "img", "link"}


class Outline(HTMLParser):
    """Checks that elements are closed in order, and keeps what a page refers to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.links: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.links += [
            value or ""
            for name, value in attributes
            if name in ("src", "href", "xlink:href", "action") and value
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page(tmp_path: Path, found, rows) -> str:
    file = tmp_path / "report.html"
    write_page(found, rows, BEGAN, file)
    return file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return page(tmp_path_factory.mktemp("page"), result(), records())


def test_the_page_needs_nothing_else(text: str) -> None:
    outline = Outline(text)
    assert "script" not in outline.seen
    assert outline.seen.count("svg") == 6
    assert [link for link in outline.links if not link.startswith(("#", "data:image/png"))] == []
    assert "@import" not in text
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text)


def test_what_the_page_shows(text: str) -> None:
    for part in ("Valid run", "By outcome", "Latencies", "memory", "probe", "status 500",
                 "ttft=200ms@90%", "first token, from sending", "currentColor"):  # fmt: skip
        assert part in text
    # The distance from the verdict to the plots is the reader's: tables of outcomes come first.
    assert text.index("Valid run") < text.index("By outcome") < text.index("<svg")


def test_names_of_others_are_escaped_and_a_closed_loop_has_one_plot_less(tmp_path) -> None:
    evil = "<script>alert(1)</script>&\"'"
    rows = records()
    rows.outcomes[0] = evil
    found = result(measured(rows), CLOSED, model=evil, workload=evil)
    found["errors"] = {evil: 1}
    found["verdict"][0]["text"] = evil
    text = page(tmp_path, found, rows)
    assert "<script" not in text
    assert Outline(text).seen.count("svg") == 5


def test_runs_without_answers(tmp_path) -> None:
    none = records(0)
    assert Outline(page(tmp_path, result(measured(none)), none)).seen.count("svg") == 0
    rows = records()
    failed = rows.where(rows.failure != 0)
    text = page(tmp_path, result(measured(failed)), failed)
    assert Outline(text).seen.count("svg") == 2
    one = rows.where(rows.failure == 0).where(rows.session[rows.failure == 0] == 0)
    assert Outline(page(tmp_path, result(measured(one)), one)).seen.count("svg") == 6


def test_plots_are_the_same_each_time(text: str) -> None:
    assert all(plot.svg in text for plot in draw(records(), BEGAN, is_open=True))


def test_a_ramp(tmp_path) -> None:
    probe = {"rate": 2.0, "passed": True, "reason": "<ok>", "attainment": 1.0,
             "interval": (0.9, 1.0)}  # fmt: skip
    ramp = {"text": "the objective holds", "probes": [probe]}
    text = as_page({**result(), "ramp": ramp}, [])
    assert "holds: &lt;ok&gt;" in text
    assert "the objective holds" in text


def test_a_file_that_cannot_be_written(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"--out: .* can't be written"):
        write_page(result(), records(0), BEGAN, tmp_path / "none" / "report.html")
