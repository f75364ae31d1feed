"""For users of AdapterHub: adapter files, both ways, for models with this package's own adapter modules.

A model that AdapterHub built needs none of this: ``peft_kernels.apply`` leaves it AdapterHub's, with AdapterHub's own
saving and loading.

layers.py       AdapterHub's bottlenecks: class swap, eligibility, the fused forward
batch_split.py  BatchSplit, all of whose adapters are one operation
rules.py        the reasons for fallbacks, readable where AdapterHub is not installed
deferred.py     results that are made when they are read
files.py        adapter files for models with SerialAdapter and ParallelAdapter
file_config.py  their configurations
activations.py  AdapterHub's names for activations
"""

from peft_kernels.integrations.adapterhub.files import load_adapter, save_adapter

__all__ = ["load_adapter", "save_adapter"]
