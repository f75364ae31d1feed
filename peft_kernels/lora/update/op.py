"""The public function, and the declaration that makes it an operator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from peft_kernels._core.dispatch import Implementation
from peft_kernels._core.operator import Operator
from peft_kernels._core.rows import Rows
from peft_kernels.lora import members
from peft_kernels.lora.kernels import dropout
from peft_kernels.lora.update import torch_impl, triton_impl
from peft_kernels.lora.update.composite import composite
from peft_kernels.lora.update.native import native
from peft_kernels.lora.update.problem import NAME, Inputs, LoraUpdateProblem, Needs, cast_for_y, make_problem
from peft_kernels.lora.update_rows.op import update_by_rows


def lora_update(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float | Sequence[float] | Tensor = 1.0,
    *,
    dropout_p: float | Sequence[float] = 0.0,
    seed: int | Tensor | None = None,
    rows: Rows | None = None,
    ranks: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add the low-rank update of a layer (LoRA, Hu et al. 2021, arXiv:2106.09685, section 4.1) to what the layer made.

    Semantics: ``y + scale * (drop(x) @ lora_a.T) @ lora_b.T``

    With ``rows`` each row has the update of its own adapter, a slot t of ``lora_a`` and ``lora_b``:
    ``y[m] + scale[t] * (drop(x[m]) @ lora_a[t].T) @ lora_b[t].T``, ``t = rows.slot[m]``

    For frozen layers whose product is another's: quantized weights, layers with hooks, any module. y keeps the graph of
    its own.

    Args:
        y (..., N): the frozen layer's output; in x's dtype, or in another one of float32, bfloat16 and float16; any
            strides. It is not written to.
        x (..., K): float32, bfloat16, float16 or float64; any strides, but leading dimensions that do not flatten to
            one without a copy are copied.
        lora_a (r, K): x's dtype or float32; rank r >= 1.
        lora_b (N, r): lora_a's dtype.
        scale: float, or 0-d floating tensor, which is never read by the host; not differentiated.
        dropout_p: in [0, 1), quantised to 1/65536; inverted dropout on x.
        seed: None draws one from torch's generator of x's device; an int or a 0-d int64 tensor on x's device fixes
            it. ``lora_linear_dropout_mask`` returns the mask of a seed, which is ``lora_linear``'s.
        rows: as ``Rows.of`` makes it; x has as many rows, and those that use no slot have y's bits. Slots' factors are
            under each other in lora_a (sum of ranks, K), and side by side in lora_b; scale and dropout_p may be one for
            each slot.
        ranks: with ``rows``, of each slot; 0 is an adapter that this layer does not have.
        backend: "torch" or "triton" forces a backend; None takes ``use_backend``'s, then the variable
            PEFT_KERNELS_BACKEND, then chooses.

    Returns:
        The sum (..., N) in y's dtype, under autocast too, where x is cast as F.linear would cast it.

    Raises:
        ValueError: a shape, dtype, device, probability, seed or backend name is wrong.
        UnsupportedError: the forced backend cannot run this problem.

    Numerics: products accumulate in float32 (float64 for float64). Against a float64 oracle the relative error is at
    most 1.1 times that of eager torch in the same dtypes plus one epsilon of float32, or a quarter of half precision's,
    over enough values that chance evens out (``peft_kernels.testing``). Where y and x have two dtypes, factors in half
    precision are multiplied as float32.
    Gradients of y, x, lora_a and lora_b are computed only where asked for, y's without a copy, and two runs give the
    same bits. Besides x, which is kept only for lora_a's gradient, an (M, r) tensor is saved, and never y.

    Example:
        >>> import torch, peft_kernels as pk
        >>> x, y = torch.ones(2, 3), torch.zeros(2, 2)
        >>> pk.lora_update(y, x, torch.ones(1, 3), torch.ones(2, 1), scale=0.5)
        tensor([[1.5000, 1.5000],
                [1.5000, 1.5000]])
    """
    if rows is not None:
        return update_by_rows(y, x, lora_a, lora_b, scale, rows, ranks, dropout_p, seed, backend)
    if ranks is not None:
        raise ValueError(f"{NAME}: ranks are those of the slots of rows, which is None")
    if isinstance(dropout_p, (list, tuple)):
        raise ValueError(f"{NAME}: dropout_p must be one number but with rows, got {dropout_p}")
    x, lora_a, lora_b = cast_for_y(y, x, lora_a, lora_b)
    limit = dropout.threshold(dropout_p, NAME)  # type: ignore[arg-type]
    seed_tensor: Tensor | None = None
    if limit > 0:
        seed_tensor = dropout.draw_seed(x.device) if seed is None else dropout.as_seed(seed, x.device, NAME)
    if isinstance(scale, Tensor) and isinstance(x, Tensor):
        scale = scale.to(device=x.device)
    elif isinstance(scale, bool):
        scale = float(scale)
    return OPERATOR(Inputs(x, y, lora_a, lora_b, scale, dropout_p, seed_tensor), backend)  # type: ignore[arg-type]


def _results(problem: LoraUpdateProblem, call: Inputs, implementation: Implementation) -> tuple[Tensor, Tensor]:
    y = call.y.new_empty((*call.x.shape[:-1], problem.n))
    return y, call.x.new_empty((problem.m, problem.r), dtype=problem.wide_dtype)


def _reads(needs: Needs) -> Iterable[str]:
    if needs.x or needs.lora_a:
        yield from ("seed", "lora_b")
    if needs.x:
        yield "lora_a"
    if needs.lora_a:
        yield "x"
    if needs.lora_b:
        yield "s"


OPERATOR = Operator(
    name=NAME,
    call=Inputs,
    needs=Needs,
    implementations=(triton_impl.IMPLEMENTATION, torch_impl.IMPLEMENTATION),
    make_problem=make_problem,
    forward=members.forward_of_given,
    backward=members.backward_of_one,
    results=_results,
    composite=composite,
    reads=_reads,
    varying=("m",),
    kept=("s",),
    activations=("x", "y"),
    adds=("y",),
    passes="y",
    native=native,
)
