from __future__ import annotations

from pathlib import Path

import pytest

from devtools.docs import links


def test_every_link_of_the_pages_leads_to_a_file_and_a_heading() -> None:
    assert links.broken() == []


def test_the_pages_are_those_at_the_top_and_in_docs(tmp_path: Path) -> None:
    for name in ("README.md", "docs/a.md", "docs/deep/b.md", "elsewhere/c.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    assert [str(page.relative_to(tmp_path)) for page in links.pages(tmp_path)] == [
        "README.md", "docs/a.md", "docs/deep/b.md",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "link",
    ["[a](docs/none.md)", "[a](docs/page.md#none)", "[a](#none)", "![a](docs/none.svg)", '<img src="none.png">',
     "[a](docs/Page.md)", "| a |\n|---|\n| [a](none.md) |"],
)  # fmt: skip
def test_a_link_to_what_is_not_there_is_reported(tmp_path: Path, link: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("# Page\n")
    (tmp_path / "README.md").write_text(f"{link}\n")

    assert [found.partition(":")[0] for found in links.broken(tmp_path)] == ["README.md"]


def test_good_links_addresses_elsewhere_and_code_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("# What `nox -t ci` adds, and why\n\n[back](../README.md)\n")
    (tmp_path / "README.md").write_text(
        "[a](docs/page.md#what-nox--t-ci-adds-and-why) [b](https://example.invalid/none) `[c](none.md)`\n"
    )

    assert links.broken(tmp_path) == []
