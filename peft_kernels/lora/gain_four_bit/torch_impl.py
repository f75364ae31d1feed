"""LoRA with a gain on a 4-bit weight with torch alone: ``lora_gain``'s passes, and ``dequantize`` before products.

Forward   W decoded, then as ``lora_gain``'s
Backward  as ``lora_gain``'s; W decoded again for dX, and multiplied by the gain where it lies
Tensors   as problem.Inputs; S (M, r) float32, or float64 with x; P (M, N) in x's dtype
Saved     x, S, P and the seed: no W
Temporary as ``lora_gain``'s but for g * W, one W in x's dtype, and what ``dequantize`` needs for a piece of it
Refused   nothing
"""

from __future__ import annotations

from peft_kernels.four_bit_weight import torch_impl as decoder
from peft_kernels.lora.gain import torch_impl as gain
from peft_kernels.lora.gain_four_bit.decoding import on_decoded

IMPLEMENTATION = on_decoded(__name__, gain.IMPLEMENTATION, decoder.IMPLEMENTATION)
