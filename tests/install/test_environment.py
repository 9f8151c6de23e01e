from __future__ import annotations

import contextlib
import http.server
import os
import platform
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kohya_mps.core import process
from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.installation import Installation
from kohya_mps.core.process import capture
from kohya_mps.core.settings import Settings
from kohya_mps.install import environment, generations, inventory, lockfile
from kohya_mps.install.environment import build, plan
from kohya_mps.install.generations import Generation
from tests.support.installs import PYTHON, Small, make_profile, make_settings
from tests.support.wheelhouse import pin, source_archive, wheel


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that the test may spoil, linked from as uv does by default on Linux."""
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("UV_LINK_MODE", "hardlink")
    return tmp_path / "cache"


def ask(generation: Generation, code: str) -> str:
    done = capture([generation.python, "-c", code])
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def core(generation: Generation) -> Path:
    return inventory.site_packages(generation.venv) / "plain" / "core.py"


def activated(settings: Settings) -> Generation:
    generation = build(settings)
    generations.activate(Installation(settings.home), generation)
    return generation


def test_an_environment_holds_exactly_the_lock_and_works(small: Small) -> None:
    generation = build(small.settings)
    assert inventory.versions(generation.venv) == {"plain": "1.0", "other-thing": "2.1"}
    assert ask(generation, "import plain.core; print(plain.core.VALUE)") == "1"
    assert ask(generation, "import sys; print('%d.%d' % sys.version_info[:2])") == PYTHON
    assert "include-system-site-packages = false" in (generation.venv / "pyvenv.cfg").read_text()
    manifest = generation.manifest()
    assert manifest is not None
    assert manifest.lock == lockfile.digest(small.lock)
    assert manifest.profile == "small"
    assert os.access(manifest.interpreter, os.X_OK)


def test_an_unchanged_lock_is_not_built_twice(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    first = activated(small.settings)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr("kohya_mps.install.environment.capture", never)
    monkeypatch.setattr(environment, "stream", never)
    planned = plan(small.settings)
    assert planned.usable == first
    assert build(small.settings, planned) == first


def test_another_lock_and_another_profile_are_other_generations(small: Small) -> None:
    first = activated(small.settings)
    renamed = msgspec.structs.replace(small.settings, profile_name="other")
    assert build(renamed) != first
    newer = wheel(small.wheels, "plain", "1.1")
    small.lock.write_text(pin(newer))
    second = build(small.settings)
    assert second != first
    assert inventory.versions(second.venv) == {"plain": "1.1"}
    assert inventory.versions(first.venv) == {"plain": "1.0", "other-thing": "2.1"}


def test_a_deleted_file_is_repaired_beside_the_old_one(
    small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    first = activated(small.settings)
    core(first).unlink()
    planned = plan(small.settings)
    assert planned.usable is None
    assert planned.changed == first
    assert [d.name for d in planned.differences] == ["plain"]
    second = build(small.settings, planned)
    assert second != first
    assert generations.active(Installation(small.settings.home)) == first
    assert ask(second, "import plain.core") == ""
    assert "plain" in capsys.readouterr().err


def test_an_edit_that_reached_uvs_cache_through_a_hard_link_is_repaired(
    small: Small, own_cache: Path
) -> None:
    first = activated(small.settings)
    assert core(first).stat().st_nlink > 1, "uv did not link: this test tests nothing"
    with core(first).open("r+b") as file:
        file.write(b"VALUE = 9\n")
    second = build(small.settings)
    assert core(second).read_bytes() == b"VALUE = 1\n"


def test_a_cache_that_was_cut_short_is_found_before_the_build_is_done(small: Small, own_cache: Path) -> None:
    first = activated(small.settings)
    os.truncate(core(first), 3)
    shutil.rmtree(first.path)  # nothing tells any more what was edited
    second = build(small.settings)
    assert core(second).read_bytes() == b"VALUE = 1\n"


def test_a_package_that_was_added_or_replaced_is_repaired(small: Small) -> None:
    first = activated(small.settings)
    newer = wheel(small.wheels, "plain", "7.0")
    extra = wheel(small.wheels, "gradio", "6.0")
    done = capture([process.uv(), "pip", "install", "--python", first.python, newer, extra])
    assert done.returncode == 0, done.stderr
    found = {(d.kind, d.name) for d in plan(small.settings).differences}
    assert found == {("changed", "plain"), ("added", "gradio")}
    assert inventory.versions(build(small.settings).venv) == {"plain": "1.0", "other-thing": "2.1"}


def test_an_interpreter_that_is_gone_is_replaced(small: Small) -> None:
    first = activated(small.settings)
    first.python.unlink()
    first.python.symlink_to("/no/such/python")
    assert ask(build(small.settings), "print(1)") == "1"


def refuse_the_hash(small: Small) -> None:
    text = small.lock.read_text()
    at = text.index("sha256:") + 7
    small.lock.write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])


def test_a_tampered_hash_is_an_error_and_leaves_the_active_one_as_it_was(small: Small) -> None:
    first = activated(small.settings)
    refuse_the_hash(small)
    with pytest.raises(StepFailed, match=r"does not have the hash that small\.txt says") as caught:
        build(small.settings)
    assert "git diff small.txt" in caught.value.fix
    assert generations.present(Installation(small.settings.home)) == [first]
    assert generations.active(Installation(small.settings.home)) == first
    assert ask(first, "import plain") == ""


def test_a_tampered_wheel_is_an_error_too(small: Small, own_cache: Path) -> None:
    with zipfile.ZipFile(small.wheels / "plain-1.0-py3-none-any.whl", "a") as archive:
        archive.writestr("plain/evil.py", "")
    with pytest.raises(StepFailed, match="does not have the hash"):
        build(small.settings)
    assert generations.present(Installation(small.settings.home)) == []


def test_a_package_that_cannot_be_found_is_an_error(small: Small, own_cache: Path) -> None:
    (small.wheels / "plain-1.0-py3-none-any.whl").unlink()
    with pytest.raises(StepFailed, match=r"uv could not install small\.txt") as caught:
        build(small.settings)
    assert "goes on from what is downloaded" in caught.value.fix
    assert generations.present(Installation(small.settings.home)) == []


def test_a_source_archive_is_never_built(small: Small, own_cache: Path) -> None:
    path = source_archive(small.wheels, "sourceonly", "1.0")
    small.lock.write_text(f"sourceonly==1.0 --hash=sha256:{lockfile.digest(path)}\n")
    with pytest.raises(StepFailed, match="could not install"):
        build(small.settings)


def test_what_is_not_in_the_lock_and_what_is_missing_are_listed() -> None:
    assert environment.compare({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "9", "d": "4"}) == [
        "b 2 is 9",
        "c 3 is missing",
        "d 4 is not in the lock",
    ]


@contextlib.contextmanager
def index_of(wheels: Path) -> Iterator[str]:
    """A package index on this machine with these wheels."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            *_, last = self.path.strip("/").split("/")
            if last.endswith(".whl"):
                body, kind = (wheels / last).read_bytes(), "application/octet-stream"
            else:
                files = [
                    p.name for p in wheels.glob("*.whl") if p.name.startswith(last.replace("-", "_") + "-")
                ]
                links = "".join(f'<a href="/files/{name}">{name}</a>' for name in files)
                body, kind = f"<!DOCTYPE html><html><body>{links}</body></html>".encode(), "text/html"
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/simple"
        server.shutdown()
        thread.join()


def test_an_index_of_the_users_is_used_and_afterwards_the_cache_is_enough(
    small: Small, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UV_FIND_LINKS")
    monkeypatch.delenv("UV_OFFLINE")
    with index_of(small.wheels) as url:
        monkeypatch.setenv("UV_DEFAULT_INDEX", url)
        first = activated(small.settings)
    monkeypatch.setenv("UV_OFFLINE", "1")
    again = build(msgspec.structs.replace(small.settings, home=tmp_path / "another home"))
    assert (
        inventory.versions(first.venv)
        == inventory.versions(again.venv)
        == {"plain": "1.0", "other-thing": "2.1"}
    )


def test_a_folder_of_wheels_that_only_pip_is_configured_with_is_used(
    small: Small, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UV_FIND_LINKS")
    monkeypatch.delenv("UV_OFFLINE")
    monkeypatch.setenv("PIP_FIND_LINKS", str(small.wheels))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert inventory.versions(build(small.settings).venv) == {"plain": "1.0", "other-thing": "2.1"}


@pytest.mark.parametrize("name", ["it's a $(home)", 'quoted "home"', "Größe 写真"])
def test_any_printable_home_works(name: str, small: Small, tmp_path: Path) -> None:
    generation = build(msgspec.structs.replace(small.settings, home=tmp_path / name))
    assert ask(generation, "import plain, sys; print(sys.prefix)") == str(generation.venv)


def test_nothing_of_an_active_environment_or_of_pythonpath_leaks_in(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "comfyui" / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", other], check=True)
    before = {path: path.lstat().st_mtime_ns for path in other.rglob("*")}
    monkeypatch.setenv("VIRTUAL_ENV", str(other))
    monkeypatch.setenv("PATH", f"{other / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("UV_TARGET", str(tmp_path / "target"))
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "target"))
    generation = build(small.settings)
    manifest = generation.manifest()
    assert manifest is not None
    assert not Path(manifest.interpreter).is_relative_to(other)
    assert "comfyui" not in (generation.venv / "pyvenv.cfg").read_text()
    assert {path: path.lstat().st_mtime_ns for path in other.rglob("*")} == before
    assert not (tmp_path / "target").exists()


def test_without_a_fitting_python_the_error_says_how_to_get_one(
    small: Small,
) -> None:
    profile = msgspec.structs.replace(small.settings.profile, python="3.99")
    with pytest.raises(UsageError, match=r"Python 3\.99 was not found") as caught:
        build(msgspec.structs.replace(small.settings, profile=profile))
    assert "install it with" in caught.value.fix
    assert not generations.present(Installation(small.settings.home))


def test_the_python_that_runs_this_is_taken_when_it_fits(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "kohya_mps.install.environment.capture", lambda *_, **__: pytest.fail("uv was started")
    )
    found = environment.find_python(small.settings.profile)
    assert found.version == platform.python_version()
    assert Path(found.path).parent.parent.samefile(sys.base_prefix)


@pytest.fixture
def unfitting(monkeypatch: pytest.MonkeyPatch) -> None:
    """This Python is no candidate itself: uv has to find one."""
    monkeypatch.setattr(platform, "python_version", lambda: "3.7.0")


def test_a_python_on_the_path_is_found(small: Small, unfitting: None) -> None:
    found = environment.find_python(small.settings.profile)
    assert found.version.startswith(PYTHON)
    assert os.access(found.path, os.X_OK)


@pytest.mark.usefixtures("unfitting")
def test_a_python_that_does_not_run_is_an_error(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'dyld: Library not loaded' >&2\nexit 1\n")
    broken.chmod(0o755)
    real = capture

    def found(argv: list[object], **options: object) -> object:
        if "find" in argv:
            return subprocess.CompletedProcess([], 0, f"{broken}\n", "")
        return real(argv, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("kohya_mps.install.environment.capture", found)
    with pytest.raises(UsageError, match="Library not loaded"):
        environment.find_python(small.settings.profile)


@pytest.mark.usefixtures("unfitting")
def test_on_a_mac_only_a_native_python_is_requested(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[object] = []

    def record(argv: list[object], **_: object) -> object:
        requested.append(argv[-1])
        return subprocess.CompletedProcess([], 2, "", "")

    monkeypatch.setattr("kohya_mps.install.environment.capture", record)
    monkeypatch.setattr(environment, "stream", record)
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(UsageError) as caught:
        environment.find_python(small.settings.profile)
    assert set(requested) == {f"cpython-{PYTHON}-macos-aarch64-none"}
    assert "brew install" in caught.value.fix


def test_too_little_disk_is_an_error_that_says_how_much_is_needed(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = msgspec.structs.replace(make_profile("small"), disk_gb={"darwin": 3, "linux": 123456})
    settings = make_settings(small.settings.home / "not" / "there", profile=profile)
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(UsageError, match="need 123456 GB"):
        build(settings)
    assert not settings.home.exists()


def test_an_interrupted_build_is_removed_and_built_again(small: Small) -> None:
    first = build(small.settings)
    (first.path / "manifest.json").unlink()
    (first.venv / "half").write_text("")
    again = build(small.settings)
    assert again == first
    assert not (again.venv / "half").exists()


def test_a_build_never_removes_what_the_active_link_points_to(small: Small) -> None:
    first = activated(small.settings)
    (first.path / "manifest.json").unlink()
    again = build(small.settings)
    assert again != first
    assert ask(first, "import plain") == ""


def test_an_interruption_leaves_nothing_behind(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(environment, "sync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build(small.settings)
    assert generations.present(Installation(small.settings.home)) == []


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("error: No space left on device (os error 28)", "disk is full"),
        ("error: something else", "something else"),
    ],
)
def test_what_uv_says_is_passed_on(
    printed: str, expected: str, small: Small, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small.wheels / "plain-1.0-py3-none-any.whl").unlink()  # or uv would do without asking any index
    monkeypatch.setattr(
        environment, "stream", lambda *_, **__: process.ProcessResult(2, printed + "\n", 0.0, 0)
    )
    with pytest.raises(StepFailed, match=expected):
        build(small.settings)
