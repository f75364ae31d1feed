"""Capability record of the CUDA backend: ``lora_group``'s kernels on weights that Triton's decoder writes.

With few tokens these read a decoded weight once more, where a product that decodes would read its four bits.
"""

from __future__ import annotations

from peft_kernels.four_bit_weight import triton_impl
from peft_kernels.lora.four_bit.decoding import on_decoded
from peft_kernels.lora.group import cuda_impl as group

IMPLEMENTATION = on_decoded(__name__, group.IMPLEMENTATION, triton_impl.IMPLEMENTATION, borrows=("triton",))
