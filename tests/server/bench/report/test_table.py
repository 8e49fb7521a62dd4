"""The table in a terminal."""

from server.bench.report.table import as_text
from server.bench.results.objective import parse
from tests.server.bench.made import CLOSED, measured, records, result


def test_rows_and_notes() -> None:
    lines = as_text(result()).splitlines()
    assert " m at http://host: 1,960 requests, offered for 60.0 s; " in lines[0]
    assert [line.split()[0] for line in lines[2:8]] == [
        "all", "memory", "disk", "miss", "failed", "probe",
    ]  # fmt: skip
    assert "from due p50" in lines[1]
    text = "\n".join(lines)
    assert "hit ratio: " in text
    assert "misses: 40.0% of " in text
    assert "errors: 35 status 500" in text
    assert "objective ttft=200ms@90%: attained by " in text
    assert lines[-3:] == [
        "valid", "  99% were sent within 2.2 ms of when due",
        "  clients read 99% of answers within 0.2 ms",
    ]  # fmt: skip


def test_a_limit_that_bound_nothing_is_told() -> None:
    text = as_text(result(objective=parse("shared.ttft=1ms@90%")))
    assert "requests/s; no request was shared, so that limit bound none" in text


def test_a_closed_loop_has_no_times_from_due() -> None:
    text = as_text(result(load=CLOSED))
    assert "from due" not in text.splitlines()[1]
    assert "closed loop: " in text


def test_an_invalid_run_says_why() -> None:
    few = result(measured(records(10), interrupted=True), objective=None)
    lines = as_text(few).splitlines()
    at = lines.index("INVALID: compare refuses this run, interrupted")
    assert any("requests were answered" in line for line in lines[at + 1 :])


def test_nothing_at_all() -> None:
    none = measured(records(0))
    assert "0 requests, offered for 60.0 s; 0/s until the last answer" in as_text(result(none))


def test_a_ramp() -> None:
    ramp = {
        "rate": 4.0, "text": "the objective holds up to 4 sessions/s",
        "outcomes": {
            "miss": {"highest_kept": None, "at_knee": None},
            "memory": {"highest_kept": 8.0, "at_knee": {"requests_per_s": 3.0}},
        },
    }  # fmt: skip
    lines = as_text({**result(), "ramp": ramp}).splitlines()
    assert lines[-3:] == [
        "ramp: the objective holds up to 4 sessions/s",
        "  memory: its own requests keep the objective up to 8.00 sessions/s; at the knee "
        "3.00/s kept it",
        "  miss: its own requests keep the objective at no rate",
    ]
