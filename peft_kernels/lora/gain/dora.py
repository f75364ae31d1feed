"""``dora_gain``: the gain that makes a LoRA linear DoRA's, weight-decomposed low-rank adaptation."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_kernels._core.autocast import without_autocast
from peft_kernels._core.checks import wide_dtype
from peft_kernels.four_bit_weight.op import dequantize
from peft_kernels.four_bit_weight.quant_state import QuantizedWeight
from peft_kernels.lora.gain.problem import check_dora
from peft_kernels.lora.kernels.config import torch_rows_per_block


def dora_gain(
    weight: Tensor | QuantizedWeight, lora_a: Tensor, lora_b: Tensor, scale: float | Tensor, magnitude: Tensor
) -> Tensor:
    """Return DoRA's gain, magnitudes over the norms of the rows of W + scale * B A (Liu et al. 2024, arXiv:2402.09353).

    Semantics: ``magnitude / norm(weight + scale * lora_b @ lora_a, dim=1)``, and 0 where a row is zero.

    As in PEFT, whose source names the paper's section 4.3 for it, the norms are constants to autograd: a gradient flows
    to ``magnitude`` alone. ``lora_linear(..., gain=dora_gain(...))`` is a layer.

    Args:
        weight (N, K): floating, as nn.Linear stores it. Or a ``peft_kernels.four_bit.QuantizedWeight``, which is
            decoded to its own dtype; say the one in which it is multiplied.
        lora_a (r, K), lora_b (N, r): any floating dtype; rank r >= 1.
        scale: float, or 0-d floating tensor, which is never read by the host; not differentiated.
        magnitude (N,): any floating dtype.

    Returns:
        gain (N,): float32, or float64 where the weight is; under autocast too.

    Raises:
        ValueError: a shape, dtype or device is wrong.
        UnsupportedError: a 4-bit weight that the forced backend cannot decode.

    Numerics: each row is summed as it is, in float32 or float64, a block of rows at a time, so that an update that
    nearly cancels the weight loses no more than the sum of the two does.

    Example:
        >>> import torch, peft_kernels as pk
        >>> pk.dora_gain(torch.eye(2) * 2, torch.zeros(1, 2), torch.zeros(2, 1), 1.0, torch.tensor([2.0, 3.0]))
        tensor([1.0000, 1.5000])
    """
    if isinstance(weight, QuantizedWeight):
        weight = dequantize(**weight._asdict())
    check_dora(weight, lora_a, lora_b, scale, magnitude)
    wide = wide_dtype(weight.dtype)
    with torch.no_grad(), without_autocast(weight.device.type):
        norms = _row_norms(weight, lora_a.to(wide), lora_b.to(wide) * scale)
        # Over an infinite norm a magnitude gives 0, and has a gradient of 0.
        norms = torch.where(norms > 0.0, norms, torch.inf)
    return magnitude.to(wide) / norms


def _row_norms(weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """Norms of the rows of W + B A, in the factors' dtype."""
    n, k = weight.shape
    # A graph has one block; it would have each block's operations.
    step = max(1, n) if torch.compiler.is_compiling() else torch_rows_per_block(k, weight.device.type)
    norms = [
        torch.linalg.vector_norm(torch.addmm(rows.to(lora_a.dtype), factors, lora_a), dim=1)
        for rows, factors in zip(weight.split(step), lora_b.split(step), strict=True)
    ]
    return norms[0] if len(norms) == 1 else torch.cat(norms)
