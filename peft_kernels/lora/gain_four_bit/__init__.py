"""The operator `lora_gain_four_bit`: a LoRA linear with a gain whose frozen weight is 4-bit (DoRA on QLoRA's base)."""
