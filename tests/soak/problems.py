"""Problems of every family with mixed shapes and dtypes, as calls with gradients, for tests that launch very often."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import peft_kernels as pk
from peft_kernels.adapter.kernels.activations import ACTIVATIONS
from peft_kernels.prompt import prompt_tuning

Call = Callable[[str], Tensor]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Problem:
    """One call on tensors of its own.

    Attributes:
        name: family, sizes, dtype.
        call: backend -> output.
        inputs: that ``call`` reads, those with gradients and others.
        dy: gradient of the output.
    """

    name: str
    call: Call
    inputs: tuple[Tensor, ...]
    dy: Tensor

    def run(self, backend: str) -> tuple[Tensor, ...]:
        """Return the output, then the gradient of every input that wants one."""
        y = self.call(backend)
        wanted = [tensor for tensor in self.inputs if tensor.requires_grad]
        return (y.detach(), *torch.autograd.grad(y, wanted, self.dy))


class _Draw:
    """Sizes and tensors from one seed."""

    def __init__(self, seed: int, device: torch.device, largest: int) -> None:
        self.sizes = random.Random(seed)
        self.values = torch.Generator().manual_seed(seed)
        self.device, self.largest = device, largest
        self.dtype = self.sizes.choice(DTYPES)

    def size(self, share: float = 1.0) -> int:
        """A size of any kind, or, one time in two, a multiple of 16."""
        largest = max(16, int(self.largest * share))
        size = self.sizes.randint(1, largest)
        return size if self.sizes.random() < 0.5 else -(-size // 16) * 16

    def tensor(self, *shape: int, grad: bool = True, spread: float = 1.0) -> Tensor:
        values = spread * torch.randn(*shape, generator=self.values)
        return values.to(self.device, self.dtype).requires_grad_(grad)


def draw(index: int, device: torch.device, largest: int) -> Problem:
    """Make the problem of an index: the families take turns, its sizes and values are always the same.

    Args:
        largest: of the sizes that may be large.
    """
    family = FAMILIES[index % len(FAMILIES)]
    return family(_Draw(index, device, largest))


def _lora_linear(d: _Draw) -> Problem:
    m, n, k, r = d.size(), d.size(), d.size(), d.sizes.choice((1, 5, 8, 16, 64))
    x, weight = d.tensor(m, k), d.tensor(n, k, grad=False, spread=k**-0.5)
    lora_a, lora_b, bias = d.tensor(r, k, spread=k**-0.5), d.tensor(n, r, spread=r**-0.5), d.tensor(n, grad=False)
    p, seed = d.sizes.choice((0.0, 0.1)), d.sizes.randrange(2**40)

    def call(backend: str) -> Tensor:
        return pk.lora_linear(x, weight, lora_a, lora_b, 0.5, bias, dropout_p=p, seed=seed, backend=backend)

    name = f"lora_linear m={m} n={n} k={k} r={r} p={p} {d.dtype}"
    return Problem(name, call, (x, weight, lora_a, lora_b, bias), d.tensor(m, n, grad=False))


def _bottleneck_adapter(d: _Draw) -> Problem:
    m, k, r = d.size(), d.size(), d.sizes.choice((1, 8, 24, 64))
    x, down, up = d.tensor(m, k), d.tensor(r, k, spread=k**-0.5), d.tensor(k, r, spread=r**-0.5)
    # relu's kink is left out: a rounding at it is a whole gradient.
    activation = d.sizes.choice([name for name in ACTIVATIONS if "relu" not in name])
    serial = d.sizes.random() < 0.5
    residual = x if serial else d.tensor(m, k)

    def call(backend: str) -> Tensor:
        return pk.bottleneck_adapter(x, down, up, residual=residual, activation=activation, scale=0.5, backend=backend)

    name = f"bottleneck_adapter m={m} k={k} r={r} {activation} {'serial' if serial else 'parallel'} {d.dtype}"
    inputs = (x, down, up) if serial else (x, down, up, residual)
    return Problem(name, call, inputs, d.tensor(m, k, grad=False))


def _prefix_attention(d: _Draw) -> Problem:
    b, kv_heads, group, head = d.sizes.randint(1, 3), d.sizes.randint(1, 3), d.sizes.choice((1, 2, 4)), 32
    keys, prefix = d.size(0.5), d.sizes.randint(1, 40)
    queries = d.sizes.choice((keys, d.sizes.randint(1, keys)))
    q, k, v = (d.tensor(b, h, s, head) for h, s in ((kv_heads * group, queries), (kv_heads, keys), (kv_heads, keys)))
    prefix_k, prefix_v = d.tensor(kv_heads, prefix, head), d.tensor(kv_heads, prefix, head)
    causal = d.sizes.random() < 0.5

    def call(backend: str) -> Tensor:
        return pk.prefix_attention(q, k, v, prefix_k, prefix_v, causal=causal, backend=backend)

    name = f"prefix_attention b={b} h={kv_heads * group}:{kv_heads} s={queries} l={keys} p={prefix} {causal=} {d.dtype}"
    return Problem(name, call, (q, k, v, prefix_k, prefix_v), d.tensor(b, kv_heads * group, queries, head, grad=False))


def _prompt_tuning(d: _Draw) -> Problem:
    n, p, b, length, width = d.sizes.randint(1, 4), d.sizes.randint(1, 30), d.sizes.randint(1, 5), d.size(0.3), d.size()
    prompts, tokens = d.tensor(n, p, width), d.tensor(b, length, width)

    def call(backend: str) -> Tensor:
        return prompt_tuning(prompts, tokens, backend=backend)

    name = f"prompt_tuning n={n} p={p} b={b} l={length} d={width} {d.dtype}"
    return Problem(name, call, (prompts, tokens), d.tensor(n * b, p + length, width, grad=False))


FAMILIES = (_lora_linear, _bottleneck_adapter, _prefix_attention, _prompt_tuning)
