from __future__ import annotations

from pathlib import Path

from devtools.locks import dependency_chain, make
from tests.support.lock_files import write_in_file
from tests.support.wheelhouse import wheel


def test_a_chain_is_the_shortest_and_a_circle_ends() -> None:
    needs = {"a": ["b", "c"], "b": ["a", "d"], "c": ["d"], "d": ["e"]}
    assert dependency_chain.chain(needs, ["a", "d"], "e") == "d needs e"
    assert dependency_chain.chain(needs, ["a"], "e") == "a needs b needs d needs e"
    assert dependency_chain.chain(needs, ["a"], "unknown") == "unknown"


def test_a_chain_in_a_lock_is_read_from_uvs_comments(constraints: Path) -> None:
    write_in_file(constraints, "plain", "outer ; sys_platform == 'linux'")
    house = constraints.parent / "wheels"
    wheel(house, "outer", "2.0", requires=["middle>=1", "plain"])
    lock = make.make("train")
    assert dependency_chain.chain_in_lock(lock, "Triton") == "outer needs middle needs triton"
    assert dependency_chain.chain_in_lock(lock, "plain") == "plain"
    assert dependency_chain.chain_in_lock(lock, "gone") == "gone"


def test_what_a_profile_forbids_on_macos_counts_only_where_a_mac_installs_it() -> None:
    names = {"triton", "torch", "torchaudio"}
    assert dependency_chain.forbidden(names, on_mac={"torch"}) == []
    assert dependency_chain.forbidden(names, on_mac=names) == [("triton", "is forbidden on macOS")]
