"""The operator ``lora_linear``: one frozen linear layer and one low-rank update."""
