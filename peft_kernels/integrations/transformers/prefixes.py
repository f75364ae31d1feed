"""The functions for users that put prefixes on transformers' models; each registers what it needs when it is called."""

from __future__ import annotations

from typing import Any

from torch import nn

from peft_kernels.integrations.versions import needs
from peft_kernels.prefix import PrefixEncoder


@needs("prefix_encoder")
def prefix_encoder(
    model: nn.Module, prefix_length: int, reparam_hidden: int | None = None, dtype: Any = None
) -> PrefixEncoder:
    """Make a PrefixEncoder of a transformers model's sizes, on its device.

    Args:
        model: whose layers, key and value heads and head dimension count.
        prefix_length, reparam_hidden, dtype: as PrefixEncoder's; float32 also beside a model in half precision.

    Raises:
        UnsupportedError: the model cannot carry prefixes, with the reason.
    """
    from peft_kernels.integrations.transformers import prefix_model

    prefix_model.check("prefix_encoder", model)
    device = next(model.parameters()).device
    return PrefixEncoder(*prefix_model.sizes(model), prefix_length, reparam_hidden, device=device, dtype=dtype)


@needs("add_prefix")
def add_prefix(model: nn.Module, encoder: PrefixEncoder) -> None:
    """Put prefixes on every layer of a transformers model, in place (prefix tuning, Li & Liang 2021, arXiv:2101.00190).

    Calls and ``generate`` are as before: masks, positions and caches that go in and come out do not count the prefix.
    Inside, positions start at P, as in PEFT. The encoder becomes a part of the model, of its parameters and its
    state_dict; what else is trained is the caller's to say (``model.requires_grad_(False)`` before this call).

    Masks that are more than causal and padding (a sliding window, packed sequences, a mask with rows of its own) and
    attention dropout in training go to transformers' "sdpa" behind a concatenation: exact, and without this package's
    kernels. A sliding window slides over the prefix too, as over the first P tokens.

    Args:
        model: a decoder or an encoder whose attention goes through transformers' AttentionInterface.
        encoder: with the model's layers, key and value heads and head dimension; ``prefix_encoder`` makes one.

    Raises:
        ValueError: the encoder does not fit, or the model has prefixes already.
        UnsupportedError: the model cannot carry prefixes, with the reason.
    """
    from peft_kernels.integrations.transformers import prefix_model

    prefix_model.add(model, encoder)


@needs("remove_prefix")
def remove_prefix(model: nn.Module) -> PrefixEncoder:
    """Undo ``add_prefix``, and return the encoder.

    Raises:
        ValueError: the model has no prefixes.
    """
    from peft_kernels.integrations.transformers import prefix_model

    return prefix_model.remove(model)
