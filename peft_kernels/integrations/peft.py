"""For users of PEFT: adapter files, both ways, for models built from this package's own modules.

A model that PEFT built needs none of this: ``peft_kernels.apply`` leaves it PEFT's, with PEFT's own saving and loading.
"""

from peft_kernels.integrations.peft_files import load_adapter, save_adapter

__all__ = ["load_adapter", "save_adapter"]
