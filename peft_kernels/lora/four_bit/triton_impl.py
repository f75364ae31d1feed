"""Capability record of the Triton backend: ``lora_group``'s launches, and ``dequantize``'s before each base product."""

from __future__ import annotations

from peft_kernels.four_bit_weight import triton_impl as decoder
from peft_kernels.lora.four_bit.decoding import on_decoded
from peft_kernels.lora.group import triton_impl as group

IMPLEMENTATION = on_decoded(__name__, group.IMPLEMENTATION, decoder.IMPLEMENTATION)
