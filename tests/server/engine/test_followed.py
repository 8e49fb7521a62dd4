"""Models that follow what another process reports of them."""

import orjson
import pytest

from server.auth.limits import LocalUsage
from server.config.models import ModelConfig
from server.engine.followed import FollowedModels, ModelReport, UpstreamReport, report_on
from server.engine.models import Models
from server.engine.supervisor import EngineState
from server.engine.upstream import ENGINE_URL
from tests.server.engine.routing.ejected import eject


class Process:
    """The process that runs the engines."""

    def __init__(self, *, has_run: bool = True) -> None:
        self.unreachable: list[tuple[str, str]] = []
        self.has_run, self.asked = has_run, []

    def note_unreachable(self, model: str, upstream: str, exc: Exception) -> None:
        self.unreachable.append((model, upstream))

    async def has_run_since(self, model: str, since: float) -> bool:
        self.asked.append((model, since))
        return self.has_run


def of_engine(
    *, ready_since: float | None = None, identity: str = "weights", depends_on_date: bool = False
) -> ModelReport:
    state = EngineState.STARTING if ready_since is None else EngineState.READY
    upstream = UpstreamReport(ENGINE_URL, None, ready_since, loading=False, foreign=0)
    return ModelReport(
        "m", "m", {"m": identity}, depends_on_date, state, 2, "/tmp/engine.sock", [upstream]
    )


def passed(report: ModelReport) -> ModelReport:
    """Return the report as another process gets it."""
    return ModelReport.of_json(orjson.loads(orjson.dumps(report)))


@pytest.fixture
def configs() -> dict[str, ModelConfig]:
    return {"m": ModelConfig(source="weights", aliases=("alias",))}


def follow(configs: dict[str, ModelConfig], process: Process, *reports: ModelReport):
    return FollowedModels(configs, [*map(passed, reports)], process, lambda _: LocalUsage())


async def test_state_and_names_are_those_of_the_last_report(configs) -> None:
    models = follow(configs, Process(), of_engine())
    (model,) = models.all
    assert (model.state, model.restarts, model.upstreams.ready) == (EngineState.STARTING, 2, False)
    names = models.names()
    assert {name: names.resolve(name).identity for name in ("m", "alias")} == {
        "m": "weights",
        "alias": "weights",
    }
    models.follow([passed(of_engine(ready_since=5.0))])
    assert (model.state, model.upstreams.all[0].ready_since) == (EngineState.READY, 5.0)
    # Requests know by the object whether names have changed.
    assert models.names() is names
    models.follow([passed(of_engine(identity="other"))])
    assert models.names().resolve("alias").identity == "other"
    assert not model.upstreams.ready
    await models.close()


async def test_one_that_was_down_between_two_reports_gets_requests_at_once(configs) -> None:
    models = follow(configs, Process(), of_engine(ready_since=1.0))
    (upstream,) = models.all[0].upstreams.all
    eject(upstream)
    models.follow([passed(of_engine(ready_since=1.0))])
    assert not upstream.takes_requests
    models.follow([passed(of_engine(ready_since=2.0))])
    assert upstream.takes_requests
    await models.close()


@pytest.mark.parametrize("has_run", [True, False])
async def test_the_process_of_an_engine_says_whether_an_answer_is_whole(configs, has_run) -> None:
    process = Process(has_run=has_run)
    models = follow(configs, process, of_engine(ready_since=1.0))
    (upstream,) = models.all[0].upstreams.all
    # What was reported last may have changed meanwhile.
    assert await upstream.keeps_generating(since=2.0, model="m", headers={}) == has_run
    assert process.asked == [("m", 2.0)]
    await models.close()


async def test_a_failed_connection_is_told(configs) -> None:
    process = Process()
    models = follow(configs, process, of_engine(ready_since=1.0))
    (upstream,) = models.all[0].upstreams.all
    upstream.mark_unreachable(ConnectionRefusedError())
    assert process.unreachable == [("m", "engine")]
    assert not upstream.ready
    await models.close()


async def test_upstreams_of_the_user_are_followed_one_by_one() -> None:
    configs = {"m": ModelConfig(upstreams=("http://127.0.0.1:1", "http://127.0.0.1:2"))}
    owner = Models(configs)
    (model,) = owner.all
    model.upstreams.all[1].ready = True
    model.upstreams.members[1].load.note_requests(5)
    (report,) = map(passed, report_on(owner))
    assert report.socket is None
    followed = follow(configs, Process(), report)
    assert [each.ready for each in followed.all[0].upstreams.all] == [False, True]
    assert [each.load.foreign for each in followed.all[0].upstreams.members] == [0, 5]
    assert followed.names().resolve("m") == owner.names().resolve("m")
    stays = followed.all[0].upstreams.all[1]
    model.upstreams.replace(["http://user:secret@127.0.0.1:3", "http://127.0.0.1:2"])
    followed.follow([*map(passed, report_on(owner))])
    new, kept = followed.all[0].upstreams.all
    assert (new.label, new.ready, new.with_credentials({})) == (
        "http://127.0.0.1:3",
        False,
        {"Authorization": "Basic dXNlcjpzZWNyZXQ="},
    )
    assert kept is stays
    assert kept.ready
    for each in (owner, followed):
        await each.close()
