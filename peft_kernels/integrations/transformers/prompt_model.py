"""A prompt on a transformers model: hooks that put it in front of the embeddings, with mask, positions and labels.

One hook on the model inserts; one on the backbone refuses calls that went past it. ``generate`` counts the tokens that
a cache holds to know which are new, and is told which of them are the prompt's.
"""

from __future__ import annotations

import functools
import inspect
import threading
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import find_packed_sequence_indices

from peft_kernels._core.errors import UnsupportedError
from peft_kernels.integrations.hooks import named_arguments, remove_hooks, takes_any_argument
from peft_kernels.integrations.transformers.cache_argument import cache_in, name_in
from peft_kernels.integrations.versions import require
from peft_kernels.prompt import PromptEmbedding, PromptEnsemble

require("transformers")

PROMPT = "prompt"
_IGNORED = -100
_GENERATION = "prepare_inputs_for_generation"

# The backbone of the model whose call has its prompt, in this thread: heads need not hand on what they do not know.
_calls = threading.local()


def add_prompt(model: Any, prompt: PromptEmbedding | PromptEnsemble) -> None:
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
    if not isinstance(prompt, (PromptEmbedding, PromptEnsemble)):
        raise ValueError(f"add_prompt: prompt must be a PromptEmbedding or PromptEnsemble, got {type(prompt).__name__}")
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        kind = "an encoder-decoder" if isinstance(model, PreTrainedModel) else "no transformers"
        raise UnsupportedError(f"add_prompt: {type(model).__name__} cannot have a prompt: it is {kind} model")
    for part in (model, model.base_model):
        named = "inputs_embeds" in inspect.signature(part.forward).parameters
        if not (named or (part is not model and takes_any_argument(part))):
            raise UnsupportedError(
                f"add_prompt: {type(model).__name__} cannot have a prompt: {type(part).__name__} takes no inputs_embeds"
            )
    if hasattr(model, PROMPT):
        raise ValueError(f"add_prompt: {type(model).__name__} has a prompt already; remove it first")
    expected, got = model.get_input_embeddings().embedding_dim, first_of(prompt).embedding_dim
    if got != expected:
        raise ValueError(f"add_prompt: prompt must have embedding_dim = {expected}, got {got}")
    setattr(model, PROMPT, prompt)
    if hasattr(model, _GENERATION) and _GENERATION not in vars(model):
        setattr(model, _GENERATION, functools.partial(_prepare_inputs, model))
    model.register_forward_pre_hook(_insert, with_kwargs=True)
    model.register_forward_hook(_leave, always_call=True)
    model.base_model.register_forward_pre_hook(_check)


def remove_prompt(model: Any) -> nn.Module:
    """Undo ``add_prompt``, and return the prompt.

    Raises:
        ValueError: the model has no prompt.
    """
    prompt: nn.Module | None = getattr(model, PROMPT, None)
    if not isinstance(prompt, (PromptEmbedding, PromptEnsemble)):
        raise ValueError(f"remove_prompt: {type(model).__name__} has no prompt")
    delattr(model, PROMPT)
    if getattr(model.__dict__.get(_GENERATION), "func", None) is _prepare_inputs:
        delattr(model, _GENERATION)
    remove_hooks(model, _insert, _leave)
    remove_hooks(model.base_model, _check)
    return prompt


def first_of(prompt: nn.Module) -> PromptEmbedding:
    """The first prompt of an ensemble, whose sizes are those of all, or the prompt itself."""
    return cast("PromptEmbedding", prompt.prompts[0] if isinstance(prompt, PromptEnsemble) else prompt)


def _insert(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    """Join the prompt and the embeddings, or, behind a cache that holds the prompt, make room for it."""
    kwargs = named_arguments(model, args, kwargs)
    prompt = getattr(model, PROMPT)
    copies = len(prompt.prompts) if isinstance(prompt, PromptEnsemble) else 1
    length, cache = first_of(prompt).num_tokens, cache_in(kwargs)
    if cache is not None and (copies > 1 or getattr(cache, "is_compileable", False)):
        what = "an ensemble answers a call at once" if copies > 1 else "a static cache has no room for the prompt"
        raise UnsupportedError(f"add_prompt: no {name_in(kwargs)} here: {what}")
    behind = cache is not None and cache.get_seq_length() > 0
    positions = kwargs.get("position_ids")
    if positions is not None:
        _check_positions(model, positions, kwargs)
        kwargs["position_ids"] = positions + length if behind else _positions(positions, length, copies)
    kwargs["attention_mask"] = _widened("attention_mask", kwargs.get("attention_mask"), length, copies, 1)
    if behind:
        _check_tokens(kwargs)
    else:
        kwargs["token_type_ids"] = _widened("token_type_ids", kwargs.get("token_type_ids"), length, copies, 0)
        kwargs["labels"] = _labels(kwargs, length, copies)
        kwargs["inputs_embeds"] = prompt(_embeddings(model, kwargs))
        kwargs["input_ids"] = None
    kwargs = {name: value for name, value in kwargs.items() if value is not None or name == "input_ids"}
    _check_last_token(model, kwargs)
    _calls.backbone = model.base_model
    return (), kwargs


def _leave(model: Any, args: Any, output: Any) -> None:
    _calls.backbone = None


def _check(base: Any, args: Any) -> None:
    if getattr(_calls, "backbone", None) is not base:
        raise UnsupportedError(
            "add_prompt: the prompt was not inserted: call the model itself, not its forward, which skips its hooks"
        )


def _prepare_inputs(model: Any, *args: Any, **kwargs: Any) -> Any:
    """As the model's own, but the tokens that a cache from before holds are fewer than it says, by the prompt's.

    Positions of a model that makes them itself are left to it, as PEFT does.
    """
    cache, new = cache_in(kwargs), kwargs.get("next_sequence_length")
    # Releases before 5.23 do not say of the first tokens' chunks that they are.
    is_first = kwargs.get("is_first_iteration") or "next_sequence_length" not in kwargs
    held = cache.get_seq_length() if is_first and cache is not None else 0
    length = first_of(getattr(model, PROMPT)).num_tokens
    if held and new is not None:
        kwargs["next_sequence_length"] = new + length
    prepared: dict[str, Any] = getattr(type(model), _GENERATION)(model, *args, **kwargs)
    positions = prepared.get("position_ids")
    if held and positions is not None and prepared.get("attention_mask") is None:
        _check_continues("position_ids must begin with", held - length, int(positions.flatten()[0]))
    if _counts_its_own_positions(model):
        prepared.pop("position_ids", None)
    return prepared


def _embeddings(model: Any, kwargs: dict[str, Any]) -> Tensor:
    given: Tensor | None = kwargs.get("inputs_embeds")
    return model.get_input_embeddings()(kwargs["input_ids"]) if given is None else given


def _labels(kwargs: dict[str, Any], length: int, copies: int) -> Tensor | None:
    """Labels for each token get ignored ones for the prompt; labels for each row stay."""
    labels: Tensor | None = kwargs.get("labels")
    if labels is None:
        return None
    shape = next(kwargs[name].shape[:2] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None)
    if labels.shape == shape and not labels.is_floating_point():
        return _widened("labels", labels, length, copies, _IGNORED)
    return labels.repeat(copies, *[1] * (labels.dim() - 1))


def _widened(name: str, tensor: Any, length: int, copies: int, fill: int) -> Tensor | None:
    if tensor is None:
        return None
    if not isinstance(tensor, Tensor) or tensor.dim() != 2:
        got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise UnsupportedError(f"add_prompt: {name} must be a tensor (B, L), got {got}")
    ahead = tensor.new_full((tensor.shape[0], length), fill)
    return torch.cat((ahead, tensor), dim=1).repeat(copies, 1)


def _positions(positions: Tensor, length: int, copies: int) -> Tensor:
    """The prompt's own come first, and the given ones after them."""
    ahead = torch.arange(length, device=positions.device).expand(positions.shape[0], length)
    joined = torch.cat((ahead.to(positions.dtype), positions + length), dim=1)
    return joined.repeat(copies, 1) if joined.shape[0] > 1 else joined


def _counts_its_own_positions(model: Any) -> bool:
    return any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules())


def _check_positions(model: Any, positions: Tensor, kwargs: dict[str, Any]) -> None:
    if positions.dim() != 2 or _counts_its_own_positions(model):
        raise UnsupportedError("add_prompt: this model's position_ids do not count from 0 in one row; leave them out")
    alone = kwargs.get("attention_mask") is None and cache_in(kwargs) is None
    if alone and find_packed_sequence_indices(positions) is not None:
        raise UnsupportedError("add_prompt: position_ids tell of packed sequences, and only the first has the prompt")


def _check_tokens(kwargs: dict[str, Any]) -> None:
    """A mask that covers the tokens before tells whether any of them are missing between the cache and the input."""
    mask, cache = kwargs.get("attention_mask"), cache_in(kwargs)
    given = next(kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None)
    if mask is not None:
        expected = cache.get_seq_length() + given.shape[1]
        _check_continues("attention_mask must, with the prompt's columns, be of length", expected, mask.shape[1])


def _check_continues(what: str, expected: int, got: int) -> None:
    if got != expected:
        raise UnsupportedError(
            f"add_prompt: behind a cache that holds the prompt {what} {expected}, got {got}: tokens are missing "
            "between the cache and the input (generate's prefill_chunk_size leaves some out in a second turn)"
        )


def _check_last_token(model: Any, kwargs: dict[str, Any]) -> None:
    """A classifying decoder without input_ids reads the last position, which must not be padding."""
    mask = kwargs.get("attention_mask")
    if hasattr(model, "score") and mask is not None and not torch.compiler.is_compiling() and not mask[:, -1].all():
        raise UnsupportedError("add_prompt: a classifying decoder must be padded on the left")
