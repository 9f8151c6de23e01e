from __future__ import annotations

import tempfile
from pathlib import Path

import msgspec
import pytest

from devtools.locks import cross_check
from kohya_mps.core import settings
from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.report import Status
from kohya_mps.install import lockfile
from tests.support.macho_files import ARM64, DYLIB, IOS, OBJECT, SYSTEM, X86_64, fat, native
from tests.support.wheelhouse import only, pin, source_archive, wheel

MAC_TAG = "cp311-cp311-macosx_11_0_arm64"


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of one lock, whose wheels come from a folder and nowhere else."""
    (tmp_path / "constraints").mkdir()
    (tmp_path / "wheels").mkdir()
    monkeypatch.setattr(settings, "CONSTRAINTS", tmp_path / "constraints")
    monkeypatch.setattr(settings, "ROOT", tmp_path)
    only(monkeypatch, tmp_path / "wheels")
    return tmp_path


def lock(room: Path, *wheels: Path, required: tuple[str, ...] = ()) -> lockfile.Lock:
    """A lock of these wheels; its ``.in`` file has ``required``, or names them all."""
    named = required or tuple(path.name.split("-")[0] for path in wheels)
    (room / "constraints" / "native.in").write_text("".join(f"{name}\n" for name in named))
    path = room / "constraints" / "native.txt"
    path.write_text("".join(pin(wheel) for wheel in wheels))
    return lockfile.read(path)


def library(room: Path, name: str, files: dict[str, bytes], *requires: str, tag: str = MAC_TAG) -> Path:
    return wheel(room / "wheels", name, "1.0", tag=tag, files=files, requires=requires)


def found(room: Path, *wheels: Path, required: tuple[str, ...] = ()) -> cross_check.Found:
    made = lock(room, *wheels, required=required)
    _, tree = cross_check.install_lowest(made, Path(tempfile.mkdtemp(dir=room)))
    return cross_check.examine(tree, made)


def test_a_good_tree_passes_and_counts_where_its_libraries_are(room: Path) -> None:
    files = {
        "core/_c.so": native(
            SYSTEM, "@loader_path/lib/liba.dylib", "@rpath/libb.dylib", rpaths=("@loader_path/lib",)
        ),
        "core/lib/liba.dylib": native(SYSTEM, name="@rpath/liba.dylib", kind=DYLIB),
        "core/lib/libb.dylib": fat((X86_64, native(cpu=X86_64)), (ARM64, native(name="b", kind=DYLIB))),
    }
    result = found(room, library(room, "core", files))
    assert not (result.unloadable + result.unresolved + result.unmet + result.forbidden)
    assert result.libraries == 3
    assert result.links == {"part of macOS": 2, "in the installed packages": 2}
    assert result.lowest_macos[:2] == (11, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (native(cpu=X86_64), "no arm64 slice, only x86_64"),
        (native(subtype=2), "no arm64 slice"),
        (b"\x7fELF" + bytes(60), "is not Mach-O"),
        (b"", "is not Mach-O"),
        (native(platform=IOS), "built for IOS"),
        (native(minos=None), "does not say which macOS"),
    ],
    ids=["intel", "arm64e", "linux", "empty", "ios", "no version"],
)
def test_a_library_that_a_mac_cannot_load_is_named(room: Path, content: bytes, message: str) -> None:
    (problem,) = found(room, library(room, "core", {"core/_c.so": content})).unloadable
    assert problem.startswith("core/_c.so")
    assert message in problem


def test_a_mach_o_file_is_found_whatever_its_name(room: Path) -> None:
    files = {"core/bin/helper": native(cpu=X86_64), "core/data.o": native(kind=OBJECT, minos=None)}
    result = found(room, library(room, "core", files))
    assert [line.split()[0] for line in result.unloadable] == ["core/bin/helper"]


@pytest.mark.parametrize(
    ("load", "rpaths"),
    [
        ("@rpath/libgone.dylib", ("@loader_path/lib",)),
        ("@rpath/libgone.dylib", ()),
        ("@loader_path/libgone.dylib", ()),
        ("/usr/local/opt/libomp/lib/libomp.dylib", ()),
        ("/opt/homebrew/lib/libomp.dylib", ()),
        ("@loader_path/../../../outside.dylib", ()),
        ("@executable_path/libgone.dylib", ()),
    ],
)
def test_a_library_that_is_nowhere_is_named_with_who_links_to_it(
    room: Path, load: str, rpaths: tuple[str, ...]
) -> None:
    (room / "outside.dylib").write_bytes(native())
    (problem,) = found(room, library(room, "core", {"core/_c.so": native(load, rpaths=rpaths)})).unresolved
    assert problem.startswith(f"core/_c.so links to {load}")


def test_a_missing_weak_library_is_allowed(room: Path) -> None:
    result = found(room, library(room, "core", {"core/_c.so": native(weak=("@rpath/libgone.dylib",))}))
    assert not result.unresolved
    assert result.links == {"weak and missing, which dyld allows": 1}


def test_a_library_that_a_required_package_has_loaded_is_found_by_its_install_name(room: Path) -> None:
    base = library(room, "base", {"base/lib/libx.dylib": native(name="@rpath/libx.dylib", kind=DYLIB)})
    user = native("@rpath/libx.dylib", rpaths=("/Users/builder/lib",))
    middle = library(room, "middle", {}, "base", tag="py3-none-any")
    assert found(room, base, middle, library(room, "user", {"user/_c.so": user}, "middle")).links == {
        "loaded before by a package that is required": 1
    }
    (problem,) = found(room, base, library(room, "user", {"user/_c.so": user})).unresolved
    assert "/Users/builder/lib/libx.dylib" in problem


@pytest.mark.parametrize("with_source", [False, True])
def test_the_lowest_macos_is_the_first_with_wheels_for_it(room: Path, with_source: bool) -> None:
    if with_source:
        source_archive(room / "wheels", "core", "1.0")
    made = lock(room, library(room, "core", {"core/_c.so": native()}, tag="cp311-cp311-macosx_14_0_arm64"))
    assert cross_check.install_lowest(made, room / "trees")[0] == "14.0"


@pytest.mark.parametrize(
    ("tag", "minos", "says", "good", "message"),
    [
        ("11_0", (11, 0), "11.0", True, "11.0 (its wheels are tagged for it, core/_c.so states it)"),
        # The wheel says 11.0 and installs there; the library in it does not load there.
        ("11_0", (12, 3), "11.0", False, "12.3 (core/_c.so states it)"),
        ("11_0", (12, 3), "12.3", True, "12.3 (core/_c.so states it)"),
        ("13_0", (11, 0), "11.0", False, "13.0 (its wheels are tagged for it)"),
        ("11_0", (11, 0), "14.0", False, "11.0 (its wheels are tagged for it, core/_c.so states it)"),
    ],
)
def test_the_profile_has_to_say_the_macos_that_is_measured(
    room: Path,
    monkeypatch: pytest.MonkeyPatch,
    tag: str,
    minos: tuple[int, int],
    says: str,
    good: bool,
    message: str,
) -> None:
    profile = msgspec.structs.replace(settings.load_profile("validated"), lock="native", macos=says)
    monkeypatch.setattr(settings, "profile_names", lambda: ["validated"])
    monkeypatch.setattr(settings, "load_profile", lambda name: profile)
    core = library(room, "core", {"core/_c.so": native(minos=minos)}, tag=f"cp311-cp311-macosx_{tag}_arm64")
    made = lock(room, core)
    macos, tree = cross_check.install_lowest(made, room / "trees")
    check = cross_check.lowest_macos(cross_check.Proof("native", macos, cross_check.examine(tree, made)))
    assert (check.status is Status.PASS) is good
    assert message in check.detail


def test_the_macos_that_torchs_mps_backend_asks_for_counts_too(room: Path) -> None:
    words = b"\0The MPS backend is supported on macOS 15.0+. \0"
    files = {"torch/lib/libtorch_cpu.dylib": native(kind=DYLIB, name="@rpath/libtorch_cpu.dylib") + words}
    made = lock(room, library(room, "torch", files))
    macos, tree = cross_check.install_lowest(made, room / "trees")
    check = cross_check.lowest_macos(cross_check.Proof("native", macos, cross_check.examine(tree, made)))
    assert check.detail == "15.0 (torch's MPS backend needs it)"


def test_requirements_are_met_for_a_mac_and_not_for_this_machine(room: Path) -> None:
    requires = ("linux-thing ; sys_platform == 'linux'", "other>=2 ; platform_machine == 'arm64'")
    core, other = (
        library(room, "core", {}, *requires, tag="py3-none-any"),
        wheel(room / "wheels", "other", "2.0"),
    )
    assert found(room, core, other).unmet == ()


@pytest.mark.parametrize(
    ("requires", "required", "message"),
    [
        ((), ("core", "gone"), "the .in needs gone, which is missing"),
        (("other>=3; extra == 'more'",), ("core[more]", "other"), "core needs other>=3, which is 2.0"),
    ],
)
def test_a_need_that_is_not_met_is_named(
    room: Path, requires: tuple[str, ...], required: tuple[str, ...], message: str
) -> None:
    core = library(room, "core", {}, *requires, tag="py3-none-any")
    assert found(room, core, wheel(room / "wheels", "other", "2.0"), required=required).unmet == (message,)


def test_an_override_is_what_has_to_be_met(room: Path) -> None:
    core = library(room, "core", {}, "other<2", tag="py3-none-any")
    other = wheel(room / "wheels", "other", "2.0")
    assert found(room, core, other).unmet == ("core needs other<2, which is 2.0",)
    assert found(room, core, other, required=("core", "# override: other>=2")).unmet == ()


def test_a_distribution_for_another_python_is_named(room: Path) -> None:
    made = lock(room, library(room, "core", {}, tag="py3-none-any"))
    _, tree = cross_check.install_lowest(made, room / "trees")
    data = tree / "core-1.0.dist-info" / "METADATA"
    text = data.read_text().replace(
        "Version: 1.0", "Version: 1.0\nRequires-Python: >=3.12\nRequires-Dist: core>2"
    )
    data.unlink()  # not overwritten: uv may have linked it to its cache
    data.write_text(text)
    assert cross_check.examine(tree, made).unmet == (
        "core needs Python >=3.12, which is 3.11",
        "core needs core>2, which is 1.0",
    )


def test_a_forbidden_package_is_named_with_its_chain(room: Path) -> None:
    wheels = [
        library(room, "outer", {}, "middle", tag="py3-none-any"),
        library(room, "middle", {}, "triton", tag="py3-none-any"),
        library(room, "triton", {}, tag="py3-none-any"),
    ]
    result = found(room, *wheels, required=("outer",))
    assert result.forbidden == ("outer needs middle needs triton, and triton is forbidden on macOS",)


def test_licences_are_listed_by_what_the_metadata_says(room: Path) -> None:
    house = room / "wheels"
    wheels = [
        wheel(house, "one", "1.0", metadata="License-Expression: MIT\n"),
        wheel(house, "two", "1.0", metadata="Classifier: License :: OSI Approved :: BSD License\n"),
        wheel(house, "three", "1.0"),
    ]
    assert found(room, *wheels).licences == {
        "MIT": ("one",),
        "BSD License": ("two",),
        "not stated": ("three",),
    }


def test_a_lock_without_a_wheel_for_a_mac_is_refused(room: Path) -> None:
    linux = library(room, "core", {}, tag="cp311-cp311-manylinux_2_28_x86_64")
    with pytest.raises(StepFailed, match="cannot be installed on Apple Silicon: core"):
        found(room, linux)


def test_a_wheel_with_another_hash_is_refused(room: Path) -> None:
    made = lock(room, library(room, "core", {}, tag="py3-none-any"))
    library(room, "core", {"core/extra.py": b""}, tag="py3-none-any")
    with pytest.raises(StepFailed, match="Hash mismatch"):
        cross_check.install_lowest(made, room / "trees")


def test_the_whole_session_reports_each_release_and_leaves_nothing_behind(room: Path) -> None:
    lock(room, library(room, "core", {"core/_c.so": native(SYSTEM)}))
    report = cross_check.run(cross_check.parse_options([]))
    assert report.ok, report.checks
    assert [proof.macos for proof in report.extra["proofs"]] == ["11.0", "26.0"]
    assert any("predicted" in line for line in report.summary)
    assert not list((room / ".nox").iterdir())


def test_only_known_locks_are_taken(room: Path) -> None:
    lock(room, library(room, "core", {}))
    with pytest.raises(UsageError, match="'nothing'"):
        cross_check.parse_options(["nothing"])
