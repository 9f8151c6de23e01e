from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec
import pytest
import requests

from devtools.locks import upstream, upstream_file
from devtools.locks.upstream import Kind
from kohya_mps.core import settings
from kohya_mps.core.errors import StepFailed, UsageError
from kohya_mps.core.report import Status, to_json
from tests.support.wheelhouse import LINUX, only, pin, source_archive, wheel

BROKEN = """\
--pre --extra-index-url https://packages.example/nightly/cpu
engine==2.8.0.*
engine-vision==0.22.*
-r requirements.txt
git+https://code.example/someone/bitsandbytes.git/#0.45.5
# a comment
-e ./trainers
"""
INCLUDED = """\
board==2.14.1
xformers
from-source==1.0  # has no wheel
loose>=1
"""
KNOWN = upstream.Known(
    cuda_only={"xformers": "kernels for CUDA", "bitsandbytes": "8-bit optimizers"},
    unneeded={"loose": "nothing imports it"},
    source_only={},
    gui=(),
    import_conflicts=(
        upstream.ImportConflict("board", "<2.21", "setuptools", ">=82", "it imports pkg_resources"),
    ),
)


@pytest.fixture
def chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> settings.Settings:
    """Settings whose lock pins the engine, in a world where all packages are in one folder."""
    house = tmp_path / "wheels"
    for version in ("2.7.0", "2.7.1", "2.8.0"):
        wheel(house, "engine", version, tag="cp311-cp311-macosx_11_0_arm64")
    for version, engine in (("0.22.0", "2.7.0"), ("0.22.1", "2.7.1"), ("0.23.0", "2.8.0")):
        wheel(house, "engine-vision", version, requires=[f"engine=={engine}"])
    wheel(house, "board", "2.14.1", requires=["setuptools>=41"])
    wheel(house, "setuptools", "84.0")
    wheel(house, "xformers", "0.0.30", tag=LINUX)
    wheel(house, "loose", "1.5")
    source_archive(house, "from-source", "1.0")
    only(monkeypatch, house)
    folder = tmp_path / "constraints"
    folder.mkdir()
    (folder / "train.in").write_text("engine\n")
    (folder / "train.txt").write_text(pin(wheel(tmp_path / "ours", "engine", "2.5.1")))
    monkeypatch.setattr(settings, "CONSTRAINTS", folder)
    monkeypatch.setenv("KOHYA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KOHYA_REPO_URL", str(tmp_path / "repository"))
    return settings.load()


def explain(chosen: settings.Settings, **files: str) -> upstream.Explanation:
    texts = {upstream_file.NAME: BROKEN, "requirements.txt": INCLUDED} | {
        f"{name}.txt": text for name, text in files.items()
    }

    def read(name: str) -> str:
        if name not in texts:
            raise upstream_file.Unreadable(f"no {name}")
        return texts[name]

    return upstream.explain("a stand-in", read, chosen, KNOWN)


def kinds(explanation: upstream.Explanation) -> dict[str, list[Kind]]:
    return {line.text: [problem.kind for problem in line.problems] for line in explanation.lines}


def test_the_reason_is_the_resolvers_own_and_names_the_pair(chosen: settings.Settings) -> None:
    explanation = explain(chosen)
    assert not explanation.mended
    (conflict,) = (o for o in explanation.obstacles if o.kind is Kind.CONFLICT)
    assert conflict.packages == ("engine", "engine-vision")
    assert "engine-vision==0.22.1 depends on engine==2.7.1" in conflict.reason
    assert "you require engine" in conflict.reason


def test_every_line_is_judged_with_those_of_included_files(chosen: settings.Settings) -> None:
    assert kinds(explain(chosen)) == {
        "--pre --extra-index-url https://packages.example/nightly/cpu": [Kind.NOT_REPRODUCIBLE] * 2,
        "engine==2.8.0.*": [Kind.CONFLICT, Kind.NOT_REPRODUCIBLE],
        "engine-vision==0.22.*": [Kind.CONFLICT, Kind.NOT_REPRODUCIBLE],
        "board==2.14.1": [Kind.IMPORT_CONFLICT],
        "xformers": [Kind.NO_WHEEL, Kind.NOT_REPRODUCIBLE, Kind.CUDA_ONLY],
        "from-source==1.0": [Kind.SOURCE_ONLY],
        "loose>=1": [Kind.NOT_REPRODUCIBLE],
        "git+https://code.example/someone/bitsandbytes.git/#0.45.5": [Kind.NOT_REPRODUCIBLE, Kind.CUDA_ONLY],
        "-e ./trainers": [],
    }


def test_each_line_names_what_takes_its_place(chosen: settings.Settings) -> None:
    ours = {line.package or line.text: line.ours for line in explain(chosen).lines}
    assert ours["engine"] == "engine==2.5.1 (train.txt)"
    assert ours["loose"] == "left out: nothing imports it"
    assert ours["bitsandbytes"] == "left out: 8-bit optimizers"
    assert ours["board"] == "left out, and config/upstream.yaml does not say why"
    assert "gitlink" in ours["-e ./trainers"]


def test_it_says_so_when_upstream_mends_its_file(chosen: settings.Settings) -> None:
    mended = explain(
        chosen, requirements_macos_arm64="engine==2.8.0\nengine-vision==0.23.0\nfrom-source==1.0\n"
    )
    assert mended.mended  # what pip would build from source does not stop it
    check = upstream.judge(mended)[0]
    assert check.status is Status.PASS
    assert "upstream has mended it" in check.detail


@pytest.mark.parametrize("line", ["xformers", "nowhere==1.0", "loose==9.9"])
def test_a_package_without_any_file_for_a_mac_is_no_mending(chosen: settings.Settings, line: str) -> None:
    explanation = explain(chosen, requirements_macos_arm64=f"{line}\n")
    assert not explanation.mended
    assert explanation.obstacles[0].kind is Kind.NO_WHEEL


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("git+https://code.example/a/b.git#egg=b", "HEAD that day: #egg=b is a URL fragment"),
        ("git+https://code.example/a/b.git", "HEAD that day"),
        ("git+https://code.example/a/b.git@main", "main is a branch or a tag"),
        ("b @ git+ssh://git@code.example/a/b.git", "HEAD that day"),
        ("b @ git+https://code.example/a/b.git@v1", "v1 is a branch or a tag"),
        ("-f https://packages.example/wheels", "an index of its own"),
        ("loose", "does not name one version"),
        ("loose==1.*", "does not name one version"),
    ],
)
def test_lines_that_mean_something_else_tomorrow_are_named(
    chosen: settings.Settings, line: str, reason: str
) -> None:
    (judged,) = explain(chosen, requirements_macos_arm64=f"{line}\n").lines
    assert any(reason in problem.why for problem in judged.problems if problem.kind is Kind.NOT_REPRODUCIBLE)


@pytest.mark.parametrize("line", [f"git+https://code.example/a/b.git@{'a' * 40}", "loose==1.5"])
def test_a_line_that_means_one_thing_is_left_in_peace(chosen: settings.Settings, line: str) -> None:
    (judged,) = explain(chosen, requirements_macos_arm64=f"{line}\n").lines
    assert judged.problems == ()


def test_setuptools_that_still_has_pkg_resources_is_no_problem(
    chosen: settings.Settings, tmp_path: Path
) -> None:
    wheel(tmp_path / "wheels", "setuptools", "81.0")
    judged = explain(chosen, requirements_macos_arm64="board==2.14.1\nsetuptools<82\n").lines[0]
    assert judged.problems == ()


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_resolver_that_cannot_work_is_no_explanation(
    chosen: settings.Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, offline: str
) -> None:
    monkeypatch.setenv("UV_OFFLINE", offline)
    monkeypatch.delenv("UV_FIND_LINKS")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(StepFailed, match="no reason that names a line"):
        explain(chosen)


def repository(path: Path, *texts: str) -> list[str]:
    """A repository with one commit of the file for each text; their ids."""
    path.mkdir()
    git = ["git", "-C", str(path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    commits = []
    for text in texts:
        (path / upstream_file.NAME).write_text(text)
        (path / "requirements.txt").write_text("loose==1.5\n")
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "--quiet", "-m", "x"], check=True)
        head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
        commits.append(head.stdout.strip())
    return commits


def test_the_session_looks_at_the_pinned_and_at_the_current_commit(
    chosen: settings.Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned, current = repository(
        tmp_path / "repository", "engine==2.8.0\nengine-vision==0.22.0\n", "engine==2.8.0\n"
    )
    monkeypatch.setenv("KOHYA_COMMIT", pinned)
    report = upstream.run(settings.load(), upstream.parse_options([]))
    assert [each.mended for each in report.extra["upstream"]] == [False, True]
    assert report.ok
    assert "Is this project still needed?" in report.summary[-1]
    assert msgspec.json.decode(to_json(report))["upstream"][1]["mended"] is True
    monkeypatch.setenv("KOHYA_COMMIT", current)
    report = upstream.run(settings.load(), upstream.parse_options([]))
    assert len(report.extra["upstream"]) == 1
    assert "asks for the same" in report.checks[0].detail
    only = upstream.run(settings.load(), upstream.parse_options(["--commit", pinned]))
    assert [each.mended for each in only.extra["upstream"]] == [False]


def test_without_a_network_the_checkouts_file_is_used_and_the_report_says_so(
    chosen: settings.Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(url: str, timeout: float) -> requests.Response:
        raise requests.ConnectionError(url)

    (commit,) = repository(tmp_path / "home", "engine==2.8.0\n")
    monkeypatch.setenv("KOHYA_COMMIT", commit)
    monkeypatch.setenv("KOHYA_REPO_URL", "https://github.com/someone/kohya_ss.git")
    monkeypatch.setattr(requests, "get", refuse)
    report = upstream.run(settings.load(), upstream.parse_options([]))
    assert report.checks[0].status is Status.SKIP
    assert "only the file of commit" in report.checks[0].detail


def test_single_files_are_asked_of_github(chosen: settings.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[str] = []

    def answer(url: str, timeout: float) -> requests.Response:
        requested.append(url)
        response = requests.Response()
        response.status_code, response._content = 200, b"loose==1.5\n"
        return response

    monkeypatch.setenv("KOHYA_REPO_URL", "https://github.com/someone/kohya_ss.git")
    monkeypatch.setattr(requests, "get", answer)
    report = upstream.run(settings.load(), upstream.parse_options([]))
    assert any(url.endswith(f"/someone/kohya_ss/HEAD/{upstream_file.NAME}") for url in requested)
    assert any(f"/{chosen.commit}/" in url for url in requested)
    assert report.extra["upstream"][0].mended


def test_a_file_that_cannot_be_had_names_the_next_command(
    chosen: settings.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KOHYA_REPO_URL", "https://code.example/kohya_ss.git")
    with pytest.raises(UsageError, match="neither on GitHub nor a local path") as refusal:
        upstream.run(settings.load(), upstream.parse_options([]))
    assert "invoke clone" in refusal.value.fix


def test_what_is_known_of_packages_can_be_read() -> None:
    known = settings.read_yaml(settings.CONFIG / "upstream.yaml", upstream.Known)
    assert "bitsandbytes" in known.cuda_only


@pytest.mark.upstream
def test_the_real_file_at_the_pin_fails_for_its_torch_and_torchvision(tmp_path: Path) -> None:
    import os

    if not os.environ.get("KOHYA_REPO_URL"):
        pytest.skip("KOHYA_REPO_URL and KOHYA_COMMIT name no kohya_ss")
    chosen = settings.load()
    report = upstream.run(chosen, upstream.parse_options(["--commit", chosen.commit]))
    (explanation,) = report.extra["upstream"]
    conflicts = [o.packages for o in explanation.obstacles if o.kind is Kind.CONFLICT]
    assert ("torch", "torchvision") in conflicts
    assert not [line.text for line in explanation.lines if "does not say why" in line.ours]
