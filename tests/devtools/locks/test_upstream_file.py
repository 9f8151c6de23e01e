from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import requests

from devtools.locks import upstream_file
from devtools.locks.upstream_file import NAME, Line, Unreadable
from tests.support.installs import git, make_settings


def reader(**files: str) -> upstream_file.Reader:
    return lambda name: files[name.removesuffix(".txt")]


def test_lines_of_included_files_come_where_they_are_included() -> None:
    read = reader(top="one==1\n-r more.txt\n\nthree==3  # why\n", more="# a comment\ntwo[extra]==2\n")
    assert list(upstream_file.lines(read, "top.txt")) == [
        Line("top.txt", 1, "one==1", "one"),
        Line("more.txt", 2, "two[extra]==2", "two"),
        Line("top.txt", 4, "three==3", "three"),
    ]


def test_files_that_include_each_other_end() -> None:
    read = reader(top="-r more.txt\none==1\n", more="--requirement=top.txt\n")
    assert [line.text for line in upstream_file.lines(read, "top.txt")] == ["--requirement=top.txt", "one==1"]


@pytest.mark.parametrize(
    ("text", "package"),
    [
        ("Some_Package==1", "some-package"),
        ("git+https://code.example/someone/BitsAndBytes.git@main", "bitsandbytes"),
        ("name @ git+https://code.example/other.git", "name"),
        ("--pre", ""),
        ("-e ./trainers", ""),
    ],
)
def test_the_package_of_a_line_is_its_canonical_name(text: str, package: str) -> None:
    (line,) = upstream_file.lines(reader(top=text), "top.txt")
    assert line.package == package


@pytest.mark.parametrize("option", ["--extra-index-url", "-i", "--find-links"])
def test_an_index_is_not_reproducible_and_one_of_nightlies_less_so(option: str) -> None:
    (why,) = upstream_file.not_reproducible(f"{option} https://packages.example/whl")
    assert why == f"{option}: an index of its own"
    (why,) = upstream_file.not_reproducible(f"{option} https://packages.example/nightly/cpu")
    assert "nightlies" in why


@pytest.fixture
def repository(tmp_path: Path) -> tuple[Path, str]:
    """A repository with one commit of the file, and its id."""
    path = tmp_path / "repository"
    path.mkdir()
    git(path, "init", "--quiet")
    (path / NAME).write_text("one==1\n")
    git(path, "add", "-A")
    git(path, "commit", "--quiet", "-m", "x")
    return path, git(path, "rev-parse", "HEAD")


def test_the_users_checkout_comes_before_upstream(tmp_path: Path, repository: tuple[Path, str]) -> None:
    path, commit = repository
    home = tmp_path / "home"
    subprocess.run(["git", "clone", "--quiet", path, home], check=True)
    settings = make_settings(home, url="https://code.example/kohya_ss.git")
    assert upstream_file.reader(settings, commit)(NAME) == "one==1\n"
    with pytest.raises(Unreadable, match="neither on GitHub nor a local path"):
        upstream_file.reader(settings, "0" * 40)(NAME)


def test_a_local_repository_is_read_with_git(repository: tuple[Path, str]) -> None:
    path, commit = repository
    read = upstream_file.remote_reader(str(path), commit)
    assert read(NAME) == "one==1\n"
    with pytest.raises(Unreadable, match="gone"):
        read("gone.txt")


@pytest.mark.parametrize(
    "url",
    [
        "https://github.com/someone/kohya_ss",
        "https://github.com/someone/kohya_ss.git",
        "git@github.com:someone/kohya_ss.git",
        "ssh://git@github.com/someone/kohya_ss/",
    ],
)
def test_every_address_of_a_repository_on_github_is_understood(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_found(address: str, timeout: float) -> requests.Response:
        assert address == f"https://raw.githubusercontent.com/someone/kohya_ss/HEAD/{NAME}"
        response = requests.Response()
        response.status_code = 404
        return response

    monkeypatch.setattr(requests, "get", not_found)
    with pytest.raises(Unreadable, match=r"cannot be fetched \(HTTPError\)"):
        upstream_file.remote_reader(url, "HEAD")(NAME)
