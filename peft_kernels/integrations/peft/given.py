"""PEFT's LoRA layers whose base module makes its output by itself: it is called, and ``lora_update`` adds to that.

The result is PEFT's: y + scaling B A drop(x) in y's dtype; dora.py says what it is with DoRA. y is never written to: a
module may keep what it returns, or return what it keeps.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn

from peft_kernels.integrations import calls
from peft_kernels.integrations.faster import SLOWER, is_library_faster, is_timed
from peft_kernels.integrations.peft import bases, dora, row_calls
from peft_kernels.integrations.peft.eligibility import factors_of_call, why_not_on, why_not_output
from peft_kernels.integrations.peft.operands import Factors
from peft_kernels.integrations.peft.row_calls import chosen_by_rows
from peft_kernels.integrations.report import count_fallback
from peft_kernels.integrations.sites import Swapped, library_class
from peft_kernels.lora.update.op import OPERATOR, lora_update
from peft_kernels.lora.update.problem import Inputs


class GivenLayer(Swapped):
    """A layer of PEFT's on a base module that is given; PEFT's class comes after it."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's; what it cannot fuse runs PEFT's own."""
        # A tool may have kept this method, and call it after revert.
        if isinstance(self, GivenLayer):
            by_row = chosen_by_rows(self, x, kwargs)
            if by_row is not None:
                return row_calls.run(self, by_row, x, args, kwargs)
            return run(self, x, args, kwargs)
        y: Tensor = type(self).forward(self, x, *args, **kwargs)
        return y


@cache
def class_of(cls: Any) -> type[nn.Module]:
    """The class in the place of one of PEFT's."""
    return type(f"Given{cls.__name__}", (GivenLayer, cls), {"__module__": __name__})


def run(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A layer's output, its base module called once."""
    y: Any
    factors = why_not_on(layer, x) or factors_of_call(layer, x, args, kwargs)
    if isinstance(factors, str):
        count_fallback(layer, factors)
        y = library_class(layer).forward(layer, x, *args, **kwargs)
        return y
    y = bases.call(layer, x)
    reason = why_not_output(layer, factors.ups[0], x, y)
    if reason is None:
        try:
            if not (is_timed(x) and _is_faster_by_peft(layer, factors, x, y)):
                return _updated(layer, factors, x, y)
            reason = SLOWER()
        except ValueError as error:
            reason = calls.why_not_operation(error)
    count_fallback(layer, reason)
    return _by_peft(layer, x, y)


def _updated(layer: Any, factors: Factors, x: Tensor, y: Tensor) -> Tensor:
    if not bases.follows_autocast(layer):
        x = x.to(bases.cast_of(x.dtype, factors.downs[0].dtype))
    if dora.is_active(layer):
        return dora.on_output(layer, factors, x, y)
    if not factors.drops():
        return lora_update(y, x, *factors.joined())
    for down, up, _, scaling, p in zip(*factors, strict=True):
        y = lora_update(y, x, down, up, scaling, dropout_p=p)
    return y


def _by_peft(layer: Any, x: Tensor, y: Any) -> Tensor:
    made: Tensor = library_class(layer).forward(bases.with_output(layer, y), x)
    return made


def _is_faster_by_peft(layer: Any, factors: Factors, x: Tensor, y: Tensor) -> bool:
    """Whether PEFT's forward should go on from y; the base module is not called again, which a hook could count."""
    # PEFT's layer for AQLM writes to it.
    given = y.detach().clone()
    down, up, scaling = factors.joined() if not factors.drops() else (factors.downs[0], factors.ups[0], 1.0)
    like = Inputs(x, y, down, up, scaling, factors.ps[0], None)
    return is_library_faster(
        layer,
        OPERATOR,
        like,
        lambda x: _updated(layer, factors, x, given),
        lambda x: _by_peft(layer, x, given),
        "DoRA" * dora.is_active(layer),
    )
