"""The steps of LoRA's torch backends: products of one update with x, its base and dY, as a very good user writes them.

Tensors   as problem.Inputs; S and dS (M, r) in the widest dtype whose bits they have
Temporary what dropout or float32 adapters on a half-precision x need is made for a block of rows at a time; on a CPU
          without products of float16, blocks of the base product's factors are cast
Bits      with ``problem.row_invariant`` products are those of row_products.py, and what follows them is one operation
          on each element at a time: torch adds ``alpha`` times something with one rounding in a vector and two behind
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_kernels._core.row_products import aligned, row_product
from peft_kernels._core.torch_products import add_product, has_bfloat16_products, is_slow, product_in_float32
from peft_kernels.lora import members
from peft_kernels.lora.kernels import masks
from peft_kernels.lora.kernels.config import torch_rows_per_block, writes_update_first
from peft_kernels.lora.linear.mask_choice import mask_of
from peft_kernels.lora.linear.problem import Inputs, LoraLinearProblem, Needs

_FEW_ROWS = 16  # up to here, torch reads a float16 W once, as it is, and may sum bfloat16 without oneDNN


def up(problem: LoraLinearProblem, inputs: Inputs, s: Tensor) -> Tensor:
    """y = x W^T + bias + scale S B^T."""
    b, bias = inputs.lora_b.t(), inputs.bias
    if problem.row_invariant:
        y = row_product(inputs.x, inputs.weight.t(), bias)
        add_update(problem, y, s, b, inputs.scale)
        return y
    if adds_base_last(problem) and writes_update_first(problem.dtype, problem.adapter_dtype, bias is not None):
        return update_of(problem, s, b, inputs.scale, bias).addmm_(inputs.x, inputs.weight.t())
    y = base(inputs.x, inputs.weight, bias)
    add_update(problem, y, s, b, inputs.scale)
    return y


def base(x: Tensor, weight: Tensor, bias: Tensor | None, row_invariant: bool = False) -> Tensor:
    """x W^T + bias."""
    if row_invariant:
        return row_product(x, weight.t(), bias)
    if is_slow(x.dtype, x.device.type) and x.shape[0] > _FEW_ROWS:
        return product_in_float32(x, weight.t(), bias)
    return F.linear(x, weight, bias)


def base_gradient(dy: Tensor, weight: Tensor, row_invariant: bool = False) -> Tensor:
    """dY W."""
    if row_invariant:
        return row_product(dy, weight)
    return product_in_float32(dy, weight) if is_slow(dy.dtype, dy.device.type) else dy @ weight


def sum_of_base_gradients(
    problem: LoraLinearProblem, dys: Sequence[Tensor | None], weights: Sequence[Tensor], updates: Tensor | None
) -> Tensor:
    """updates + sum over members of dY W, in x's dtype; ``problem`` is that of any of them, and some dY is there.

    Where products add to a result each sum is rounded, so the small ones come first; else sums are made in S's dtype.
    A weight is asked for when its turn comes, and not held: it may be made then.
    """
    first, *others = members.by_width(dys)
    if adds_in_float32(problem):
        dx = updates
        for member, dy in (first, *others):
            dx = base_gradient(dy, weights[member]) if dx is None else add_product(dx, dy, weights[member])
        assert dx is not None
        return dx
    member, dy = first
    total = base_gradient(dy, weights[member], problem.row_invariant)
    if others:
        total = total.to(problem.wide_dtype)
    for member, dy in others:
        total.add_(base_gradient(dy, weights[member], problem.row_invariant))
    return (total if updates is None else total.add_(updates)).to(problem.dtype)


def adds_base_last(problem: LoraLinearProblem) -> bool:
    """Whether base products are added to updates, which are small and so lose less when they are rounded.

    The product then reads what it adds to, which a GPU hides behind it, and no further pass reads and writes the sum.
    On a CPU another BLAS may run with few rows, which adds term by term, each with the sum's rounding, as torch's own
    loops do for half precision; beside float32 adapters nothing was won there.
    """
    return adds_in_float32(problem) and (problem.device.type != "cpu" or _is_uniform(problem))


def adds_in_float32(problem: LoraLinearProblem) -> bool:
    """Whether a product that is added to a result is rounded with it, once."""
    if problem.row_invariant:
        return False
    if problem.device.type != "cpu":
        return True
    sums_in_float32 = problem.dtype != torch.float16 and (problem.dtype != torch.bfloat16 or has_bfloat16_products())
    return problem.m > _FEW_ROWS and sums_in_float32


def update_of(
    problem: LoraLinearProblem, left: Tensor, right: Tensor, scale: float | Tensor, bias: Tensor | None
) -> Tensor:
    """scale left right + bias in x's dtype."""
    if problem.row_invariant and bias is None:
        return _same_bits(problem, left, right, scale).to(problem.dtype)
    if isinstance(scale, Tensor):
        if problem.dtype == torch.float16 and _is_uniform(problem):
            return (left.to(right.dtype) @ right).mul_(scale)  # in eager's order, which keeps eager's range
        left, scale = left.to(problem.wide_dtype) * scale, 1.0
    if _is_uniform(problem):
        return _scaled_product(left.to(right.dtype), right, scale, bias)
    out = torch.empty(problem.m, right.shape[1], dtype=problem.dtype, device=problem.device)
    for rows in blocks(problem, right.shape[1]):
        product = _scaled_product(left[rows], right, scale, None)
        if bias is None:
            out[rows] = product
        else:
            torch.add(product, bias, out=out[rows])
    return out


def _scaled_product(left: Tensor, right: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """scale left right + bias of one dtype."""
    if bias is not None:
        return torch.addmm(bias, left, right, alpha=scale)
    out = torch.empty(left.shape[0], right.shape[1], dtype=right.dtype, device=right.device)
    return out.addmm_(left, right, beta=0, alpha=scale)


def _same_bits(problem: LoraLinearProblem, left: Tensor, right: Tensor, scale: float | Tensor) -> Tensor:
    """scale left right in the adapters' dtype, each step rounded as eager torch rounds it."""
    # Strides of a single row or column say nothing.
    is_stored = right.shape[0] == 1 if 1 in right.shape else right.stride(1) == 1
    factor = aligned(right) if is_stored else aligned(right.t()).t()
    product = row_product(left.to(right.dtype), factor)
    return product if isinstance(scale, float) and scale == 1.0 else product.mul_(scale)


def _is_uniform(problem: LoraLinearProblem) -> bool:
    """Whether adapters and activations have one dtype, so that whole matrices multiply without a cast."""
    return problem.adapter_dtype == problem.dtype


def blocks(problem: LoraLinearProblem, width: int) -> Iterator[slice]:
    """The rows of a matrix of some width, a block at a time."""
    rows = torch_rows_per_block(width, problem.device.type)
    for start in range(0, problem.m, rows):
        yield slice(start, min(start + rows, problem.m))


def mask_of_rows(problem: LoraLinearProblem, inputs: Inputs, rows: slice) -> masks.Mask | None:
    """The mask of some rows of x; None where nothing is dropped."""
    if inputs.seed is None:
        return None
    runs = list(_runs_of(problem, rows))
    parts = [
        mask_of(
            masks.Rows(inputs.seed, first, count, problem.k, problem.dropout_threshold, problem.lane), problem.device
        )
        for first, count in runs
    ]
    return parts[0] if len(parts) == 1 else masks.Parts(parts, [count for _, count in runs])


def _runs_of(problem: LoraLinearProblem, rows: slice) -> Iterator[tuple[int, int]]:
    """Some of the problem's rows, as neighbours among the mask's: the first of them, and how many."""
    if not problem.runs:
        yield rows.start, rows.stop - rows.start
        return
    start = 0
    for first, count in problem.runs:
        begin, end = max(rows.start - start, 0), min(rows.stop - start, count)
        if begin < end:
            yield first + begin, end - begin
        start += count


def dropped(problem: LoraLinearProblem, inputs: Inputs, rows: slice, mask: masks.Mask | None) -> Tensor:
    """drop(x) of some rows in the adapters' dtype, but for the factor that ``late_factor`` returns."""
    x = inputs.x[rows]
    if mask is None:
        return x.to(problem.adapter_dtype)
    return mask.drop(x, problem.adapter_dtype, problem.keep_scale / late_factor(problem))


def late_factor(problem: LoraLinearProblem) -> float:
    """What of 1 / (1 - p) is left for a product of drop(x): all in bfloat16, where drop(x) would be rounded once more.

    Else drop(x) has it as eager's has: a product evens out its roundings, and float16's range is eager's.
    """
    return problem.keep_scale if problem.adapter_dtype == torch.bfloat16 else 1.0


def down(problem: LoraLinearProblem, inputs: Inputs) -> Tensor:
    """S = drop(x) A^T, in the widest dtype whose bits it has."""
    a = inputs.lora_a.t()
    if problem.row_invariant:
        a = aligned(inputs.lora_a).t()
    if _is_uniform(problem) and not problem.has_dropout:
        return _narrow_product(problem, inputs.x, a)
    s = torch.empty(problem.m, problem.r, dtype=problem.wide_dtype, device=problem.device)
    for rows in blocks(problem, problem.k):
        s[rows] = _narrow_product(problem, dropped(problem, inputs, rows, mask_of_rows(problem, inputs, rows)), a)
    factor = late_factor(problem)
    return s if factor == 1.0 else s.mul_(factor)


def grad_up(
    problem: LoraLinearProblem, inputs: Inputs, s: Tensor | None, dy: Tensor, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """dS = scale dY B, as wide as its bits, where x or lora_a needs it, and dB = scale dY^T S, which alone reads S."""
    needs_ds = needs.x or needs.lora_a
    b, scale, wide = inputs.lora_b, inputs.scale, problem.wide_dtype
    if problem.row_invariant and needs_ds:
        b = aligned(b)
    if _is_uniform(problem):
        if problem.dtype == torch.float16 and (needs_ds or needs.lora_b):
            # As eager does: between other factors the scale would meet what has left float16's range.
            dy, scale = dy * scale, 1.0
        ds = _narrow_product(problem, dy, b) if needs_ds else None
        if ds is not None:
            # torch would first round a tensor of a wider dtype to ds's.
            ds = (ds.to(wide) if isinstance(scale, Tensor) else ds).mul_(scale)
        db = _tall_product(dy, (s * scale).to(dy.dtype)) if s is not None and needs.lora_b else None
        return ds, db
    ds = torch.empty(problem.m, problem.r, dtype=wide, device=problem.device) if needs_ds else None
    db = torch.zeros(problem.n, problem.r, dtype=wide, device=problem.device) if needs.lora_b else None
    for rows in blocks(problem, problem.n):
        block = dy[rows].to(wide)
        if ds is not None:
            ds[rows] = _narrow_product(problem, block, b)
        if db is not None and s is not None:
            db += _tall_product(block, s[rows])
    return None if ds is None else ds.mul_(scale), None if db is None else db.mul_(scale)


def _narrow_product(problem: LoraLinearProblem, wide: Tensor, factor: Tensor) -> Tensor:
    """wide factor, (M, r) of (M, K) and (K, r)."""
    if problem.row_invariant:
        return row_product(wide, factor)
    if wide.device.type == "cpu" and wide.dtype == torch.bfloat16:
        # Measured on a CPU with instructions for it: two thirds of the time.
        return (factor.t() @ wide.t()).t()
    return wide @ factor


def _tall_product(wide: Tensor, narrow: Tensor) -> Tensor:
    """wide^T narrow, (N, r) of (M, N) and (M, r)."""
    if wide.device.type == "cpu" and wide.dtype in (torch.float32, torch.float64):
        # Measured: half the time of a product whose tall factor is the transposed one.
        return (narrow.t() @ wide).t().contiguous()
    return wide.t() @ narrow


def grad_down(problem: LoraLinearProblem, inputs: Inputs, ds: Tensor, dx: Tensor | None, needs: Needs) -> Tensor | None:
    """dA = dS^T drop(x), and dX += drop'(dS A) in place; one draw of the mask serves both."""
    narrow = ds.to(problem.adapter_dtype)
    if not problem.has_dropout:
        if dx is not None:
            add_update(problem, dx, narrow, inputs.lora_a, 1.0)
        if not needs.lora_a:
            return None
        if _is_uniform(problem):
            return narrow.t() @ inputs.x
    da: Tensor | None = None
    for rows in blocks(problem, problem.k):
        mask = mask_of_rows(problem, inputs, rows)
        if dx is not None and mask is not None:
            add_dropped(problem, mask, dx[rows], narrow[rows], inputs.lora_a)
        if needs.lora_a:
            product = narrow[rows].t() @ dropped(problem, inputs, rows, mask)
            da = product.to(problem.wide_dtype) if da is None else da.add_(product)
    return None if da is None else da.mul_(late_factor(problem)).to(problem.adapter_dtype)


def add_dropped(problem: LoraLinearProblem, mask: masks.Mask, out: Tensor, left: Tensor, right: Tensor) -> None:
    """out += drop'(left right), in place, for matrices of one dtype."""
    made = product(problem, left, right)
    if problem.row_invariant:
        out.add_(mask.drop(made, made.dtype, problem.keep_scale))
    else:
        mask.add_dropped(out, made, problem.keep_scale)


def product(problem: LoraLinearProblem, left: Tensor, right: Tensor) -> Tensor:
    """left right for S or dS and a factor as it is stored, of one dtype."""
    return row_product(left, aligned(right)) if problem.row_invariant else left @ right


def add_update(problem: LoraLinearProblem, out: Tensor, left: Tensor, right: Tensor, scale: float | Tensor) -> None:
    """out += scale left right, in place; float32 adapters keep their bits beside an out in half precision."""
    if problem.row_invariant:
        out.add_(_same_bits(problem, left, right, scale))
        return
    if isinstance(scale, Tensor):
        if out.dtype == torch.float16 and _is_uniform(problem):
            out.add_((left.to(out.dtype) @ right).mul_(scale))  # in eager's order, which keeps eager's range
            return
        left, scale = left.to(problem.wide_dtype) * scale, 1.0
    if not _is_uniform(problem):
        for rows in blocks(problem, out.shape[1]):
            masks.add(out[rows], left[rows] @ right, scale)
    else:
        add_product(out, left.to(out.dtype), right, scale)
