"""Which upstreams a request may be sent to, by their health and load."""

import pytest

from server.auth.limits import Limits, LocalUsage
from server.engine.routing.addresses import UpstreamAddress
from server.engine.routing.load import Estimate
from server.engine.routing.members import Member, Members
from server.engine.routing.placement import Placement, Placing
from server.engine.upstream import UnavailableError, Upstream
from tests.server.engine.routing.ejected import eject


@pytest.fixture
async def members():
    made = Members(
        [UpstreamAddress(f"http://127.0.0.1:{port}") for port in range(1, 6)],
        lambda address: Upstream(address.url, timeout_s=1),
        lambda _: LocalUsage(),
        Limits(max_requests=8),
        Estimate(),
    )
    for member in made.all:
        member.upstream.ready = True
    yield made.all
    await made.close()


def place(members: tuple[Member, ...], kept_id: str | None = None) -> Placement:
    return Placing(Estimate(), "least", b"").place(members, {}, None, kept_id)


async def test_those_that_fail_again_and_again_get_nothing(members) -> None:
    eject(members[0].upstream)
    eject(members[1].upstream)
    assert set(place(members).order) == {*members[2:]}
    # One of them may keep an answer.
    assert set(place(members, "resp_1").order) == {*members}


async def test_where_most_fail_all_are_asked(members) -> None:
    for member in members[:3]:
        eject(member.upstream)
    assert set(place(members).order) == {*members}
    # Those that are down count for nothing.
    members[0].upstream.ready = False
    assert set(place(members).order) == {*members[3:]}


async def test_one_whose_engine_loads_is_better_than_none(members) -> None:
    for member in members:
        member.upstream.ready = False
    with pytest.raises(UnavailableError):
        place(members)
    members[4].upstream.loading = True
    assert place(members).order == [members[4]]
