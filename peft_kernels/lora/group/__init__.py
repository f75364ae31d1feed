"""The operator ``lora_group``: several frozen linear layers that share x, each with low-rank updates of its own."""
