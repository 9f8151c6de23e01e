from __future__ import annotations

from pathlib import Path

import pytest

from devtools.rehearsal import operators, wheel
from devtools.rehearsal.mps_messages import Text
from devtools.rehearsal.operators import Operators
from kohya_mps.core import settings
from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.report import Report
from tests.support import wheelhouse
from tests.support.installs import make_profile
from tests.support.mps_library import BY_HAND, GENERATED, Registration, write
from tests.support.torchgen import unpacked

TAG = "cp311-cp311-macosx_11_0_arm64"
FROM_PYTHON = """
def _init():
    from ..._refs import group as _group
    from torch._decomp import backward
    library = Library('aten', 'IMPL')
    library.impl('group', _group, 'MPS')
    library.impl('backward', backward, 'MPS')
    library.impl('elsewhere', backward, 'CUDA')
"""


def tree(root: Path, kernels: tuple[str, ...] = ("mm", "mm.out")) -> Path:
    """What a torch wheel for macOS has of what is read, unpacked."""
    root.mkdir()
    unpacked(root, "mm no mm.out", "mm.out yes -", "linalg_svd no -")
    (root / "torch" / "lib").mkdir(parents=True)
    (root / "torch" / "backends" / "mps").mkdir(parents=True)
    (root / "torch" / "backends" / "mps" / "__init__.py").write_text(FROM_PYTHON)
    by_hand = [Registration("linalg_svd", general=True), Registration("_slow_conv2d_forward")]
    functions = {GENERATED: [Registration(name) for name in kernels], BY_HAND: by_hand}
    write(root / "torch" / "lib" / "libtorch_cpu.dylib", functions, extra=Text.MM.value.encode() + b"\0")
    return root


def test_what_is_registered_from_python_is_found_under_any_import(tmp_path: Path) -> None:
    source = tmp_path / "__init__.py"
    source.write_text(FROM_PYTHON)
    assert wheel.from_python(source) == {"group": "torch._refs:group", "backward": "torch._decomp:backward"}


def test_a_wheel_is_read_from_its_three_sources(tmp_path: Path) -> None:
    root = tree(tmp_path / "wheel")
    info = root / "torch-9.9.0.dist-info"
    info.mkdir()
    (info / "WHEEL").write_text(f"Wheel-Version: 1.0\nTag: {TAG}\n")
    found = wheel.read(root)
    assert (found.torch, found.wheel[0]) == ("9.9.0", TAG)
    assert found.kernels == {"mm", "mm.out"}
    assert found.fallback == {"linalg_svd"}
    assert found.refused == {"_slow_conv2d_forward"}
    assert found.python["group"] == "torch._refs:group"
    assert found.texts == {Text.MM.value}


def test_a_library_that_contradicts_the_list_of_operators_gives_no_data(tmp_path: Path) -> None:
    root = tree(tmp_path / "wheel", kernels=("mm", "mm.out", "relu"))
    (root / "torch-9.9.0.dist-info").mkdir()
    with pytest.raises(StepFailed, match="differ in what MPS has kernels for: relu"):
        wheel.read(root)


@pytest.fixture
def locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A profile whose lock has a small torch for macOS; the operator data goes to this directory."""
    content = tree(tmp_path / "content")
    files = {str(p.relative_to(content)): p.read_bytes() for p in content.rglob("*") if p.is_file()}
    house = tmp_path / "wheels"
    made = wheelhouse.wheel(house, "torch", "9.9.0", tag=TAG, files=files)
    wheelhouse.only(monkeypatch, house)
    folder = tmp_path / "constraints"
    folder.mkdir()
    (folder / "small.txt").write_text(wheelhouse.pin(made))
    (folder / "none.txt").write_text(wheelhouse.pin(wheelhouse.wheel(house, "plain", "1.0")))
    monkeypatch.setattr(settings, "CONSTRAINTS", folder)
    monkeypatch.setattr(wheel, "load_profile", make_profile)
    data = tmp_path / "data"
    data.mkdir()
    monkeypatch.setattr(operators, "DATA", data)
    return data


def details(report: Report) -> list[str]:
    return [check.detail for check in report.checks]


def test_the_data_of_a_profile_is_made_once(locked: Path) -> None:
    assert details(wheel.make(wheel.parse_options(["small"]))) == ["written: 2 overloads with a kernel"]
    first = operators.load("9.9.0")
    assert isinstance(first, Operators)
    assert details(wheel.make(["small"])) == ["is what the wheel says"]
    assert operators.load("9.9.0") == first


def test_data_that_differs_from_the_wheel_is_written_again(locked: Path) -> None:
    wheel.make(["small"])
    path = operators.path_for("9.9.0")
    path.write_text(path.read_text(encoding="utf-8").replace('"linalg_svd"', '"other"'), encoding="utf-8")
    assert details(wheel.make(["small"])) == ["written: 2 overloads with a kernel"]
    assert operators.load("9.9.0").fallback == {"linalg_svd"}


def test_a_lock_without_torch_or_with_another_digest_is_refused(locked: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no torch for macOS"):
        wheel.make(["none"])
    lock = tmp_path / "constraints" / "small.txt"
    lock.write_text(lock.read_text()[:-8] + "0000000\n")
    with pytest.raises(StepFailed, match=r"torch 9\.9\.0's macOS wheel cannot be downloaded"):
        wheel.make(["small"])


@pytest.mark.environment
@pytest.mark.parametrize("profile", settings.profile_names())
def test_the_data_is_what_the_locked_wheel_and_its_library_say(profile: str, tmp_path: Path) -> None:
    """Downloads the macOS wheel that the lock's digests allow; reads its list and its machine code."""
    pytest.importorskip("lief", reason="constraints/dev.txt is not installed")
    wheel.unpack(settings.load_profile(profile), tmp_path)

    found = wheel.read(tmp_path)

    known = operators.load(found.torch)
    assert operators.dump(found).replace(found.made, "") == operators.dump(known).replace(known.made, "")
