"""Capability record of the Triton backend: ``lora_gain``'s launches, and ``dequantize``'s before the base products."""

from __future__ import annotations

from peft_kernels.four_bit_weight import triton_impl as decoder
from peft_kernels.lora.gain import triton_impl as gain
from peft_kernels.lora.gain_four_bit.decoding import on_decoded

IMPLEMENTATION = on_decoded(__name__, gain.IMPLEMENTATION, decoder.IMPLEMENTATION)
