"""The operator `lora_update`."""
