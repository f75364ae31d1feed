"""PEFT's prefix and prompt tuning models on these kernels: the model's class is swapped, its state is not touched.

PEFT's own forward and generation run, for every task; only what they get from ``get_prompt`` is another thing, and
nobody else does. For prefix tuning it is a cache that counts the prefix without holding it (prefixes.py); for prompt
tuning a stand-in for the repeated prompt, which ``torch.cat`` with the embeddings writes in one pass.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import peft
import torch
from peft import PeftType
from torch import Tensor, nn

from peft_kernels.integrations.hooks import is_hooked
from peft_kernels.integrations.report import count_fallback
from peft_kernels.integrations.rules import Support
from peft_kernels.integrations.sites import Site
from peft_kernels.integrations.versions import why_other_release
from peft_kernels.prompt import prompt_tuning

SUPPORT = Support(
    "PEFT: prefix and prompt tuning models",
    (
        "`PROMPT_TUNING` for every task; while `torch.compile` traces, PEFT's own repetition and concatenation",
        "`PREFIX_TUNING` for causal language models, classification, question answering and feature extraction",
        "`prefix_projection`, several adapters, `disable_adapter()`, `generate`, gradient checkpointing",
    ),
)
_OTHER_KIND = SUPPORT.rule(
    "P-tuning, multitask prompt tuning, CPT, cartridges", "it is PEFT's {kind}, neither PREFIX_TUNING nor PROMPT_TUNING"
)
_NO_TASK = SUPPORT.rule("a model without a task (`task_type=None`)", "it is PEFT's {model}, not one of a task")
_OLD_LIBRARY = SUPPORT.rule(
    "prefixes beside a transformers that is older, or too new", "its prefixes cannot run: {reason}"
)
_OTHER_ENCODER = SUPPORT.rule("an encoder of another class", "its encoder is a {encoder}, not PEFT's {expected}")
_REPLACED = SUPPORT.rule(
    "`get_prompt` or an encoder's `forward` replaced by another tool",
    "get_prompt or its encoder's forward is not PEFT's own",
)
_HOOKED = SUPPORT.rule("hooks on the encoder or inside it", "there are hooks on its encoder")
_OTHER_EMBEDDING = SUPPORT.rule(
    "an embedding that is quantized or sharded", "its embedding is not a plain nn.Embedding"
)

_ENCODERS = {PeftType.PREFIX_TUNING: peft.PrefixEncoder, PeftType.PROMPT_TUNING: peft.PromptEmbedding}


# The model whose own method asks for its prompt, in this thread, until it has got it.
_asking = threading.local()


def _asks(name: str, theirs: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's method of a name, whose call of ``get_prompt`` is known to be PEFT's."""

    @functools.wraps(theirs)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = getattr(super(_Fused, self), name)
        if torch.compiler.is_compiling():
            return own(*args, **kwargs)
        _asking.model = self
        try:
            return own(*args, **kwargs)
        finally:
            _asking.model = None

    return method


class _Fused(peft.PeftModel):
    """What the swapped classes have in common."""

    def __init_subclass__(cls) -> None:
        # A generation asks for its prompt in prepare_inputs_for_generation, but that of an encoder-decoder at once.
        names = ("forward", "generate" if cls.__name__ == "FusedForSeq2SeqLM" else "prepare_inputs_for_generation")
        for name in names:
            if hasattr(cls, name):
                setattr(cls, name, _asks(name, getattr(cls, name)))

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
        """As PEFT's; what cannot be fused, or is asked for by others, is PEFT's own."""
        compiling = torch.compiler.is_compiling()
        if not compiling and getattr(_asking, "model", None) is not self:
            return super().get_prompt(batch_size, task_ids, max_cache_len)
        _asking.model = None
        reason = _why_not_call(self)
        if reason is not None:
            count_fallback(self, reason)
            return super().get_prompt(batch_size, task_ids, max_cache_len)
        if self.active_peft_config.peft_type == PeftType.PREFIX_TUNING:
            return _prefixes().cache_of(self, batch_size)
        if compiling:
            # A compiler joins PEFT's repetition and concatenation by itself, and cannot trace a stand-in for a tensor.
            return super().get_prompt(batch_size, task_ids, max_cache_len)
        encoder: Any = self.prompt_encoder[self.active_adapter]
        return RepeatedPrompt(encoder.embedding.weight)


class FusedForSequenceClassification(_Fused, peft.PeftModelForSequenceClassification):
    """PEFT's class with prefixes and prompts on these kernels; so are those below."""


class FusedForCausalLM(_Fused, peft.PeftModelForCausalLM):
    """As above."""


class FusedForSeq2SeqLM(_Fused, peft.PeftModelForSeq2SeqLM):
    """As above."""


class FusedForTokenClassification(_Fused, peft.PeftModelForTokenClassification):
    """As above."""


class FusedForQuestionAnswering(_Fused, peft.PeftModelForQuestionAnswering):
    """As above."""


class FusedForFeatureExtraction(_Fused, peft.PeftModelForFeatureExtraction):
    """As above."""


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    peft.PeftModelForSequenceClassification: FusedForSequenceClassification,
    peft.PeftModelForCausalLM: FusedForCausalLM,
    peft.PeftModelForSeq2SeqLM: FusedForSeq2SeqLM,
    peft.PeftModelForTokenClassification: FusedForTokenClassification,
    peft.PeftModelForQuestionAnswering: FusedForQuestionAnswering,
    peft.PeftModelForFeatureExtraction: FusedForFeatureExtraction,
}


class RepeatedPrompt:
    """A prompt in every row of a batch, until it is joined with the rows.

    It has what PEFT does with ``get_prompt``'s answer, and nothing else: a cast to the embeddings' dtype, a range of
    tokens, and ``torch.cat((prompt, embeddings), dim=1)``.

    Args:
        weight: (P, D).
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def to(self, dtype: torch.dtype) -> RepeatedPrompt:
        """Cast; float32 beside half precision stays, and is cast as it is written."""
        masters = self.weight.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16)
        return self if masters else RepeatedPrompt(self.weight.to(dtype))

    def __getitem__(self, index: tuple[slice, slice]) -> RepeatedPrompt:
        every_row, tokens = index
        if every_row != slice(None):
            raise ValueError(f"prompt_tuning: a prompt can be cut by its tokens alone, got {index}")
        return RepeatedPrompt(self.weight[tokens])

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not torch.cat:
            return NotImplemented
        (prompt, embeddings), dim = args[0], (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0)
        if dim != 1 or not isinstance(prompt, cls):
            raise ValueError("prompt_tuning: a prompt can only be joined with token embeddings that follow it")
        return prompt_tuning(embeddings, prompt.weight[None])


class _Model(Site):
    """One model; for prefix tuning its attention implementation is set too."""

    def fuse(self) -> None:
        (model,) = self.modules.values()
        if model.peft_type == PeftType.PREFIX_TUNING and type(model) in _FUSED:
            _prefixes().attach(model)
        super().fuse()

    def restore(self) -> None:
        (model,) = self.modules.values()
        if model.peft_type == PeftType.PREFIX_TUNING and type(model) in _FUSED.values():
            _prefixes().detach(model)
        super().restore()


def sites(model: nn.Module) -> Iterator[Site]:
    """PEFT's models that learn prompts."""
    for name, module in model.named_modules():
        if isinstance(module, peft.PeftModel) and getattr(module, "_is_prompt_learning", False):
            yield _Model({name: module}, _FUSED, partial(_why_not, module))


def _why_not(model: Any) -> str | None:
    if model.peft_type not in _ENCODERS:
        return _OTHER_KIND(kind=model.peft_type.value)
    if type(model) not in (*_FUSED, *_FUSED.values()):
        return _NO_TASK(model=type(model).__name__)
    if model.peft_type != PeftType.PREFIX_TUNING:
        return None
    try:
        return _prefixes().why_not(model)
    except ImportError as error:
        reason = why_other_release(error)
        if reason is None:
            raise
        return _OLD_LIBRARY(reason=reason)


def _prefixes() -> ModuleType:
    # Imported for prefixes alone: it registers an attention function, and needs a transformers that has a place for it.
    from peft_kernels.integrations.peft import prefixes

    return prefixes


def _why_not_call(model: Any) -> str | None:
    """Reason that lies in the active adapter, or in what became of the base model."""
    config = model.active_peft_config
    encoder = model.prompt_encoder[model.active_adapter]
    expected: Any = _ENCODERS[config.peft_type]
    if type(encoder) is not expected:
        return _OTHER_ENCODER(encoder=type(encoder).__name__, expected=expected.__name__)
    if not (_is_of(peft.PeftModel, peft.PeftModel.get_prompt) and _is_of(expected, expected.forward)):
        return _REPLACED()
    if any(is_hooked(part) for part in encoder.modules()):
        return _HOOKED()
    if type(encoder.embedding) is not nn.Embedding or type(encoder.embedding.weight) not in (nn.Parameter, Tensor):
        return _OTHER_EMBEDDING()
    return _prefixes().why_not_call(model) if config.peft_type == PeftType.PREFIX_TUNING else None


def _is_of(cls: type, function: Any) -> bool:
    """Whether a function was written where its class was."""
    return getattr(function, "__globals__", None) is vars(sys.modules[cls.__module__])
