"""Scaled dot-product attention: it selects its kernel by device in C++, in code that Linux builds lack.

On a Mac (ATen/native/transformers/attention.cpp, torch 2.5.1 and 2.15.0) no fused kernel is
registered for MPS, so the mathematical path is taken. There is one exception: without gradients
and dropout, and with contiguous arguments, one MPS kernel does everything.
"""

from __future__ import annotations

import torch

from ..operators import Served
from .device import SimulatedTensor, Simulator

_NAME = "scaled_dot_product_attention"
_KERNEL = "_scaled_dot_product_attention_math_for_mps"


def install(simulator: Simulator, library: torch.library.Library) -> None:
    """Register the choice for tensors of the device."""

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        simulator.recorder.operator(_NAME, Served.COMPOSITE)
        three = (query, key, value)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(
                attn_mask.logical_not(), float("-inf")
            )
        trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in three)
        if trained or dropout_p or not all(tensor.is_contiguous() for tensor in three):
            return torch.ops.aten._scaled_dot_product_attention_math(
                *three, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )[0]
        simulator.recorder.operator(_KERNEL, Served.KERNEL)
        on_cpu = [t.cpu_tensor if isinstance(t, SimulatedTensor) else t for t in (*three, attn_mask)]
        with torch.utils._python_dispatch._disable_current_modes():
            found = torch.ops.aten._scaled_dot_product_attention_math(
                *on_cpu, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
            )[0]
        return SimulatedTensor(found)

    for key in ("AutogradMPS", "MPS"):
        library.impl(_NAME, attend, key)
