"""LoRA on 4-bit weights with torch alone: ``lora_group``'s passes, and ``dequantize`` before each base product.

Forward   W_j decoded, y_j = x W_j^T + bias_j + its updates, one member after another
Backward  as ``lora_group``'s; W_j decoded again for dX += dY_j W_j, and only there
Tensors   as problem.Inputs; S (M, sum of r) float32, or float64 with x
Saved     x, S and the seed: no W
Temporary as ``lora_group``'s, one W_j in x's dtype, and what ``dequantize`` needs for a piece of it
Refused   nothing
"""

from __future__ import annotations

from peft_kernels.four_bit_weight import torch_impl as decoder
from peft_kernels.lora.four_bit.decoding import on_decoded
from peft_kernels.lora.group import torch_impl as group

IMPLEMENTATION = on_decoded(__name__, group.IMPLEMENTATION, decoder.IMPLEMENTATION)
