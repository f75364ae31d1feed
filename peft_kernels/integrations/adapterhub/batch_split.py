"""AdapterHub's BatchSplit on ``bottleneck_adapter(rows=)``: one operation for all of a block's adapters.

On a GPU, where the clock finds that faster than an operation for each adapter; on a CPU only where a backend is forced:
there small calls are torch's own operators, and one operation took 1.2 to 3.4 times as long as these (batches of 8 x 64
and 4 x 8 tokens, K 32 to 768, two to four adapters, float32, one thread of a shared machine, 2026-11-30).

AdapterHub's layer slices its state for each child, runs the child and joins the results. The swapped layer hands all
rows over at once, where every child is an adapter that could run by itself, and all are alike; else AdapterHub's own
loop runs, in which each adapter is an operation. What comes before the block and after it stays AdapterHub's.

| what of the state   | AdapterHub's                       | here                                            |
| hidden states       | joined of all children             | y                                               |
| up                  | joined, for a Fuse around          | made when it is read; of parallel adapters, y   |
| inputs, residuals   | sliced and joined                  | as they were                                    |

A layer may be a module of the model's own, of a class that has AdapterHub's among its bases: a class in its place is
made for each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from adapters.context import ForwardContext
from adapters.methods.bottleneck import BottleneckLayer
from torch import Tensor, nn

from peft_kernels._core.dispatch import requested_backend
from peft_kernels._core.rows import Rows
from peft_kernels.adapter import bottleneck_adapter
from peft_kernels.adapter.rows.op import OPERATOR, call_of
from peft_kernels.integrations import calls
from peft_kernels.integrations.adapterhub import rules
from peft_kernels.integrations.adapterhub.layers import (
    FusedAdapter,
    FusedParallelAdapter,
    activation_of,
    later,
    parameters_of,
    why_not_adapter,
    why_not_call,
)
from peft_kernels.integrations.faster import is_group_slower, is_timed
from peft_kernels.integrations.hooks import OwnMethods
from peft_kernels.integrations.report import count_fallback
from peft_kernels.integrations.sites import Site, Swapped, library_class

# What the fused block does without calling it.
_REPLACED_STEPS = ("compose_batch_split", "compose_single", "vslice", "pad_and_concat")
_OWN = OwnMethods(*((BottleneckLayer, name) for name in _REPLACED_STEPS))


class FusedBatchSplit(Swapped):
    """First base of the class that stands in a layer's place."""

    def compose_batch_split(self, adapter_setup: Any, state: Any, lvl: int = 0) -> Any:
        """As AdapterHub's; what it cannot fuse runs AdapterHub's own."""
        layer: Any = self
        theirs = library_class(layer).compose_batch_split  # type: ignore[attr-defined]
        # A compiler sees no gain in one operation, and would have to see the plan being made.
        if torch.compiler.is_compiling() or not _is_for_one_call(layer, adapter_setup, state):
            return theirs(layer, adapter_setup, state, lvl)
        reason = _why_not(layer, adapter_setup)
        if reason is not None:
            count_fallback(layer, reason)
            return theirs(layer, adapter_setup, state, lvl)
        state = layer.pre_block(adapter_setup, state)
        fused = _fused([layer.adapters[name] for name in adapter_setup], tuple(adapter_setup.batch_sizes), state)
        if fused is None:
            return _one_by_one(layer, adapter_setup, state, lvl)
        return fused._replace(last=adapter_setup.last())


@cache
def _class_for(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"FusedBatchSplit{cls.__name__}", (FusedBatchSplit, cls), {"__module__": __name__})


def sites(model: nn.Module) -> Iterator[Site]:
    """AdapterHub's layers of bottlenecks, which report nothing: their adapters are sites of their own."""
    for name, module in model.named_modules():
        if isinstance(module, BottleneckLayer) and getattr(module, "adapters", None):
            cls: Any = library_class(module)
            yield Site({name: module}, {cls: _class_for(cls)}, why_not=lambda: None, is_part=True)


def _is_for_one_call(layer: Any, setup: Any, state: Any) -> bool:
    """Whether there are several adapters to be joined, and it may be faster; what AdapterHub refuses, it refuses."""
    context = ForwardContext.get_context()
    if state.hidden_states.device.type == "cpu" and requested_backend(None) == "auto":
        return False
    return (
        len(setup.batch_sizes) == len(setup.children) > 1
        and sum(setup.batch_sizes) == len(state.hidden_states)
        and min(setup.batch_sizes) >= 0
        and isinstance(state.input_tensor, Tensor)
        # Each adapter says why it cannot give them.
        and not getattr(context, "output_adapter_gating_scores", False)
    )


def _why_not(layer: Any, setup: Any) -> str | None:
    """Reason that lies in the block and its adapters."""
    for child in setup:
        if not isinstance(child, str):
            return rules.BATCH_BLOCK(block=type(child).__name__)
        if child not in layer.adapters:
            return rules.BATCH_ABSENT(adapter=child)
    replaced = _replaced_step(layer)
    if replaced is not None:
        return rules.BATCH_REPLACED(method=replaced)
    adapters = [layer.adapters[name] for name in setup]
    for adapter in adapters:
        reason = why_not_adapter(adapter)
        if reason is not None or type(adapter) not in (FusedAdapter, FusedParallelAdapter):
            return rules.BATCH_OTHER(reason=reason or "apply has not seen it")
    kinds = {f"{library_class(adapter).__name__} of {activation_of(adapter)}" for adapter in adapters}
    if len(kinds) > 1 or len({parameters_of(adapter)[0].dtype for adapter in adapters}) > 1:
        return rules.BATCH_UNLIKE(kinds=", ".join(sorted(kinds)))
    return None


def _replaced_step(layer: Any) -> str | None:
    for step in _REPLACED_STEPS:
        if getattr(library_class(layer), step) is not getattr(BottleneckLayer, step) or step in vars(layer):
            return step
    return _OWN.replaced()


def _fused(adapters: Sequence[Any], batch_sizes: tuple[int, ...], state: Any) -> Any:
    """The state after the block, or None where each adapter has to say by itself why it is not fused."""
    x, is_parallel = state.hidden_states, isinstance(adapters[0], FusedParallelAdapter)
    beside = x if is_parallel else state.adapter_residual
    if any(why_not_call(adapter, x, beside, False) is not None for adapter in adapters):
        return None
    rows = _plan(batch_sizes, math.prod(x.shape[1:-1]), x.device)
    residual = None if is_parallel else beside
    try:
        if is_timed(x) and _is_faster_one_by_one(adapters, batch_sizes, x, residual, rows):
            return None
        y = _batch(adapters, x, residual, rows)
    except ValueError as error:
        calls.why_not_operation(error)
        return None
    up = y if is_parallel else later(lambda: _batch(adapters, x, None, rows), x)
    return state._replace(hidden_states=y, bottleneck_up=up)


def _one_by_one(layer: Any, setup: Any, state: Any, lvl: int) -> Any:
    """What AdapterHub does behind ``pre_block``."""
    states, start = [], 0
    for name, size in zip(setup, setup.batch_sizes, strict=True):
        part = layer.vslice(state, slice(start, start + size))
        states.append(layer.compose_single(name, part, lvl=lvl + 1))
        start += size
    return layer.pad_and_concat(states)


def _batch(adapters: Sequence[Any], x: Tensor, residual: Tensor | None, rows: Rows) -> Tensor:
    down_weight, up_weight, down_bias, up_bias = _stacked(adapters)
    return bottleneck_adapter(
        x,
        down_weight,
        up_weight,
        down_bias=down_bias,
        up_bias=up_bias,
        residual=residual,
        activation=activation_of(adapters[0]),
        scale=[adapter.scaling for adapter in adapters],
        rows=rows,
        ranks=_ranks(adapters),
    )


def _stacked(adapters: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Down and up weights and biases of all; they are small beside activations."""
    downs, down_biases, ups, up_biases = zip(*map(parameters_of, adapters), strict=True)
    return torch.cat(downs), torch.cat(ups, dim=1), torch.cat(down_biases), torch.stack(up_biases)


def _ranks(adapters: Sequence[Any]) -> tuple[int, ...]:
    return tuple([parameters_of(adapter)[0].shape[0] for adapter in adapters])


def _is_faster_one_by_one(
    adapters: Sequence[Any], batch_sizes: tuple[int, ...], x: Tensor, residual: Tensor | None, rows: Rows
) -> bool:
    """Whether an operation for each adapter is faster, with the slices and the sum of both."""
    down_weight, up_weight, down_bias, up_bias = _stacked(adapters)
    serial = residual is x
    call = call_of(
        x,
        (down_weight, up_weight),
        (down_bias, up_bias),
        None if serial else residual,
        serial,
        activation_of(adapters[0]),
        [adapter.scaling for adapter in adapters],
        rows,
        _ranks(adapters),
    )

    def apart(given: Tensor) -> tuple[Tensor]:
        base = given if serial or residual is None else residual
        parts = zip(adapters, given.split(batch_sizes), base.split(batch_sizes), strict=True)
        return (torch.cat([adapter(part, of_base)[0] for adapter, part, of_base in parts]),)

    def joined(given: Tensor) -> tuple[Tensor]:
        return (_batch(adapters, given, given if serial else residual, rows),)

    return is_group_slower(list(adapters), OPERATOR, call, lambda: (joined, apart))


@lru_cache(maxsize=64)
def _plan(batch_sizes: tuple[int, ...], length: int, device: torch.device) -> Rows:
    """One for all layers, and for all batches that are split alike."""
    # What inference mode makes, no backward pass may keep.
    with torch.inference_mode(False):
        slots = torch.repeat_interleave(torch.tensor(batch_sizes, device="cpu"))
        return Rows.of(slots, known=len(batch_sizes), length=length, device=device)
