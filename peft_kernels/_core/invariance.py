"""A mode in which a row's bits depend on no other row of its batch."""

from __future__ import annotations

from functools import partial

from peft_kernels._core.block import Block
from peft_kernels._core.dispatch import ROW_INVARIANT, forcing


def use_row_invariant(enabled: bool = True) -> Block:
    """Give each row the same bits whatever batch it is in, inside a ``with`` block or a function that this decorates.

    For ``lora_linear`` and ``lora_group``, both also with ``rows``: a row of y, and of x's gradient, is then the same
    to the last bit alone and among others, in a batch of any size and in any place in it, whatever other rows hold and
    whichever adapters they use. So a token has the same numbers in training, in prefill and in decoding.

    Semantics: ``lora_linear(x, ...)[m] == lora_linear(x[m : m + 1], ...)[0]`` for each row m

    It holds as ``use_backend`` does, in this thread and in those that the block starts, beside any ``use_backend``, and
    in compiled calls, which are traced again. A backward pass is in the mode of its forward pass, wherever it runs.

    What it does not promise: equal bits on other devices, backends, dtypes, versions of torch or Triton, or numbers of
    threads; for other strides of the weights; for a layer as a member of another group. With dropout a row keeps its
    bits in batches in which it has the same index, because masks depend on that. Gradients of weights, factors and
    biases are sums over rows. ``bottleneck_adapter``, ``prefix_attention`` and ``prompt_tuning`` run as without it, and
    so does what ``apply`` leaves to its library.

    What it costs: on a GPU the Triton backend runs, whose base products take the place of cuBLAS's, and whose
    reductions are not split for few rows; on a CPU products of blocks of rows, which begin with a check of each new
    shape. docs/design/lora.md has numbers, and says what the promise rests on.

    Args:
        enabled: False undoes an outer block.

    Raises:
        ValueError: what is decorated is a class, a generator or a coroutine function.
        UnsupportedError: from a call in the block that no backend can run so: float64 on a GPU, a GPU without Triton,
            the CUDA backend where it is forced; transforms of torch.func.

    Example:
        >>> import torch, peft_kernels as pk
        >>> x, w, a, b = torch.randn(40, 64), torch.randn(48, 64), torch.randn(4, 64), torch.randn(48, 4)
        >>> with pk.use_row_invariant():
        ...     torch.equal(pk.lora_linear(x, w, a, b)[7:8], pk.lora_linear(x[7:8], w, a, b))
        True
    """

    def inside(outer: str) -> str:
        return outer.removesuffix(ROW_INVARIANT) + (ROW_INVARIANT if enabled else "")

    text = f"use_row_invariant({'' if enabled else enabled})"
    return Block(text, partial(forcing, inside), Block.line_of_the_caller())
