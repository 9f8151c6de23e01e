from __future__ import annotations

from pathlib import Path

import pytest

from devtools.rehearsal import binary
from kohya_mps.core.errors import StepFailed
from tests.support.macho_files import ARM64, X86_64, fat, native
from tests.support.mps_library import BY_HAND, GENERATED, Registration, write


def test_kernels_fallbacks_and_refusals_are_told_apart(tmp_path: Path) -> None:
    library = write(
        tmp_path / "libtorch_cpu.dylib",
        {
            GENERATED: [Registration("add.Tensor"), Registration("mm"), Registration("mm.out")],
            "_unrelated": [Registration("not.Registered")],
            BY_HAND: [
                Registration("linalg_svd", general=True),
                Registration("_slow_conv2d_forward"),
                Registration("linalg_eig", general=True),
            ],
        },
    )
    assert binary.read(library) == binary.Registrations(
        kernels=frozenset({"add.Tensor", "mm", "mm.out"}),
        fallback=frozenset({"linalg_svd", "linalg_eig"}),
        refused=frozenset({"_slow_conv2d_forward"}),
    )


@pytest.mark.parametrize("symbol", [GENERATED, BY_HAND])
def test_a_library_with_only_one_kind_of_registrations_is_refused(tmp_path: Path, symbol: str) -> None:
    library = write(tmp_path / "libtorch_cpu.dylib", {symbol: [Registration("add.Tensor")]})
    with pytest.raises(StepFailed, match="no registrations for MPS"):
        binary.read(library)


def test_a_file_that_is_no_library_for_one_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "libtorch_cpu.dylib"
    for content in (b"text", fat((X86_64, native(cpu=X86_64)), (ARM64, native()))):
        path.write_bytes(content)
        with pytest.raises(StepFailed, match="is no Mach-O library for one architecture"):
            binary.read(path)
