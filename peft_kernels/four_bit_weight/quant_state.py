"""bitsandbytes' 4-bit weights as arguments of ``dequantize``, by the attributes of their objects."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels._core.errors import UnsupportedError
from peft_kernels.four_bit_weight.kernels.formats import FORMATS
from peft_kernels.four_bit_weight.problem import Inputs, make_problem

_KINDS = ("nf4", "fp4")


class QuantizedWeight(NamedTuple):
    """The arguments of ``dequantize``, by name: ``dequantize(**weight._asdict())``; attributes are described there.

    ``lora_linear`` and ``lora_group`` take one in a weight's place.
    """

    packed: Tensor
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    scales: Tensor
    block_size: int
    nested: tuple[Tensor, Tensor, int, float | Tensor] | None = None
    global_scale: float | Tensor | None = None


def from_quant_state(packed: Any, quant_state: Any = None) -> QuantizedWeight:
    """Read a weight of bitsandbytes, a ``Params4bit`` or a tensor with its ``QuantState``; that is not imported.

    Nothing is copied but statistics of half precision. The arguments hold as long as the layer keeps its weight;
    whoever moves it reads it again. The state's own table is compared with the format's, for which a GPU is waited:
    call it once, not in each step.

    Args:
        packed: the weight, of any dtype of storage.
        quant_state: None takes the weight's attribute of that name.

    Raises:
        UnsupportedError: with the reason why this is no weight that ``dequantize`` decodes as bitsandbytes does.

    Example:
        >>> import torch, peft_kernels as pk
        >>> from types import SimpleNamespace
        >>> state = SimpleNamespace(absmax=torch.ones(1), shape=(2, 2), dtype=torch.float32, blocksize=64,
        ...                         quant_type="nf4", code=None, offset=None, state2=None)
        >>> weight = pk.four_bit.from_quant_state(torch.zeros(2, 1, dtype=torch.uint8), state)
        >>> pk.four_bit.dequantize(**weight._asdict())
        tensor([[-1., -1.],
                [-1., -1.]])
    """
    if quant_state is None:
        quant_state = getattr(packed, "quant_state", None)
    if quant_state is None:
        raise _refusal("it has no quant_state; bitsandbytes quantizes a weight where it is moved to its device")
    missing = [
        name for name in ("absmax", "shape", "dtype", "blocksize", "quant_type") if not hasattr(quant_state, name)
    ]
    if missing:
        raise _refusal(f"its quant_state has no {', '.join(missing)}")
    kind = quant_state.quant_type
    if kind not in _KINDS:
        raise _refusal(f"its quant_type is none of {', '.join(_KINDS)}, got {kind!r}")
    if quant_state.shape is None:
        raise _refusal("its quant_state has no shape")
    if getattr(quant_state, "packing_format_for_cpu", False):
        raise _refusal("bitsandbytes has packed it anew for its own product on a CPU")
    _check_table(kind, getattr(quant_state, "code", None))
    weight = understood(packed, quant_state)
    _check(weight)
    return weight


def understood(packed: Any, quant_state: Any) -> QuantizedWeight:
    """The same of a weight that ``from_quant_state`` understands: its table is not read, as where a graph is traced."""
    scales, nested = _statistics(quant_state)
    shape, dtype, block = tuple(quant_state.shape), quant_state.dtype, quant_state.blocksize
    return QuantizedWeight(_bytes_of(packed), quant_state.quant_type, shape, dtype, scales, block, nested)


def _statistics(state: Any) -> tuple[Tensor, tuple[Tensor, Tensor, int, float | Tensor] | None]:
    """The scales and, where they are quantized themselves, the second level."""
    second = getattr(state, "state2", None)
    if second is None:
        # Of half precision where a model was cast as a whole; bitsandbytes reads it in float32 too.
        return _plain("absmax", state.absmax).float(), None
    if getattr(second, "state2", None) is not None:
        raise _refusal("its statistics are quantized more than twice")
    if getattr(state, "offset", None) is None:
        raise _refusal("its quant_state has a state2 and no offset")
    absmax, code = _plain("state2.absmax", second.absmax).float(), _plain("state2.code", second.code).float()
    offset = state.offset.detach() if isinstance(state.offset, Tensor) else state.offset
    return _plain("absmax", state.absmax), (code, absmax, second.blocksize, offset)


def _bytes_of(packed: Any) -> Tensor:
    packed = _plain("weight", packed)
    if packed.dim() == 2 and packed.shape[0] == 1:
        raise _refusal(
            f"it is packed as a row, {tuple(packed.shape)}, which bitsandbytes decodes to a transposed weight"
        )
    return packed if packed.dtype == torch.uint8 else packed.contiguous().view(torch.uint8)


def _plain(name: str, tensor: Any) -> Tensor:
    """A tensor without its subclass, where that is a parameter's."""
    if isinstance(tensor, torch.nn.Parameter):
        with torch._C.DisableTorchFunctionSubclass():
            tensor = tensor.detach()
    if type(tensor) is not Tensor:
        raise _refusal(f"its {name} must be a plain tensor, got {type(tensor).__name__}")
    return tensor


def _check_table(kind: str, code: Any) -> None:
    """A state's own table, which some of bitsandbytes' kernels read and others do not."""
    if not isinstance(code, Tensor) or code.is_meta:
        return
    if code.detach().float().cpu().flatten().tolist() != list(FORMATS[kind].values):
        raise _refusal(f"its quant_state has a table that is not {kind}'s")


def _check(weight: QuantizedWeight) -> None:
    """What ``dequantize`` would say of it."""
    code, second, size, offset = weight.nested or (None, None, 0, 0.0)
    call = Inputs(
        weight.packed, weight.scales, code, second, offset, 1.0,
        weight.kind, weight.shape, weight.dtype, weight.block_size, size,
    )  # fmt: skip
    try:
        make_problem(call)
    except ValueError as error:
        raise _refusal(str(error)) from error


def _refusal(reason: str) -> UnsupportedError:
    return UnsupportedError(f"from_quant_state: this weight is not understood: {reason}")
