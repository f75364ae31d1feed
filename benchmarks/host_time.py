"""``python -m benchmarks.host_time``: host time of eager calls, with Triton's own binder and launches of nothing.

A stand-in driver takes tensors on the CPU and names sm_90 as the target, so that kernels are compiled and bound as on a
GPU; only the driver's launch itself is missing. Tensors are small: what is timed is Python. Numbers are of thread time,
the least of several medians; on a busy machine only ratios within one run mean anything.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from benchmarks import aot
from peft_kernels._core import device, triton_tools

BF16 = torch.bfloat16
M, N, K, R = 256, 256, 256, 16


class NoLaunchDriver:
    """Answers what Triton asks before a launch, for a device that does not exist.

    Args:
        arch: of the device.
        launched: takes the arguments of every launch, from its grid on.
    """

    def __init__(self, arch: int, launched: Callable[..., object]) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)
        self.launched = launched
        self.device = 0

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 1000 + device


def install(arch: int, launched: Callable[..., object]) -> NoLaunchDriver:
    """From here on this process compiles for an architecture and launches by ``launched``, tensors on the CPU too."""
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver

    stand_in = NoLaunchDriver(arch, launched)
    launches_by = "_run" if hasattr(CompiledKernel, "run") else "run"  # Triton 3.4 has no property

    def init_handles(kernel: Any) -> None:
        if kernel.function is None:
            # No module: there is nothing to unload when the kernel dies.
            kernel.function, kernel.n_regs, kernel.n_spills = kernel.hash, 0, 0
            setattr(kernel, launches_by, lambda *arguments: stand_in.launched(*arguments))

    driver.set_active(stand_in)
    mock.patch.object(CompiledKernel, "_init_handles", init_handles).start()
    mock.patch.object(triton_tools, "why_not_device", lambda device: None).start()
    device.INTERPRETER = aot.HARDWARE[arch]
    return stand_in


def microseconds(calls: dict[str, Callable[[], object]], rounds: int = 15, times: int = 200) -> dict[str, float]:
    """Time calls in turns: of each the least of its rounds' medians of ten."""
    for call in calls.values():
        for _ in range(20):
            call()
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            spent = []
            for _ in range(10):
                start = time.thread_time()
                for _ in range(times // 10):
                    call()
                spent.append((time.thread_time() - start) / (times // 10) * 1e6)
            least[name] = min(least[name], statistics.median(spent))
    return least


def lora_calls() -> dict[str, Callable[[], object]]:
    """Two launches and a product of torch's forward."""
    import peft_kernels as pk
    from peft_kernels.lora.kernels import config, triton_fwd
    from peft_kernels.lora.kernels.dropout import NO_DROPOUT

    make = lambda *shape: torch.randn(*shape, dtype=BF16)  # noqa: E731
    x, w, a, b, bias, dy = make(M, K), make(N, K), make(R, K), make(N, R), make(N), make(M, N)
    xg, ag, bg = (tensor.clone().requires_grad_() for tensor in (x, a, b))
    chip, s = device.INTERPRETER, torch.randn(M, R)
    narrow = config.narrow_product_config(M, K, R, BF16, False, chip)
    rank = config.rank_product_config(BF16, chip)
    term = triton_fwd.RankProduct(s, b, 0.5)

    def forward() -> object:
        with torch.no_grad():
            return pk.lora_linear(x, w, a, b, 0.5, bias, backend="triton")

    def both() -> object:
        y = pk.lora_linear(xg, w, ag, bg, 0.5, bias, backend="triton")
        return torch.autograd.grad(y, (xg, ag, bg), dy)

    def launches() -> object:
        triton_fwd.narrow_product(x, a, 1.0, NO_DROPOUT, False, narrow)
        return triton_fwd.rank_product(term, bias, NO_DROPOUT, BF16, rank)

    def results() -> object:
        return torch.empty(narrow.splits if hasattr(narrow, "splits") else 1, M, R), torch.empty(M, N, dtype=BF16)

    return {
        "lora_linear, no gradient": forward,
        "  narrow_product() and rank_product() alone": launches,
        "  of which torch.empty": results,
        "lora_linear, forward and backward": both,
    }


def member_calls(backend: str, dropout_p: float = 0.0) -> dict[str, Callable[[], object]]:
    """q, k and v of one x in float32, as three calls of ``lora_linear`` and as one group.

    So small that what is timed is Python and torch's own time for each operator.
    """
    import peft_kernels as pk

    m, k, r = 32, 64, 8
    x = torch.randn(m, k, requires_grad=True)
    members = [
        pk.Member(torch.randn(n, k), torch.randn(r, k, requires_grad=True), torch.randn(n, r, requires_grad=True), 0.5)
        for n in (64, 16, 16)
    ]
    wrt = (x, *(member.lora_a for member in members), *(member.lora_b for member in members))
    dys = [torch.randn(m, member.weight.shape[0]) for member in members]
    options = {"dropout_p": dropout_p, "backend": backend}

    def calls() -> tuple[torch.Tensor, ...]:
        return tuple([pk.lora_linear(x, *member, **options) for member in members])

    def group() -> tuple[torch.Tensor, ...]:
        return pk.lora_group(x, members, **options)

    def forward(apply: Callable[[], tuple[torch.Tensor, ...]]) -> object:
        with torch.no_grad():
            return apply()

    def both(apply: Callable[[], tuple[torch.Tensor, ...]]) -> object:
        return torch.autograd.grad(apply(), wrt, dys)

    return {
        f"q,k,v on {backend}, p = {dropout_p:g}, {passes}, {way}": functools.partial(run, apply)
        for passes, run in (("no gradient", forward), ("both passes", both))
        for way, apply in (("calls", calls), ("group", group))
    }


def other_calls() -> dict[str, Callable[[], object]]:
    """A forward pass of each other family, without gradients."""
    import peft_kernels as pk

    make = lambda *shape: torch.randn(*shape, dtype=BF16)  # noqa: E731
    x, wd, wu = make(M, K), make(64, K), make(K, 64)
    q, prefix, tokens, prompts = make(1, 8, 64, 64), make(8, 16, 64), make(2, 64, K), make(1, 16, K)

    def without_gradients(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return call()

        return run

    return {
        "bottleneck_adapter, no gradient": without_gradients(
            lambda: pk.bottleneck_adapter(x, wd, wu, activation="relu", backend="triton")
        ),
        "prefix_attention, no gradient": without_gradients(
            lambda: pk.prefix_attention(q, q, q, prefix, prefix, causal=True, backend="triton")
        ),
        "prompt_tuning, no gradient": without_gradients(lambda: pk.prompt_tuning(tokens, prompts, backend="triton")),
    }


def main() -> None:
    if triton_tools.interpreting():
        raise SystemExit("unset TRITON_INTERPRET: the interpreter binds nothing")
    torch.set_num_threads(1)
    install(90, lambda *arguments: None)
    timed = {**lora_calls(), **other_calls()}
    for backend in ("torch", "triton"):
        for dropout_p in (0.0, 0.1):
            timed |= member_calls(backend, dropout_p)
    for name, spent in microseconds(timed).items():
        print(f"{name:46} {spent:7.1f} us")


if __name__ == "__main__":
    sys.exit(main())
