from __future__ import annotations

import os
from pathlib import Path

import pytest

from kohya_mps.install import package_index


@pytest.fixture
def pip_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's pip.conf; the machine's own is left out."""
    monkeypatch.delenv("PIP_CONFIG_FILE")
    monkeypatch.setattr(package_index, "_site_directories", list)
    path = tmp_path / "user" / ".config" / "pip" / "pip.conf"
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(package_index, "_MACHINE", ())
    return path


def translated(**variables: str) -> dict[str, str]:
    return package_index.for_uv(variables)


def test_without_a_configuration_uv_gets_no_variables(pip_conf: Path) -> None:
    assert translated(PATH="/bin") == {}


def test_pips_file_is_translated_for_uv(pip_conf: Path) -> None:
    pip_conf.write_text(
        "[global]\nindex-url = https://mirror.invalid/simple\ntrusted_host = mirror.invalid\n"
        "find-links =\n    /wheels\n    https://wheels.invalid/list\ncert = /etc/with space/ca.pem\n"
    )
    assert translated() == {
        "UV_DEFAULT_INDEX": "https://mirror.invalid/simple",
        "UV_INSECURE_HOST": "mirror.invalid",
        "UV_FIND_LINKS": "/wheels,https://wheels.invalid/list",
        "SSL_CERT_FILE": "/etc/with space/ca.pem",
    }


def test_further_indexes_are_all_looked_in_as_pip_does(pip_conf: Path) -> None:
    pip_conf.write_text("[global]\nextra-index-url = https://a.invalid https://b.invalid\n")
    assert translated() == {}
    assert package_index.extra_for_uv({}) == {
        "UV_INDEX": "https://a.invalid https://b.invalid",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }
    assert (
        package_index.extra_for_uv({"UV_INDEX_STRATEGY": "first-index"})["UV_INDEX_STRATEGY"] == "first-index"
    )
    assert package_index.extra_for_uv({"PIP_NO_INDEX": "1"}) == {}
    pip_conf.unlink()
    assert package_index.extra_for_uv({}) == {}


def test_a_variable_of_pips_wins_over_its_file_and_one_of_uvs_over_both(pip_conf: Path) -> None:
    pip_conf.write_text("[global]\nfind-links = /from-file\n")
    assert translated()["UV_FIND_LINKS"] == "/from-file"
    assert translated(PIP_FIND_LINKS="/a /b")["UV_FIND_LINKS"] == "/a,/b"
    assert translated(PIP_FIND_LINKS="/a", UV_FIND_LINKS="/own") == {}


@pytest.mark.parametrize("own", ["UV_DEFAULT_INDEX", "UV_INDEX_URL"])
def test_an_index_that_the_user_chose_for_uv_is_the_one(own: str, pip_conf: Path) -> None:
    pip_conf.write_text("[global]\nindex-url = https://pip.invalid/simple\n")
    assert translated(**{own: "https://uv.invalid/simple"}) == {}


@pytest.mark.parametrize("own", ["UV_INDEX", "UV_EXTRA_INDEX_URL"])
def test_further_indexes_that_the_user_chose_for_uv_are_the_ones(own: str, pip_conf: Path) -> None:
    pip_conf.write_text("[global]\nextra-index-url = https://a.invalid\n")
    assert package_index.extra_for_uv({own: "https://b.invalid"}) == {}


def test_working_without_an_index_is_understood(pip_conf: Path) -> None:
    pip_conf.write_text("[install]\nno-index = true\nfind-links = /wheels\n")
    assert translated() == {"UV_FIND_LINKS": "/wheels"}
    assert package_index.no_index({})
    assert not package_index.no_index({"PIP_NO_INDEX": "0"})
    pip_conf.write_text("")
    assert not package_index.no_index({})
    assert package_index.no_index({"PIP_NO_INDEX": "1"})


@pytest.mark.parametrize(
    ("value", "offline"),
    [("1", True), ("true", True), ("yes", True), ("on", True), ("YES", True), ("0", False), ("false", False),
     ("no", False), ("off", False)],
)  # fmt: skip
def test_every_way_in_which_pip_says_yes_is_understood(value: str, offline: bool, pip_conf: Path) -> None:
    pip_conf.write_text(f"[global]\nno-index = {value}\n")
    assert package_index.no_index({}) is offline
    pip_conf.unlink()
    assert package_index.no_index({"PIP_NO_INDEX": value}) is offline


def test_a_folder_below_the_users_home_is_found(pip_conf: Path, tmp_path: Path) -> None:
    assert translated(PIP_FIND_LINKS="~/wheels")["UV_FIND_LINKS"] == str(tmp_path / "user" / "wheels")


def test_the_section_for_installing_wins_over_the_general_one_as_in_pip(
    pip_conf: Path, tmp_path: Path
) -> None:
    pip_conf.write_text(
        "[install]\nindex-url = https://install.invalid\n[global]\nindex-url = https://global.invalid\n"
    )
    chosen = tmp_path / "chosen.conf"
    chosen.write_text("[global]\nindex-url = https://chosen.invalid\nfind-links = /chosen\n")
    assert translated(PIP_CONFIG_FILE=str(chosen)) == {
        "UV_DEFAULT_INDEX": "https://install.invalid",
        "UV_FIND_LINKS": "/chosen",
    }


def test_no_file_is_read_when_the_user_says_so(pip_conf: Path) -> None:
    pip_conf.write_text("[global]\nfind-links = /wheels\n")
    assert translated(PIP_CONFIG_FILE=os.devnull) == {}


def test_a_file_that_pip_cannot_read_either_is_left_out(pip_conf: Path) -> None:
    pip_conf.write_bytes(b"find-links = /no/section\n\xff")
    assert translated(PIP_FIND_LINKS="/wheels") == {"UV_FIND_LINKS": "/wheels"}
