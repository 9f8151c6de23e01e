"""The error messages with which torch's MPS kernels refuse arguments. Standard library alone.

Each message is looked up in the library of the macOS wheel. A message that a version no longer
has is not simulated for it.
"""

from __future__ import annotations

from enum import StrEnum


class Text(StrEnum):
    """One error message, or its beginning, as it is in the library. The files are those of torch 2.5.1's ATen."""

    # mps/EmptyTensor.cpp
    FLOAT64 = (
        "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
        "Please use float32 instead."
    )
    # Not a message but the name of a kernel, which is there since pytorch#194074: without it float8 is refused.
    FLOAT8_KERNEL = "copy_identity_dense_castout_float8_e4m3fn"
    # native/mps/operations/Linear.mm
    LINEAR = "MPS device does not support linear for non-float inputs"
    LINEAR_WEIGHT = "MPS device does not support linear for non-float weights"
    LINEAR_BACKWARD = "MPS device does not support linear backward for non-float inputs"
    # native/mps/operations/LinearAlgebra.mm
    MM = "MPS device does not support mm for non-float inputs"
    BMM = "MPS device does not support bmm for non-float inputs"
    ADDMM = "MPS device does not support addmm for non-float input"
    BADDBMM = "MPS device does not support addbmm or baddbmm for non-float inputs"
    # native/mps/operations/UnaryOps.mm, BinaryOps.mm, Blas.mm
    SIGMOID = "MPS does not support sigmoid op with int64 input"
    LOG1P = "MPS does not support log1p op with int64 input"
    ATAN2 = "MPS does not support atan2 op with int64 input"
    DOT = "MPS: dot op doesn't support int64 input"
    TRUNC_DIVIDE = "MPS: does not support trunc_divide op with float16 input"
    # native/mps/operations/Convolution.mm
    CONVOLUTION = "Convolution is supported only for Floating types"
    CONVOLUTION_SIZE = "Output channels > 65536 not supported at the MPS device. "
    CONVOLUTION_TRANSPOSED = "ConvTranspose 3D is not supported on MPS"
    # native/mps/operations/AdaptivePooling.mm
    ADAPTIVE_POOL = (
        "Adaptive pool MPS: input sizes must be divisible by output sizes. "
        "Non-divisible input sizes are not implemented on MPS device yet."
    )
    # native/mps/operations/SoftMax.mm
    SOFTMAX = "softmax with half to float conversion is not supported on MPS"
    # native/mps/operations/FusedAdamKernelImpl.mm and its neighbours
    FUSED_OPTIMIZER = "grad_scale and found_inf are not supported on MPS"
