from __future__ import annotations

from pathlib import Path

import pytest

from devtools.locks import macho
from tests.support.macho_files import ARM64, DYLIB, OBJECT, SYSTEM, X86_64, fat, native


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_an_image_has_its_name_its_links_and_the_macos_that_it_states(tmp_path: Path) -> None:
    content = native(
        SYSTEM, name="@rpath/liba.dylib", rpaths=("@loader_path",), weak=("b",), minos=(12, 3), kind=DYLIB
    )
    path = write(tmp_path / "liba.dylib", content)
    image = macho.read(path)
    assert image is not None
    assert (image.path, image.install_name, image.rpaths) == (path, "@rpath/liba.dylib", ("@loader_path",))
    assert image.links == (macho.Link(SYSTEM, weak=False), macho.Link("b", weak=True))
    assert image.macos[:2] == (12, 3)


def test_the_arm64_slice_of_a_fat_file_is_the_one_that_is_read(tmp_path: Path) -> None:
    slices = (X86_64, native(cpu=X86_64, minos=(10, 9))), (ARM64, native(minos=(11, 0)))
    image = macho.read(write(tmp_path / "c.so", fat(*slices)))
    assert image is not None
    assert image.macos[:2] == (11, 0)


def test_an_object_file_is_none_because_it_is_linked_and_never_loaded(tmp_path: Path) -> None:
    assert macho.read(write(tmp_path / "c.o", native(kind=OBJECT, minos=None))) is None


def test_candidates_are_found_by_content_or_by_name_and_links_are_not_followed(tmp_path: Path) -> None:
    by_content = write(tmp_path / "bin" / "helper", native())
    by_name = write(tmp_path / "broken.so", b"text")
    write(tmp_path / "readme", b"text")
    (tmp_path / "link.so").symlink_to(by_name)
    assert list(macho.candidates(tmp_path)) == [by_content, by_name]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (SYSTEM, macho.FoundIn.MACOS),
        ("/System/Library/Frameworks/Metal.framework/Metal", macho.FoundIn.MACOS),
        ("@loader_path/liba.dylib", macho.FoundIn.TREE),
        ("@rpath/liba.dylib", macho.FoundIn.TREE),
        ("@rpath/gone.dylib", macho.FoundIn.NOWHERE),
        ("/usr/local/lib/liba.dylib", macho.FoundIn.NOWHERE),
    ],
)
def test_a_link_is_located_as_dyld_does(tmp_path: Path, name: str, found: macho.FoundIn) -> None:
    write(tmp_path / "liba.dylib", native())
    image = macho.read(write(tmp_path / "c.so", native(name, rpaths=("/build", "@loader_path"))))
    assert image is not None
    assert macho.locate(image, image.links[0], tmp_path) is found


def test_a_link_out_of_the_tree_does_not_count(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tmp_path / "liba.dylib").write_bytes(native())
    (tree / "liba.dylib").symlink_to(tmp_path / "liba.dylib")
    (tree / "c.so").write_bytes(native("@loader_path/liba.dylib"))
    image = macho.read(tree / "c.so")
    assert image is not None
    assert macho.locate(image, image.links[0], tree) is macho.FoundIn.NOWHERE
