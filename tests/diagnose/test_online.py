"""What the doctor asks the network, answered by repositories on this disk."""

from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec
import pytest

from kohya_mps.core.installation import Installation
from kohya_mps.diagnose.machine_facts import MachineFacts, machine_facts
from kohya_mps.diagnose.online import torch_pair, with_network
from tests.support.installs import make_settings

BROKEN = "torch==2.8.0.*\ntorchvision==0.22.*\n-r requirements.txt\n"


def repository(path: Path, files: dict[str, str]) -> str:
    path.mkdir()
    git = ["git", "-C", str(path)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    for name, text in {"README": "", **files}.items():
        (path / name).write_text(text)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "x"], check=True)
    return str(path)


def checked(home: Path, url: str) -> MachineFacts:
    settings = msgspec.structs.replace(make_settings(home), url=url)
    return with_network(machine_facts(settings, Installation(home)), settings)


@pytest.mark.parametrize(
    ("files", "pair", "broken"),
    [
        ({"requirements_macos_arm64.txt": BROKEN}, "torch==2.8.0.* with torchvision==0.22.*", True),
        (
            {"requirements_macos_arm64.txt": BROKEN.replace("0.22", "0.23")},
            "torch==2.8.0.* with torchvision==0.23.*",
            False,
        ),
        ({"requirements_macos_arm64.txt": "numpy\n"}, "", None),
        ({}, "", None),
    ],
)
def test_upstreams_newest_requirements_are_read(
    files: dict[str, str], pair: str, broken: bool | None, tmp_path: Path
) -> None:
    url = repository(tmp_path / "upstream", files)
    found = checked(tmp_path / "home", url)

    assert (found.repository, found.repository_reached) == (url, True)
    assert (found.upstream_pair, found.upstream_pair_broken) == (pair, broken)


def test_a_repository_and_an_index_that_do_not_answer_say_why(tmp_path: Path) -> None:
    found = checked(tmp_path / "home", str(tmp_path / "none"))

    assert (found.repository_reached, found.index_reached) == (False, False)
    assert found.repository_reason
    assert found.index_reason  # uv may not use the network in the tests
    assert (found.upstream_pair, found.upstream_pair_broken) == ("", None)


@pytest.mark.parametrize(
    ("requirements", "pair", "broken"),
    [
        (BROKEN, "torch==2.8.0.* with torchvision==0.22.*", True),
        ("torch==2.5.1\ntorchvision==0.20.1", "torch==2.5.1 with torchvision==0.20.1", False),
        ("torchvision==0.15.2 # x\ntorch==2.0", "torchvision==0.15.2 with torch==2.0", False),
        ("torch==2.0.0\ntorchvision==1.15", "torch==2.0.0 with torchvision==1.15", True),
        ("torch==1.13.1\ntorchvision==0.14.1", "torch==1.13.1 with torchvision==0.14.1", False),
        ("torch>=2\ntorchvision==0.20.1 torch==2 ???", "", None),
        ("torch>=2.5.1\ntorchvision==0.20.1", "", None),
        ("torch==2\ntorchvision==0.20.1", "", None),
        ("torch==2.*\ntorchvision==0.20.1", "", None),
        ("torch==2.5.1\nnumpy==1.26", "", None),
        ("", "", None),
    ],
)
def test_a_torch_and_a_torchvision_that_exclude_each_other(
    requirements: str, pair: str, broken: bool | None
) -> None:
    assert torch_pair(requirements) == (pair, broken)
