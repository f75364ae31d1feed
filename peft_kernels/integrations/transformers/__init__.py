"""For users of transformers: prefixes and prompts on its models, and a callback for its Trainer and those like it.

Importing this registers nothing with transformers; the functions do when they are called.

prefixes.py          prefix_encoder, add_prefix and remove_prefix
prefix_model.py      which models can carry prefixes, and the hooks that bring them
attention_source.py  what a model's attention does with its keys and values
prefix_state.py      the prefixes of a call, and caches that count them without holding them
config_view.py       a configuration with another attention implementation, for one model
interface.py         the attention function and its mask function; registered when it is imported
prompt_model.py      the hooks that put a prompt in front of the embeddings
callback.py          ApplyCallback
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from peft_kernels.integrations.versions import needs

if TYPE_CHECKING:
    from peft_kernels.integrations.transformers.callback import ApplyCallback
    from peft_kernels.integrations.transformers.prefixes import add_prefix, prefix_encoder, remove_prefix
    from peft_kernels.integrations.transformers.prompt_model import add_prompt, remove_prompt

__all__ = ["ApplyCallback", "add_prefix", "add_prompt", "prefix_encoder", "remove_prefix", "remove_prompt"]

_FILES = {
    "ApplyCallback": "callback",
    **dict.fromkeys(("add_prefix", "prefix_encoder", "remove_prefix"), "prefixes"),
    **dict.fromkeys(("add_prompt", "remove_prompt"), "prompt_model"),
}


def __getattr__(name: str) -> Any:
    # One by one, so that each works with the transformers that has what it needs.
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needs(name):
        return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)
