"""Kernels, bytes and kept memory of a training step of one layer, by methods as they are run today and here: counts.

Where layers share x, of all of them; "here" they may be a call each, or one group.

Nothing is run. Operators and launches are counted on tensors without memory, each by the bytes of the tensors that it
reads and writes, each tensor once; caches are left out. A pass is one reading or one writing of the activations, x (or
q, or the token embeddings) in its own dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.tables import markdown
from python_ref import adapter as adapter_oracle
from python_ref import prompt as prompt_oracle

BEGIN = "<!-- counts:begin -->"
END = "<!-- counts:end -->"
BEGIN_GROUPS = "<!-- counts of groups:begin -->"
END_GROUPS = "<!-- counts of groups:end -->"

BF16, FP32 = torch.bfloat16, torch.float32
# An H200's, whose choice of configs is counted.
ARCH, SM_COUNT = 90, 132

# Widths of an 8B model's, K = 4096.
ALONE, QKV, GATE_UP = (4096,), (4096, 1024, 1024), (14336, 14336)

# They move nothing: views, and memory that is asked for.
FREE = {"t", "transpose", "view", "_unsafe_view", "detach", "slice", "expand", "as_strided", "unsqueeze", "alias"}
FREE |= {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "permute", "select", "reshape"}
FREE |= {"unbind", "split", "split_with_sizes"}


def bytes_of(*values: Any) -> int:
    """Bytes of the tensors among values; of an expanded one, those that it has in memory."""
    return sum(_bytes(value) for value in tree_leaves(values) if isinstance(value, Tensor))


def _bytes(tensor: Tensor) -> int:
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
    return math.prod(sizes) * tensor.element_size()


class Traffic(TorchDispatchMode):
    """Adds up what each operator reads and writes; what it writes in place it has as a result too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.launches = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name not in FREE:
            # The first argument is overwritten without being read.
            is_output = name == "copy_" or (name == "addmm_" and (kwargs or {}).get("beta") == 0)
            self.add(bytes_of(args[1:] if is_output else args, kwargs, result))
        return result

    def add(self, count: int) -> None:
        self.bytes += count
        self.launches += 1


@dataclass(frozen=True)
class Count:
    """Of one training step; bytes kept are those that wait for the backward pass, parameters left out."""

    forward: int
    backward: int
    bytes: int
    kept: int


Passes = tuple[Callable[[], Any], Callable[[Any], Any]]


@dataclass(frozen=True)
class Layer:
    """One method's layer, or layers that share x.

    Attributes:
        name: of the table's row.
        activation: bytes of one pass.
        today: its forward, y or all of several, from the tensors that have a gradient or a value of their own.
        activations: its tensors that are no parameters and have a gradient.
        parameters: its tensors that are trained.
        weights: those that are frozen.
        here: (forward, backward) by this package's Triton kernels; the backward pass takes what forward returned.
        keeps: bytes that these keep.
    """

    name: str
    activation: int
    today: Callable[[], Tensor | tuple[Tensor, ...]]
    activations: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    here: Passes
    keeps: Callable[[Any], int]


def layers() -> Iterator[Layer]:
    """The rows: sizes are those of docs/design."""
    yield lora("LoRA", ALONE, BF16, 0.0)
    yield lora("LoRA, float32 adapters, dropout 0.1", ALONE, FP32, 0.1)
    yield lora("LoRA on q, k, v: three calls", QKV, BF16, 0.0)
    yield lora("LoRA on q, k, v: one group", QKV, BF16, 0.0, grouped=True)
    yield adapter("bottleneck adapter, serial, gelu")
    yield prefix("prefix attention, causal")
    yield prompt("prompt tuning", 1)
    yield prompt("prompt tuning, 5 prompts as one batch", 5)


def groups() -> Iterator[tuple[Layer, Layer]]:
    """What members of one x cost in the common cases, as calls and as a group."""
    kinds = ((BF16, 0.0, "bfloat16"), (BF16, 0.1, "bfloat16, dropout 0.1"), (FP32, 0.1, "float32, dropout 0.1"))
    for members, n in (("q, k, v", QKV), ("gate, up", GATE_UP)):
        for adapter_dtype, p, kind in kinds:
            calls, group = (lora(f"{members}, {kind}", n, adapter_dtype, p, grouped) for grouped in (False, True))
            yield calls, group


def lora(name: str, n: tuple[int, ...], adapter_dtype: torch.dtype, p: float, grouped: bool = False) -> Layer:
    """A layer, or layers of one x, K to each of n: today one after another; here a call of each, or a group."""
    m, k, r, scale = 8192, 4096, 16, 0.5
    make = functools.partial(torch.empty, device="meta")
    x, weights = _leaf(m, k), [make(width, k, dtype=BF16) for width in n]
    factors_a = [_leaf(r, k, dtype=adapter_dtype) for _ in n]
    factors_b = [_leaf(width, r, dtype=adapter_dtype) for width in n]
    members, seed = list(zip(weights, factors_a, factors_b, strict=True)), make((), dtype=torch.int64) if p else None
    dys = [make(m, width, dtype=BF16) for width in n]
    ways = _as_group if grouped else _as_calls
    here, keeps = ways(x.detach(), members, scale, p, seed, dys)
    return Layer(
        name,
        bytes_of(x),
        lambda: tuple([_peft_lora(x, *member, scale, p) for member in members]),
        (x,),
        (*factors_a, *factors_b),
        tuple(weights),
        here,
        keeps,
    )


def _peft_lora(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, p: float) -> Tensor:
    result = F.linear(x, weight)
    branch = x.to(a.dtype)
    if p:
        branch = torch.native_dropout(branch, p, True)[0]  # what F.dropout is on CUDA
    return (result + F.linear(F.linear(branch, a), b) * scale).to(result.dtype)


def _as_calls(
    x: Tensor, members: Sequence[Sequence[Tensor]], scale: float, p: float, seed: Tensor | None, dys: Sequence[Tensor]
) -> tuple[Passes, Callable[[Any], int]]:
    """``lora_linear`` on one member after another; autograd sums the gradients of x."""
    from peft_kernels.lora.linear import op, problem, triton_impl

    needs = problem.Needs(x=True, weight=False, lora_a=True, lora_b=True, bias=False)
    passes, keeps = [], []
    for (weight, a, b), dy in zip(members, dys, strict=True):
        call = problem.Inputs(x, weight, a.detach(), b.detach(), scale, None, p, seed)
        passes.append(_by_triton(triton_impl, problem, call, lambda kept, dy=dy: (*kept, dy, needs)))
        keeps.append(_keeps(op.OPERATOR, call, needs, ()))

    def forward() -> list[Any]:
        return [forward() for forward, _ in passes]

    def backward(kept: list[Any]) -> Tensor:
        found = [backward(of_member).x for (_, backward), of_member in zip(passes, kept, strict=True)]
        return functools.reduce(torch.add, found)

    return (forward, backward), lambda kept: bytes_of(x) + sum(map(lambda keep, each: keep(each), keeps, kept))


def _as_group(
    x: Tensor, members: Sequence[Sequence[Tensor]], scale: float, p: float, seed: Tensor | None, dys: Sequence[Tensor]
) -> tuple[Passes, Callable[[Any], int]]:
    from peft_kernels.lora.group import op, problem, triton_impl
    from peft_kernels.lora.members import Needs

    count = len(members)
    weights, factors_a, factors_b = (tuple([part.detach() for part in parts]) for parts in zip(*members, strict=True))
    lanes = tuple(range(count))
    call = problem.Inputs(
        x, weights, (None,) * count, factors_a, factors_b, (scale,) * count, lanes, (p,) * count, lanes, seed
    )
    needs = Needs(True, (False,) * count, (False,) * count, (True,) * count, (True,) * count)
    here = _by_triton(triton_impl, problem, call, lambda kept: (*kept, dys, needs), outputs=count)
    return here, _keeps(op.OPERATOR, call, needs, ("x",))


def adapter(name: str) -> Layer:
    from peft_kernels.adapter import op, problem, triton_impl

    m, k, r, scale = 8192, 4096, 64, 0.5
    x, down, up, down_bias, up_bias = _leaf(m, k), _leaf(r, k), _leaf(k, r), _leaf(r), _leaf(k)
    options = {"down_bias": down_bias, "up_bias": up_bias, "residual": x, "activation": "gelu", "scale": scale}
    call = problem.Inputs(
        x=x.detach(),
        down_weight=down.detach(),
        up_weight=up.detach(),
        down_bias=down_bias.detach(),
        up_bias=up_bias.detach(),
        residual=None,
        serial=True,
        activation="gelu",
        scale=scale,
    )
    needs = problem.Needs(*[True] * 5)
    return Layer(
        name,
        bytes_of(x),
        functools.partial(adapter_oracle.eager, x, down, up, **options),
        (x,),
        (down, up, down_bias, up_bias),
        (),
        here=_by_triton(triton_impl, problem, call, lambda kept: (*kept, torch.empty_like(call.x), needs)),
        keeps=_keeps(op.OPERATOR, call, needs, ("x",)),
    )


def prefix(name: str) -> Layer:
    """Today: what PEFT's cache and transformers' SDPA path run.

    The mask is one for all layers, and here in q's dtype already: torch makes that of a boolean one in each layer.
    """
    from peft_kernels.prefix import op, problem, triton_impl

    batch, heads, key_heads, length, tokens, d = 4, 32, 8, 64, 2048, 128
    q = _leaf(batch, heads, tokens, d)
    k, v = _leaf(batch, key_heads, tokens, d), _leaf(batch, key_heads, tokens, d)
    prefixes = _leaf(key_heads, length, d), _leaf(key_heads, length, d)
    mask = torch.empty(batch, 1, tokens, length + tokens, dtype=BF16, device="meta")

    def today() -> Tensor:
        joined = (
            torch.cat((given.expand(batch, -1, -1, -1), rows), dim=2)
            for given, rows in zip(prefixes, (k, v), strict=True)
        )
        keys, values = (
            rows[:, :, None].expand(-1, -1, heads // key_heads, -1, -1).reshape(batch, heads, length + tokens, d)
            for rows in joined
        )
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            q, keys, values, mask.expand(-1, heads, -1, -1), True
        )[0]

    plain = [tensor.detach() for tensor in (q, k, v, *prefixes)]
    call = problem.Inputs(*plain, causal=True, scale=d**-0.5, key_padding_mask=None)
    needs = problem.Needs(*[True] * 5)
    return Layer(
        name,
        bytes_of(q),
        today,
        (q, k, v),
        prefixes,
        (mask,),
        here=_by_triton(triton_impl, problem, call, lambda kept: (*kept, torch.empty_like(call.q), needs), outputs=0),
        keeps=_keeps(op.OPERATOR, call, needs, ("q", "k", "v")),
    )


def prompt(name: str, n: int) -> Layer:
    from peft_kernels.prompt import problem, triton_impl

    tokens, prompts = torch.empty(8, 512, 4096, dtype=BF16, device="meta"), _leaf(n, 20, 4096)
    call = problem.Inputs(token_embeddings=tokens, prompts=prompts.detach())
    needs = problem.Needs(token_embeddings=False, prompts=True)
    described = problem.make_problem(call)
    return Layer(
        name,
        bytes_of(tokens),
        lambda: prompt_oracle.eager(prompts, tokens),
        (),
        (prompts,),
        (tokens,),
        here=(
            lambda: triton_impl.forward(described, call),
            lambda y: triton_impl.backward(described, y, needs),
        ),
        keeps=lambda kept: 0,
    )


def _leaf(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def _by_triton(
    implementation: Any, family: Any, call: Any, rest: Callable[[tuple[Any, ...]], Sequence[Any]], outputs: int = 1
) -> Passes:
    """The two passes of an implementation of whose results those behind the outputs are kept; ``outputs`` is 0 where
    the backward pass reads y too."""
    problem = family.make_problem(call)

    def forward() -> tuple[Any, ...]:
        return tuple(implementation.forward(problem, call)[outputs:])

    return forward, lambda kept: implementation.backward(problem, call, *rest(kept))


def _keeps(operator: Any, call: Any, needs: Any, activations: tuple[str, ...]) -> Callable[[tuple[Any, ...]], int]:
    """What an operator keeps: of the call, activations that its backward pass reads, and its results' kept part."""
    read = [getattr(call, name) for name in operator.reads(needs) if name in activations]
    return lambda kept: bytes_of(read, kept)


def count_today(layer: Layer) -> Count:
    """Count torch's operators, forward and backward."""
    known = {_memory(tensor) for tensor in (*layer.parameters, *layer.weights)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _memory(tensor) not in known:
            kept[_memory(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Traffic() as forward:
        y = layer.today()
    outputs = y if isinstance(y, tuple) else (y,)
    dys = [torch.empty_like(each) for each in outputs]
    with Traffic() as backward:
        torch.autograd.grad(outputs, (*layer.activations, *layer.parameters), dys)
    return Count(forward.launches, backward.launches, forward.bytes + backward.bytes, sum(kept.values()))


def count_here(layer: Layer) -> Count:
    """Count this package's launches, and torch's operators between them."""
    forward, backward = layer.here
    with launches_are_counted(Traffic()) as first:
        kept = forward()
    with launches_are_counted(Traffic()) as second:
        backward(kept)
    return Count(first.launches, second.launches, first.bytes + second.bytes, layer.keeps(kept))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def launches_are_counted(traffic: Traffic) -> Iterator[Traffic]:
    """Let Triton's launches add to a count in the place of running, with the configs of the device above."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from peft_kernels._core import device, launch

    def counted(self: Any, grid: Any, pointers: tuple[Any, ...], *rest: Any) -> None:
        bases = [pointer.base if isinstance(pointer, TensorDescriptor) else pointer for pointer in pointers]
        traffic.add(bytes_of(*{id(base): base for base in bases}.values()))

    described = device.Hardware(arch=ARCH, sm_count=SM_COUNT)
    with (
        mock.patch.object(device, "INTERPRETER", described),
        mock.patch.object(launch.Launcher, "__call__", counted),
        traffic,
    ):
        yield traffic


def render() -> str:
    """Lay out the README's table.

    Raises:
        ImportError: Triton is not installed, whose launches are counted.
    """
    return _table("one layer's step", ("today", "here"), [[layer, layer] for layer in layers()])


def render_groups() -> str:
    """Lay out the table of docs/design/lora.md; raises as ``render``."""
    return _table("members", ("PEFT", "calls", "group"), [[calls, calls, group] for calls, group in groups()])


def _table(title: str, ways: Sequence[str], rows: Sequence[Sequence[Layer]]) -> str:
    """A line for each row: its first layer as it is run today, the others as here."""
    header = [title, *(f"{what}, {way}" for what in ("kernels", "passes", "kept") for way in ways)]
    lines = []
    for first, *others in rows:
        found = [count_today(first), *map(count_here, others)]
        lines.append(
            [
                first.name,
                *(f"{count.forward} + {count.backward}" for count in found),
                *(f"{count.bytes / first.activation:.1f}" for count in found),
                *(_share(count.kept / first.activation) for count in found),
            ]
        )
    return markdown(header, lines)


def _share(value: float) -> str:
    return "0" if value == 0 else f"{math.ceil(100 * value) / 100:.2f}"
