"""The operator `lora_gain`: a LoRA linear whose sum of products is multiplied by a vector over the out-features."""
