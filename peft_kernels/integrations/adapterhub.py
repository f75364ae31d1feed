"""For users of AdapterHub: adapter files, both ways, for models with this package's own adapter modules.

A model that AdapterHub built needs none of this: ``peft_kernels.apply`` leaves it AdapterHub's, with AdapterHub's own
saving and loading.
"""

from peft_kernels.integrations.adapterhub_files import load_adapter, save_adapter

__all__ = ["load_adapter", "save_adapter"]
