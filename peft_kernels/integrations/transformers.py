"""For users of transformers: prefixes and prompts on its models, and a callback for its Trainer and those like it.

Importing this file registers nothing with transformers; the functions do when they are called.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import TrainerCallback

from peft_kernels.integrations.models import apply
from peft_kernels.integrations.report import Report
from peft_kernels.prefix import PrefixEncoder
from peft_kernels.prompt import PromptEmbedding, PromptEnsemble

_logger = logging.getLogger(__name__)


def prefix_encoder(
    model: nn.Module, prefix_length: int, reparam_hidden: int | None = None, dtype: Any = None
) -> PrefixEncoder:
    """Make a PrefixEncoder of a transformers model's sizes, on its device.

    Args:
        model: whose layers, key and value heads and head dimension count.
        prefix_length, reparam_hidden, dtype: as PrefixEncoder's; float32 also beside a model in half precision.
    """
    from peft_kernels.integrations.prefix_model import sizes

    device = next(model.parameters()).device
    return PrefixEncoder(*sizes(model), prefix_length, reparam_hidden, device=device, dtype=dtype)


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
    from peft_kernels.integrations import prefix_model

    prefix_model.add(model, encoder)


def remove_prefix(model: nn.Module) -> PrefixEncoder:
    """Undo ``add_prefix``, and return the encoder.

    Raises:
        ValueError: the model has no prefixes.
    """
    from peft_kernels.integrations import prefix_model

    return prefix_model.remove(model)


def add_prompt(model: nn.Module, prompt: PromptEmbedding | PromptEnsemble) -> None:
    """Put a prompt in front of every input of a transformers model, in place (Lester et al. 2021, arXiv:2104.08691).

    Token embeddings become (N B, P + L, D), N the prompts of an ensemble; masks, token types, positions and labels of
    each token are widened with them, labels with -100. Outputs have P + L positions, the prompt's first. A cache holds
    the prompt after the first call, and ``generate`` works, but not with a static cache or an ensemble. The prompt
    becomes a part of the model; what else is trained is the caller's to say.

    Args:
        model: a decoder or an encoder.
        prompt: of the model's embedding dimension.

    Raises:
        ValueError: the prompt does not fit, or the model has one already.
        UnsupportedError: the model cannot have a prompt, with the reason.
    """
    from peft_kernels.integrations import prompt_model

    prompt_model.add(model, prompt)


def remove_prompt(model: nn.Module) -> nn.Module:
    """Undo ``add_prompt``, and return the prompt.

    Raises:
        ValueError: the model has no prompt.
    """
    from peft_kernels.integrations import prompt_model

    return prompt_model.remove(model)


class ApplyCallback(TrainerCallback):
    """Call ``apply`` on the model when training begins, after the trainer has wrapped and placed it.

    Args:
        strict: as ``apply``'s.

    Attributes:
        report: what ``apply`` returned, None before training.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.report: Report | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Apply, and log the report."""
        self.report = apply(model, strict=self.strict)
        _logger.info("%s", self.report)
