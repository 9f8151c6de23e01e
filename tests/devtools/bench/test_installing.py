from __future__ import annotations

import os
from pathlib import Path

import pytest

from devtools.bench import installing
from kohya_mps.core.errors import UsageError
from tests.support.installs import Small, make_settings


def test_a_file_with_several_names_counts_once(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for tree in (first, second):
        tree.mkdir()
    (first / "data").write_bytes(os.urandom(100_000))
    alone = installing.disk_usage(first)
    os.link(first / "data", second / "same")
    both = installing.disk_usage(first, second)
    assert alone >= 100_000
    assert both == alone
    (second / "same").unlink()
    (second / "other").write_bytes(os.urandom(100_000))
    assert installing.disk_usage(first, second) >= alone + 100_000


def test_without_an_installation_it_says_what_brings_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refusal:
        installing.nothing_to_do(make_settings(tmp_path / "home"), tmp_path, 1)
    assert "invoke setup" in refusal.value.fix


def test_a_second_environment_of_the_same_lock_shares_its_files(small: Small, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (comparison,) = installing.second_generation(small.settings, scratch, 1)
    assert comparison.unit == "MB"
    assert 0 <= comparison.ours < comparison.bare
