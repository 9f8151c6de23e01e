"""What README and the other pages say about commands and files is true of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from devtools.docs import links, pages
from kohya_mps.core.settings import ROOT

# The changelog also names what was there once.
WRITTEN = [page for page in links.pages() if page not in pages.PAGES and page.name != "CHANGELOG.md"]
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")


def commands(text: str) -> list[str]:
    """Every command of a Markdown text, from its blocks and its lines, without shell comments and variables."""
    code = []
    for token in MarkdownIt().enable("table").parse(text):
        code += token.content.splitlines() if token.type == "fence" else []
        code += [child.content for child in token.children or [] if child.type == "code_inline"]
    parts = [part for line in code for part in line.partition(" # ")[0].split("&&")]
    return [re.sub(r"^(\S+=\S* )*(\.venv/bin/)?", "", part.strip()) for part in parts]


def options_of(names: str) -> set[str]:
    """The long options of a line of help: ``-t, --[no-]train-step`` are two."""
    return set(_OPTION.findall(re.sub(r"--\[no-\]([a-z-]+)", r"--\1 --no-\1", names)))


def test_the_readme_fits_on_a_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_every_task_and_option_that_a_page_names_exists(page: Path) -> None:
    tasks = pages._tasks()
    for command in commands(page.read_text(encoding="utf-8")):
        if found := re.match(r"invoke ([a-z][a-z-]*)", command):
            assert found[1] in tasks, command
            known = set().union(*(options_of(names) for names, _ in tasks[found[1]][0].help_tuples()))
            assert set(_OPTION.findall(command)) <= known, command


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_every_session_that_a_page_names_exists(page: Path) -> None:
    sessions = {name for group in pages._sessions().values() for name in group}
    for command in commands(page.read_text(encoding="utf-8")):
        if found := re.match(r"nox -s ((?:[a-z_]+ ?)+)", command):
            assert set(found[1].split()) <= sessions, command


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_every_file_of_this_repository_that_a_page_names_exists(page: Path) -> None:
    rooms = "|".join(
        path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in (".nox", ".venv")
    )
    named = re.findall(rf"`((?:{rooms})/[\w./-]*)`", page.read_text(encoding="utf-8"))

    assert [name for name in named if "NAME" not in name and not (ROOT / name).exists()] == []


def test_a_command_of_a_page_is_found_wherever_it_stands() -> None:
    text = "`invoke a --b`\n\n| x |\n|---|\n| `invoke c` |\n\n```sh\ncd d && .venv/bin/invoke e  # why\nX=1 nox -s f\n```\n"

    assert commands(text) == ["invoke a --b", "invoke c", "cd d", "invoke e", "nox -s f"]
