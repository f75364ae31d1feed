"""For users of PEFT: adapter files, both ways, for models built from this package's own modules.

A model that PEFT built needs none of this: ``peft_kernels.apply`` leaves it PEFT's, with PEFT's own saving and loading.

layers.py          PEFT's LoRA layers: class swap, the fused forward
bases.py           what makes a layer's frozen product: a weight that can be read, or the base module itself
given.py           the forward of layers whose base module makes it
eligibility.py     which of them are fused, and which calls: every rule
four_bit.py        the layers on bitsandbytes' 4-bit weights: the operation that a call is, when a weight is read
operands.py        what a call of a layer computes with, and the operations that this makes
dora.py            layers whose adapter is DoRA: the rules, and the call with a gain
ia3.py             (IA)^3's layers: the rules, and the fused forward
by_row.py          which adapter each row of a call uses, and the plan that this is
row_calls.py       the forward of layers whose rows choose among adapters
slots.py           what a call computes with whose rows choose among adapters
mixed.py           mixed_batch: the batch that surrounds a call, and checkpointed calls that take it along
groups.py          apply's groups: which parents have layers that may share an input
grouped.py         the forward of a layer that may be a member of a group
siblings.py        what the layers of one parent share: groups, parked outputs, seeds
prompts.py         PEFT's prefix and prompt tuning models: class swap, eligibility, what replaces the repeated prompt
prefixes.py        the same models' prefixes, and the hooks that carry them
files.py           save_adapter and load_adapter
onto_model.py      from_peft: an adapter's files onto a model that has no LoRA layers yet
bank.py            AdapterBank: many adapters' files on one model, each row of a batch with its own
banked.py          its layers: which a model has, and the class in whose place theirs is swapped
adapter_folder.py  the two files of an adapter, and what they say of its base model
lora_files.py      LoRA files for models built from FusedLoRALinear
lora_config.py     the configurations of these
patterns.py        regular expressions in them
prompt_files.py    prefix and prompt files for PrefixEncoder and PromptEmbedding
"""

from peft_kernels.integrations.peft.files import load_adapter, save_adapter
from peft_kernels.integrations.peft.onto_model import from_peft

__all__ = ["from_peft", "load_adapter", "save_adapter"]
