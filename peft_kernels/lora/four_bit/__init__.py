"""The operator ``lora_four_bit``: ``lora_group`` and ``lora_linear`` where the frozen weights are 4-bit (QLoRA)."""
