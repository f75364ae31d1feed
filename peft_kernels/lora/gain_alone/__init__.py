"""A linear layer whose output a gain multiplies, and no update: (IA)^3. The operator ``lora_gain_alone``."""
