from __future__ import annotations

import os

import pytest

from devtools.chaos import network
from devtools.chaos.testbed import REBUILD, STALL_SECONDS, CannotTry, Testbed
from tests.support.installs import Upstream


@pytest.mark.slow
@pytest.mark.parametrize("answer", [network.silence, network.half_a_page])
def test_an_index_that_stops_answering_fails_in_time_and_leaves_nothing(
    answer: network.Answer, testbed: Testbed
) -> None:
    variables = {"UV_CACHE_DIR": str(testbed.root / "empty")}
    with network.serving(answer) as port:
        ran = testbed.python(REBUILD, **variables, **network.only_index(port))

    assert ran.code == 1
    assert "uv could not install" in ran.err
    assert ran.seconds < network.INDEX_SECONDS * 20
    assert not os.path.lexists(testbed.home.venv)
    testbed.assert_no_leftovers()
    assert testbed.python(REBUILD).code == 0


@pytest.mark.slow
def test_a_git_server_that_stops_half_way_fails_in_time_and_the_rerun_ends_good(
    testbed: Testbed, upstream: Upstream
) -> None:
    try:
        with network.git_server(upstream.kohya_ss / ".git") as server:
            relay = network.Relay(server)
            relay.limit = 900  # more than git asks first, and less than everything
            with network.serving(relay) as port:
                ran = testbed.invoke("clone", KOHYA_REPO_URL=f"git://127.0.0.1:{port}/.git")
    except CannotTry as reason:
        pytest.skip(str(reason))

    assert relay.passed == relay.limit
    assert ran.code == 1
    assert f"sent nothing for {STALL_SECONDS:g} seconds" in ran.err
    assert testbed.invoke("clone").code == 0
    testbed.assert_no_leftovers()


@pytest.mark.slow
def test_the_fault_of_a_silent_index_is_survived(stand_in: Testbed) -> None:
    row = network.network_index(stand_in)
    assert (row.tries, row.survived) == (2, 2), row.failures
