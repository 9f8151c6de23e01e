"""The operator data: there for every profile, from the wheel, and answering as a Mac does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from devtools.rehearsal import operators
from devtools.rehearsal.mps_messages import Text
from devtools.rehearsal.operators import Operators, Served
from kohya_mps.core import settings
from kohya_mps.install import lockfile

SMALL = Operators(
    torch="9.9.0",
    made="2026-01-01",
    wheel=("cp311-cp311-macosx_11_0_arm64", "0" * 64),
    kernels=frozenset({"add.Tensor"}),
    fallback=frozenset({"linalg_svd"}),
    refused=frozenset({"_slow_conv2d_forward"}),
    python={"native_group_norm": "torch._refs:native_group_norm"},
    texts=frozenset({Text.MM.value}),
)


def torch_of(profile: str) -> str:
    lock = lockfile.read(settings.load_profile(profile).lock_file)
    return lock.versions(lockfile.MAC_ARM64)["torch"]


@pytest.mark.parametrize("profile", settings.profile_names())
def test_every_profiles_torch_has_data(profile: str) -> None:
    found = operators.load(torch_of(profile))

    assert found.torch == torch_of(profile)
    assert {"add.Tensor", "_mps_convolution", "mm.out"} <= found.kernels
    assert not found.kernels & (found.fallback | found.refused | found.python.keys())
    assert found.texts <= {text.value for text in Text}


def test_a_local_part_of_the_version_does_not_matter() -> None:
    assert operators.load("2.5.1+cu124") == operators.load("2.5.1")


def test_an_unknown_torch_is_refused_with_the_command_that_helps() -> None:
    with pytest.raises(
        LookupError, match=r"no operator data for torch 1\.0\.0.*2\.5\.1.*nox -s rehearse_data"
    ):
        operators.load("1.0.0")


@pytest.mark.parametrize(
    ("name", "composite", "served"),
    [
        ("add.Tensor", True, Served.KERNEL),
        ("linalg_svd", True, Served.FALLBACK),
        ("native_group_norm", False, Served.PYTHON),
        ("reshape", True, Served.COMPOSITE),
        ("_slow_conv2d_forward", True, Served.MISSING),
        ("linalg_eig", False, Served.MISSING),
    ],
)
def test_how_an_operator_is_served(name: str, composite: bool, served: Served) -> None:
    assert SMALL.served(name, composite) is served


def test_a_data_file_reads_back_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "DATA", tmp_path)
    operators.path_for("9.9.0").write_text(operators.dump(SMALL))

    assert operators.load("9.9.0") == SMALL
    assert operators.known() == ["9.9.0"]


def test_nothing_else_needs_the_rehearsals() -> None:
    """Everything that people type still loads where the contributors' tools have been removed."""
    modules = (settings.ROOT / "kohya_mps").glob("[!p]*/*.py")
    paths = sorted(path.relative_to(settings.ROOT).with_suffix("") for path in modules)
    names = ["tasks", *(".".join(path.parts) for path in paths if path.name != "__init__")]
    code = "import sys, importlib; sys.modules['devtools'] = None\n" + "\n".join(
        f"importlib.import_module({name!r})" for name in names
    )

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=settings.ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert "kohya_mps.core.settings" in names
