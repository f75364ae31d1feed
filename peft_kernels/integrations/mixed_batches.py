"""mixed_batch: training and evaluation of a batch whose rows use different adapters."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from peft_kernels.integrations.versions import needs


def mixed_batch(
    model: nn.Module, names: Sequence[str], *, alora_offsets: Sequence[int | None] | None = None
) -> AbstractContextManager[Any]:
    """Let each row of the batch use an adapter of its own, in the calls of a model within the block.

    Semantics: row b of every LoRA layer's output is what PEFT's layer would return for row b of its input with adapter
    ``names[b]`` as the only active one; which adapters are active does not matter. In training too, which PEFT's
    ``adapter_names`` refuse: each adapter drops with its own p. Its gradients are those of its own rows; an adapter
    that no row uses gets none, not zeros, so that no optimizer touches it. Which parameters are trained their
    ``requires_grad`` says: PEFT freezes adapters that are not active, and ``model.set_requires_grad([...])`` makes them
    trainable. A used adapter without any such parameter is a warning, once.

    Backward passes may run behind the block. Gradient checkpointing of transformers' and torch's CheckpointWrapper, of
    both kinds, repeats each call with the batch that it had; own calls of torch's ``checkpoint`` take
    ``batch.bound(function)``. ``torch.compile`` the model outside of the block; batches of the same adapters are one
    graph. A compiled model must not be called in one thread while a block of another one is open.

    Args:
        model: PEFT's, on which ``apply`` ran, or a module around it: DDP's, FSDP's, a compiled one.
        names: the adapter of each batch row, "__base__" for none.
        alora_offsets: of each batch row, how many of its last tokens begin with the invocation of its aLoRA adapter,
            None for none; as ``peft.tuners.lora.variants.calculate_alora_offsets`` returns them.

    Returns:
        A context manager. It yields the batch: ``names``, ``adapters`` (those that are used, in the order of their
        slots), ``rows(length)``, the plan by which ``Rows.mean`` gives each adapter its own mean, ``bound(function)``.

    Raises:
        KeyError: a name is of no adapter.
        ValueError: no LoRA layer of the model is on these kernels; an aLoRA adapter has no offsets; and in a call, x
            has not one row for each name.
        UnsupportedError: an adapter has modules that are not on these kernels, such as embeddings and
            ``modules_to_save``; the model is nn.DataParallel's; a call is checkpointed and would be repeated without
            its batch.

    Example:
        >>> import peft, torch, peft_kernels as pk
        >>> layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> model = peft.get_peft_model(layers, peft.LoraConfig(r=2, target_modules=["0"]), adapter_name="en")
        >>> report = pk.apply(model)
        >>> with pk.mixed_batch(model, ["en", "__base__", "en"]) as batch:
        ...     y = model(torch.ones(3, 4))
        >>> losses = batch.rows().mean(y.square().mean(dim=1))
        >>> losses.sum().backward()
        >>> batch.adapters, losses.shape
        (('en',), torch.Size([1]))
    """
    if "peft" not in sys.modules:
        raise ValueError("mixed_batch: the model has no LoRA layers of PEFT's, which was not imported")
    with needs("mixed_batch"):
        mixed = importlib.import_module("peft_kernels.integrations.peft.mixed")
    manager: AbstractContextManager[Any] = mixed.mixed_batch(model, names, alora_offsets)
    return manager
