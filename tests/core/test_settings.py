from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest

from kohya_mps.core import settings
from kohya_mps.core.errors import UsageError
from kohya_mps.core.installation import MANIFEST, Installation
from kohya_mps.install.generations import Generation, Manifest, activate
from kohya_mps.install.inventory import Inventory

OTHER = "a" * 40


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A copy of ``config/`` that the test may spoil."""
    return Path(shutil.copytree(settings.CONFIG, tmp_path / "config"))


def edit(config: Path, old: str, new: str, name: str = "settings.yaml") -> Path:
    path = config / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


def refused(config: Path, **flags: str) -> str:
    with pytest.raises(UsageError) as caught:
        settings.load(config=config, **flags)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_the_committed_files_are_valid_and_name_a_lock_that_exists() -> None:
    loaded = settings.load()
    assert loaded.profile_name == "validated"
    assert loaded.profile.lock_file.is_file()
    assert loaded.home == Path("~/tools/kohya_ss").expanduser()


def test_every_committed_profile_is_valid() -> None:
    for name in settings.profile_names():
        assert settings.load_profile(name).lock_file.is_file()


def test_a_variable_wins_over_the_file_and_a_flag_over_both(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    by_file = settings.load(config=config)
    monkeypatch.setenv("KOHYA_COMMIT", OTHER)
    monkeypatch.setenv("KOHYA_REPO_URL", "https://mirror.invalid/kohya_ss.git")
    monkeypatch.setenv("KOHYA_HOME", str(tmp_path / "elsewhere"))
    by_variable = settings.load(config=config)
    assert by_file.commit != by_variable.commit == OTHER
    assert by_variable.url == "https://mirror.invalid/kohya_ss.git"
    assert by_variable.home == tmp_path / "elsewhere"
    by_flag = settings.load(
        config=config, commit="b" * 40, url="https://fork.invalid/x", mixed_precision="bf16"
    )
    assert by_flag.commit == "b" * 40
    assert by_flag.url == "https://fork.invalid/x"
    assert by_flag.mixed_precision == "bf16"


def test_an_empty_variable_counts_as_not_set(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KOHYA_HOME", "KOHYA_COMMIT", "KOHYA_REPO_URL", "KOHYA_PROFILE"):
        monkeypatch.setenv(name, "")
    assert settings.load(config=config) == settings.load()


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "generations_kept: 2",
            "generation_kept: 2",
            ["generation_kept", "accepted keys", "generations_kept"],
        ),
        ("  home:", "  hoem:", ["checkout", "hoem", "accepted keys: url, commit, home"]),
        ("generations_kept: 2", "generations_kept: two", ["generations_kept", "int", "found 'two'"]),
        (
            "generations_kept: 2",
            "generations_kept: 0",
            ["generations_kept", "found 0", "-> accepted: 1 or more"],
        ),
        (
            "generations_kept: 2",
            "",
            [": object missing required field `generations_kept`; accepted keys: check"],
        ),
        ('mixed_precision: "no"', "mixed_precision: no", ["mixed_precision", "str", "found False"]),
        (
            "network_stall_seconds: 60",
            "network_stall_seconds: 0",
            ["network_stall_seconds", "-> accepted: more than 0"],
        ),
        (
            "network_stall_seconds: 60",
            "network_stall_seconds: .nan",
            ["network_stall_seconds", "more than 0"],
        ),
        ("  home: ~/tools/kohya_ss", '  home: ""', ["checkout.home", "found ''", "-> accepted: any text"]),
        ("profile: validated", "profile: no-such", ["settings.yaml: profile: there is no profile 'no-such'"]),
        ("  commit: 5536", "  commit: 36", ["settings.yaml: checkout.commit: '36", "give all 40 hex"]),
        ("  url: https:", '  url: ""  # ', ["settings.yaml: checkout.url: found ''"]),
        ("  url: https", "  url: [https]\n  no: https", ["checkout"]),
        ("checkout:", "checkout: [", ["not valid YAML"]),
    ],
)
def test_a_mistake_in_the_file_is_named_with_file_key_found_and_accepted(
    config: Path, old: str, new: str, expected: list[str]
) -> None:
    path = edit(config, old, new)
    message = refused(config)
    for part in [str(path), *expected]:
        assert part in message


def test_the_smallest_numbers_are_accepted(config: Path) -> None:
    edit(config, "generations_kept: 2", "generations_kept: 1")
    edit(config, "network_stall_seconds: 60", "network_stall_seconds: 0.5")
    loaded = settings.load(config=config)
    assert (loaded.generations_kept, loaded.network_stall_seconds) == (1, 0.5)


def test_an_empty_file_and_a_missing_file_are_named(config: Path) -> None:
    path = config / "settings.yaml"
    path.write_text("")
    assert f"{path}: the file: expected" in refused(config)
    path.unlink()
    message = refused(config)
    assert f"{path}: cannot be read: No such file" in message
    assert f"git checkout -- {path}" in message


def test_a_file_that_is_not_text_is_named(config: Path) -> None:
    (config / "settings.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not valid YAML" in refused(config)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('python: "3.11"', "python: 3.11", ["python", "str", "found 3.11"]),
        ("  darwin: 3", "  darwin: much", ["disk_gb", "found"]),
        ("  darwin: [triton]", "  mac: [triton]", ["forbidden", "mac", "accepted keys: any, darwin"]),
        ("lock: train", "lock: train\nextra: 1", ["extra", "accepted keys"]),
        ('macos: "13.0"', 'macos: "Sonoma"', [": macos: found 'Sonoma'", 'such as "14.0"']),
        ('macos: "13.0"', 'macos: "13.0"\nneeds_macos: {bf16: new}', [": needs_macos.bf16: found 'new'"]),
    ],
)
def test_a_mistake_in_a_profile_is_named_as_well(
    config: Path, old: str, new: str, expected: list[str]
) -> None:
    path = edit(config, old, new, "profiles/validated.yaml")
    message = refused(config)
    for part in [str(path), *expected]:
        assert part in message


@pytest.mark.parametrize("commit", ["5536d3b", "master", "v25.0.0", "g" * 40, "a" * 41, "-" * 40])
def test_a_commit_that_is_not_a_full_id_is_refused_and_its_origin_named(
    config: Path, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--commit" in refused(config, commit=commit)
    monkeypatch.setenv("KOHYA_COMMIT", commit)
    message = refused(config)
    assert "KOHYA_COMMIT" in message
    assert repr(commit) in message
    assert "40 hexadecimal digits" in message


def test_a_commit_in_capitals_is_the_same_commit(config: Path) -> None:
    assert settings.load(config=config, commit="A" * 40).commit == "a" * 40


def test_an_unknown_profile_is_refused_with_the_known_ones(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--profile: there is no profile '../settings'" in (
        message := refused(config, profile="../settings")
    )
    assert "-> accepted: latest, validated" in message
    monkeypatch.setenv("KOHYA_PROFILE", "newest")
    assert "KOHYA_PROFILE" in (message := refused(config))
    assert "'newest'" in message


def install(root: Path, profile: str) -> Generation:
    """An installation with a built, active generation."""
    home = Installation(root)
    generation = Generation(home.generations / f"{profile}-1")
    generation.venv.mkdir(parents=True)
    generation.complete(Manifest(profile, "", "3.11.9", "", Inventory({}, (), "", 0, ()), 1.0))
    activate(home, generation)
    return generation


def test_the_installed_profile_goes_before_the_file_and_after_flag_and_variable(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KOHYA_HOME", str(tmp_path / "home"))
    for name in ("older", "newer"):
        shutil.copy(config / "profiles" / "validated.yaml", config / "profiles" / f"{name}.yaml")
    assert settings.load(config=config).profile_name == "validated"
    install(tmp_path / "home", "newer")
    assert settings.load(config=config).profile_name == "newer"
    monkeypatch.setenv("KOHYA_PROFILE", "older")
    assert settings.load(config=config).profile_name == "older"
    assert settings.load(config=config, profile="validated").profile_name == "validated"
    # The active generation decides, not the newest.
    monkeypatch.delenv("KOHYA_PROFILE")
    install(tmp_path / "home", "older")
    assert settings.load(config=config).profile_name == "older"


@pytest.mark.parametrize("manifest", [b"", b"{", b"\xff", b'{"profile": 3}', b'{"profile": "gone"}', None])
def test_a_manifest_that_names_no_known_profile_leaves_the_choice_to_the_file(
    manifest: bytes | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KOHYA_HOME", str(tmp_path / "home"))
    generation = install(tmp_path / "home", "latest")
    assert settings.load().profile_name == "latest"
    path = generation.path / MANIFEST
    path.unlink()
    if manifest is not None:
        path.write_bytes(manifest)
    assert settings.load().profile_name == "validated"


def test_an_environment_that_somebody_else_made_has_no_profile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KOHYA_HOME", str(tmp_path / "home"))
    other = install(tmp_path / "other", "latest")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "venv").symlink_to(other.venv)
    assert settings.load().profile_name == "validated"


@pytest.mark.parametrize(
    "name", ["with spaces", 'it\'s "quoted"', "$(touch x)", "Größe Übung 写真", "a;b|c&d"]
)
def test_any_printable_name_is_a_good_home(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KOHYA_HOME", str(tmp_path / name))
    assert settings.load().home == tmp_path / name


def test_the_tilde_and_relative_paths_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOHYA_HOME", "~/k s")
    assert settings.load().home == tmp_path / "user" / "k s"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KOHYA_HOME", "x/../y")
    assert settings.load().home == tmp_path / "y"


@pytest.mark.parametrize(
    "value",
    ["/tmp/a\nb", "/tmp/a\tb", "/tmp/a\x7fb", "~nobody-of-this-name/x", "/tmp/" + 300 * "x", "/tmp/\udcff"],
)
def test_an_invalid_home_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOHYA_HOME", value)
    message = refused(settings.CONFIG)
    assert f"KOHYA_HOME: {value!r}" in message
    assert any(fix in message for fix in ("-> use a name", "-> write the path in full", "-> choose another"))


def test_a_url_may_be_a_path_and_is_then_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "user" / "mirror").mkdir()
    monkeypatch.setenv("KOHYA_REPO_URL", "~/mirror")
    assert settings.load().url == str(tmp_path / "user" / "mirror")


def test_a_url_that_git_would_take_for_an_option_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOHYA_REPO_URL", "--upload-pack=touch /tmp/x")
    message = refused(settings.CONFIG)
    assert "KOHYA_REPO_URL" in message
    assert "-> give a URL or a path" in message
    assert "--repo-url: 'a\\nb' has a control character" in refused(settings.CONFIG, url="a\nb")


def test_a_very_long_url_is_still_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "https://token:" + "x" * 5000 + "@mirror.invalid/kohya_ss.git"
    monkeypatch.setenv("KOHYA_REPO_URL", url)
    assert settings.load().url == url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://me:secret@git.example/kohya_ss.git", "https://git.example/kohya_ss.git"),
        ("https://token@git.example/a", "https://git.example/a"),
        ("https://git.example/a@b", "https://git.example/a@b"),
        ("git@git.example:a.git", "git@git.example:a.git"),
    ],
)
def test_an_address_is_shown_without_its_secret(url: str, shown: str) -> None:
    assert settings.without_secret(url) == shown


class Preset(msgspec.Struct, forbid_unknown_fields=True):
    steps: int
    sizes: tuple[int, ...] = ()
    parts: tuple[Mapping[str, int], ...] = ()


def test_a_mapping_of_structs_is_read(tmp_path: Path) -> None:
    path = tmp_path / "presets.yaml"
    path.write_text("one: {steps: 1}\ntwo: {steps: 2, sizes: [3]}\n")
    assert settings.read_yaml(path, dict[str, Preset]) == {"one": Preset(1), "two": Preset(2, (3,))}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one: {steps: 1}\ntwo: {steps: many}", "two.steps: expected `int`, got `str`; found 'many'"),
        ("one: {steps: 1}\ntwo: {speed: 1}", "two: object contains unknown field `speed`; accepted keys: steps"),
        ("one: {steps: 1, sizes: [1, x]}", "one.sizes[1]: expected `int`, got `str`; found 'x'"),
        ("one: {steps: 1, parts: [{}, {a: 1, b: x}]}", "one.parts[1].b: expected `int`, got `str`; found 'x'"),
        ("[one, two]", "the file: expected `object`, got `array`; found ['one', 'two']"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_mapping_is_named_with_its_key(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "presets.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        settings.read_yaml(path, dict[str, Preset])
    assert f"{path}: {expected}" in str(caught.value)


def test_a_file_that_a_command_writes_is_mended_by_that_command(tmp_path: Path) -> None:
    path = tmp_path / "written.yaml"
    for _ in ("missing", "broken"):
        with pytest.raises(UsageError) as caught:
            settings.read_yaml(path, dict[str, object], fix="`invoke configure` writes it")
        assert caught.value.fix == "`invoke configure` writes it"
        path.write_text("a: [")


def test_the_page_has_a_lock_of_its_own() -> None:
    profile = settings.load_profile("latest")
    names = profile.lock_for(gui=True).name, profile.lock_for(gui=False).name
    assert names == ("gui-latest.txt", "latest.txt")
    assert settings.load_gui().port == 7860


@pytest.mark.parametrize(
    ("macos", "device", "expected"),
    [
        ("14.0", "mps", ("no", "bf16")),
        ("13.9", "mps", ("no",)),
        ("15.1", "mps", ("no", "bf16")),
        ("13.9", "cuda", ("no", "bf16")),
        ("15.1", "tpu", ("no",)),
    ],
)
def test_the_version_of_macos_decides_which_precisions_mps_has(
    macos: str, device: str, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.mac_ver", lambda: (macos, ("", "", ""), ""))
    profile = msgspec.structs.replace(
        settings.load_profile("validated"),
        mixed_precision={"mps": ("no", "bf16"), "cuda": ("no", "bf16")},
        needs_macos={"bf16": "14.0"},
    )
    assert profile.precisions(device) == expected


def test_hugging_faces_directory_follows_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    user = Path.home()
    assert settings.hugging_face_home() == user / ".cache" / "huggingface"
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert settings.hugging_face_home() == Path("/cache/huggingface")
    monkeypatch.setenv("HF_HOME", "~/models")
    assert settings.hugging_face_home() == user / "models"
