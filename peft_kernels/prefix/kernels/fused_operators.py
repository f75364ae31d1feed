"""Torch's fused attention operators, called by name, because only so do they return and take a log-sum-exp.

Each attends to a sequence alone, y = softmax(scale q k^T + mask) v and lse = log sum exp(scale q k^T + mask), a number
for each query and head. Its backward form recomputes the weights from an lse and takes delta = <dy, y> from a y, and so
returns the gradients of any larger softmax whose y and lse it is given (docs/design/prefix.md). They are private: what
their sources say that one of them cannot do is refused here; whether it is right on a machine is found out there
(qualification.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peft_kernels._core.device import Hardware
from peft_kernels._core.tma import TMA_ALIGNMENT
from peft_kernels.prefix.kernels.attention import Attention

_aten = torch.ops.aten

# The operator's numbers for masks.
_NO_MASK, _CAUSAL_LOWER_RIGHT = 0, 2
# Its backward pass reads lse in blocks of so many queries; inf makes weights of zero.
_LSE_BLOCK = 32
_LARGEST_HEAD = 256


@dataclass(frozen=True)
class Sequence:
    """What an operator attends with: q (B, H, S, D), k and v (B, H_kv, L, D), mask bool (B, L) or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class FusedOperator:
    """One operator.

    Attributes:
        name: of it in paths and records.
        why_not: (attention, hardware) -> reason why it cannot attend, or None.
        forward: (attention, sequence) -> y (B, H, S, D), any strides but a contiguous last dimension, a tensor of its
            own, and lse (B, H, S) float32, contiguous.
        backward: (attention, sequence, y, lse, dy) -> dq, dk, dv, in q's and k's shapes, tensors of their own.
        gives_same_bits: whether two runs of ``backward`` now have the same bits.
    """

    name: str
    why_not: Callable[[Attention, Hardware], str | None]
    forward: Callable[[Attention, Sequence], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    gives_same_bits: Callable[[], bool]


def is_deterministic() -> bool:
    """Whether torch was told to take algorithms that give the same bits twice, and to raise where it has none."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def deterministic(run: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that it is called as if the user had asked for that.

    The switch is the process's, and other threads' operations that have no such algorithm raise meanwhile: this is for
    a process that checks kernels, and for nobody else.
    """

    def run_deterministically(*arguments: Any, **options: Any) -> Any:
        was_on = torch.are_deterministic_algorithms_enabled()
        only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
        # torch's public function for it imports the compiler.
        torch._C._set_deterministic_algorithms(True, warn_only=False)
        try:
            return run(*arguments, **options)
        finally:
            torch._C._set_deterministic_algorithms(was_on, warn_only=only_warned)

    return run_deterministically


def why_not_pieces(attention: Attention) -> str | None:
    """Reason why an attention cannot be in two pieces, whatever the operator, or None.

    In float32 the sequence's lse, about log L, is rounded to float32 before the prefix is weighed against it: with 40
    keys gradients were up to 1.06 times the error that the budget grants, whatever the operator computes in.
    """
    if attention.dtype.itemsize != 2:
        return "it is for half precision"
    if 0 in (attention.b, attention.h, attention.s, attention.d, attention.l, attention.p):
        return "there is no prefix, or no sequence"
    if attention.causal and attention.s > attention.l:
        return "some queries see no key of the sequence"
    if attention.d > _LARGEST_HEAD or attention.scale <= 0:
        return f"a head must have at most {_LARGEST_HEAD} dimensions, and the scale be positive"
    return None


def _flash_why_not(attention: Attention, chip: Hardware) -> str | None:
    if attention.padded:
        return "it takes no padding mask"
    if attention.d % 8:
        return "a head must have a multiple of 8 dimensions"
    # Its backward pass takes more shared memory there than a block has.
    if 192 < attention.d <= 224 and chip.arch not in (80, 90, 100):
        return "heads of 193 to 224 dimensions have no backward pass on this GPU"
    return None


def _flash_forward(attention: Attention, sequence: Sequence) -> tuple[Tensor, Tensor]:
    """Its causal mask is aligned at the lower right; fewer key heads than query heads are read in place."""
    q, k, v = map(_aligned, (sequence.q, sequence.k, sequence.v))
    y, lse, *_ = _aten._scaled_dot_product_flash_attention.default(
        q, k, v, 0.0, attention.causal, False, scale=attention.scale
    )
    return y, lse


def _flash_backward(
    attention: Attention, sequence: Sequence, y: Tensor, lse: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Without dropout its random state is not read, and so need not be the forward pass's."""
    q, k, v = map(_aligned, (sequence.q, sequence.k, sequence.v))
    state = torch.empty(2, dtype=torch.uint64, device=q.device)
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_backward.default(
        _aligned(dy), q, k, v, y, lse, None, None, attention.s, attention.l, 0.0, attention.causal, state, state,
        scale=attention.scale,
    )  # fmt: skip
    return dq, dk, dv


def _cudnn_why_not(attention: Attention, chip: Hardware) -> str | None:
    if attention.padded:
        return "it takes padding as a dense mask alone"
    if attention.causal and attention.s != attention.l:
        return "its causal mask is aligned at the upper left"
    if attention.d % 8 or attention.d > 128:
        return "a head must have a multiple of 8 dimensions, at most 128"
    if attention.l == 1 or (torch.backends.cudnn.version() or 0) < 90000:
        return "it needs cuDNN 9, and more than one key"
    return None


def _cudnn_forward(attention: Attention, sequence: Sequence) -> tuple[Tensor, Tensor]:
    q, k, v = map(_aligned, (sequence.q, sequence.k, sequence.v))
    y, lse, *_ = _aten._scaled_dot_product_cudnn_attention.default(
        q, k, v, None, True, 0.0, attention.causal, False, scale=attention.scale
    )
    return y, lse.reshape(attention.b, attention.h, attention.s).contiguous()


def _no_backward(*_: Any) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("torch asks cuDNN for no deterministic backward pass, so there is none here")


def _efficient_why_not(attention: Attention, chip: Hardware) -> str | None:
    if not attention.padded:
        return "without a padding mask the others are faster"
    return "a head must have a multiple of 8 dimensions" if attention.d % 8 else None


def _efficient_forward(attention: Attention, sequence: Sequence) -> tuple[Tensor, Tensor]:
    q, k, v = _by_tokens(attention, sequence)
    y, lse, *_ = _aten._efficient_attention_forward.default(
        q, k, v, _bias(attention, sequence), None, None, None, None, 0.0, _mask_type(attention), True,
        scale=attention.scale,
    )  # fmt: skip
    if lse.shape[2] > attention.s:
        lse = lse.narrow(2, 0, attention.s).clone(memory_format=torch.contiguous_format)
    return y.transpose(1, 2), lse


def _efficient_backward(
    attention: Attention, sequence: Sequence, y: Tensor, lse: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """With one range of keys for each head dq is added up by one block, in order; its state is not read either."""
    q, k, v = _by_tokens(attention, sequence)
    padded = -(-attention.s // _LSE_BLOCK) * _LSE_BLOCK
    if padded > attention.s:
        lse = torch.nn.functional.pad(lse, (0, padded - attention.s), value=torch.inf)
    state = torch.empty((), dtype=torch.int64, device=q.device)
    dq, dk, dv, _ = _aten._efficient_attention_backward.default(
        dy.transpose(1, 2), q, k, v, _bias(attention, sequence), y.transpose(1, 2).contiguous(), None, None,
        attention.s, attention.l, lse, 0.0, state, state, _mask_type(attention), False,
        scale=attention.scale, num_splits_key=1,
    )  # fmt: skip
    if attention.group > 1:
        dk, dv = (x.unflatten(2, (-1, attention.group)).sum(3) for x in (dk, dv))
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _by_tokens(attention: Attention, sequence: Sequence) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (B, S or L, H, D): this operator has no key head that several query heads read."""
    q, k, v = sequence.q, sequence.k, sequence.v
    if attention.group > 1:
        k, v = (x.repeat_interleave(attention.group, dim=1) for x in (k, v))
    return _aligned(q).transpose(1, 2), _aligned(k).transpose(1, 2), _aligned(v).transpose(1, 2)


def _mask_type(attention: Attention) -> int:
    return _CAUSAL_LOWER_RIGHT if attention.causal else _NO_MASK


def _bias(attention: Attention, sequence: Sequence) -> Tensor | None:
    """What is added to scores, (B, H, S, L) of which B L are stored, in rows whose length the operator asks for.

    Finite: so a row whose keys are all padded has a finite lse, and beside the prefix's a weight of exactly zero.
    """
    if sequence.mask is None:
        return None
    rows = torch.where(sequence.mask, 0.0, torch.finfo(attention.dtype).min / 4).to(attention.dtype)
    rows = torch.nn.functional.pad(rows, (0, -attention.l % 16)).narrow(1, 0, attention.l)
    return rows.unsqueeze(1).unsqueeze(1).expand(attention.b, attention.h, attention.s, attention.l)


def _aligned(x: Tensor) -> Tensor:
    """A tensor whose rows begin at multiples of 16 bytes, as kernels load them: itself, or a copy."""
    size = x.element_size()
    strides = (stride for stride, count in zip(x.stride()[:-1], x.shape, strict=False) if count > 1)
    starts = (x.data_ptr(), *(stride * size for stride in strides))
    is_aligned = x.stride(-1) == 1 and not any(start % TMA_ALIGNMENT for start in starts)
    return x if is_aligned else x.clone(memory_format=torch.contiguous_format)


FLASH = FusedOperator("flash", _flash_why_not, _flash_forward, _flash_backward, is_deterministic)
CUDNN = FusedOperator("cudnn", _cudnn_why_not, _cudnn_forward, _no_backward, lambda: False)
EFFICIENT = FusedOperator("efficient", _efficient_why_not, _efficient_forward, _efficient_backward, lambda: True)


class Pieces(NamedTuple):
    """The operator that attends to the sequence, and whether it makes its gradients too."""

    operator: FusedOperator
    both: bool

    def gives_gradients(self) -> bool:
        """Whether the operator's backward form is taken, now: the user may have changed what torch is asked for."""
        return self.both and self.operator.gives_same_bits()


PATHS = {
    "flash": Pieces(FLASH, both=False),
    "flash both": Pieces(FLASH, both=True),
    "cudnn": Pieces(CUDNN, both=False),
    "efficient": Pieces(EFFICIENT, both=False),
    "efficient both": Pieces(EFFICIENT, both=True),
}
"""A path begins with its operator's name."""
