"""What launches do, shown by launches that end before the driver: a program, since Triton must not interpret.

python tests/core/launching.py        prints a JSON object: each scenario's name, and where it failed or null

A launch's arguments are recorded where Triton would hand them to the driver. Triton's own path hands on tensors, and a
direct launch addresses, which tells them apart.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks import host_time
from peft_kernels._core import launch
from peft_kernels._core.launch import Launcher, descriptor
from tests.codegen import (
    adapter_launches,
    four_bit_weight_launches,
    lora_launches,
    prefix_launches,
    prompt_launches,
)


@triton.jit(do_not_specialize=("count",))
def copy_kernel(
    x_ptr, y_ptr, factor, count, scale, size, stride,
    DOUBLE: tl.constexpr, IS_TENSOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    f = tl.load(factor) if IS_TENSOR else factor
    if x_ptr is not None:
        x = tl.load(x_ptr + offs * stride, mask=offs < size, other=0.0)
        tl.store(y_ptr + offs, x * f * scale + count, mask=offs < size)
        if DOUBLE:
            tl.store(y_ptr + size + offs, x, mask=offs < size)


@triton.jit
def tile_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    y_ptr.store([0, 0], x_ptr.load([0, tl.program_id(0) * size]))


@dataclasses.dataclass(frozen=True)
class Config:
    BLOCK: int = 64
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 1


class Launched(NamedTuple):
    """One launch as the driver would get it."""

    grid: tuple[int, ...]
    stream: int
    function: str
    hooks: tuple[Any, ...]
    arguments: tuple[Any, ...]

    @property
    def is_direct(self) -> bool:
        return not any(isinstance(argument, Tensor) for argument in self.arguments)

    def comparable(self) -> tuple[Any, ...]:
        return self.grid, self.stream, self.function, tuple(map(_address, self.arguments))


def _address(argument: Any) -> Any:
    if isinstance(argument, TensorDescriptor):
        # Which fields there are is Triton's affair; sizes may stand in a list or in a tuple.
        fields = {field.name: getattr(argument, field.name) for field in dataclasses.fields(argument)}
        base = fields.pop("base")
        return base.data_ptr(), *(tuple(value) if isinstance(value, list) else value for value in fields.values())
    return argument.data_ptr() if isinstance(argument, Tensor) else argument


LAUNCHED: list[Launched] = []


def _record(*arguments: Any) -> None:
    *grid, stream, function, _, _, enter, leave = arguments[:9]
    LAUNCHED.append(Launched(tuple(grid), stream, function, (enter, leave), arguments[9:]))


DRIVER = host_time.install(90, _record)


def fresh() -> Launcher:
    return Launcher(copy_kernel, flags=("DOUBLE", "IS_TENSOR"))


def tensors(count: int = 256, dtype: torch.dtype = torch.float32, offset: int = 0) -> tuple[Tensor, Tensor]:
    x, y = (torch.zeros(2 * count + offset, dtype=dtype)[offset:] for _ in range(2))
    return x, y


DEFAULT = (*tensors(), 2.0)


def run(
    launcher: Launcher,
    pointers: tuple[Any, ...] = DEFAULT,
    free: tuple[float, ...] = (3, 0.5),
    specialized: tuple[int, ...] = (256, 1),
    flags: tuple[Any, ...] = (False, False),
    config: Config = Config(),
) -> Launched:
    """Launch once and return what the driver would have got."""
    LAUNCHED.clear()
    launcher((4, 1, 1), pointers, free, specialized, flags, config)
    (launched,) = LAUNCHED
    return launched


def variations() -> Iterator[dict[str, Any]]:
    """Launches that differ in one thing each, of which Triton compiles variants or not."""
    x, y = tensors()
    scalar = torch.zeros(())
    yield {}
    yield {"pointers": (*tensors(dtype=torch.float16), 2.0)}
    yield {"pointers": (tensors(offset=1)[0], y, 2.0)}
    yield {"pointers": (x, tensors(offset=1)[1], 2.0)}
    yield {"pointers": (None, y, 2.0)}
    yield {"pointers": (x, y, scalar), "flags": (False, True)}
    yield {"pointers": (x, y, 2)}
    yield {"free": (16, 0.5)}
    yield {"free": (1, -0.5)}
    yield {"specialized": (255, 1)}
    yield {"specialized": (256, 2)}
    yield {"specialized": (256, 16)}
    yield {"specialized": (2**40, 1)}
    yield {"flags": (True, False)}
    yield {"config": Config(BLOCK=128)}
    yield {"config": Config(splits=7)}
    yield {"config": Config(num_warps=8)}


def a_launch_that_is_known_is_direct_and_triton_s_own() -> None:
    """In any order, each with the function and the arguments of Triton's path."""
    launcher, every = fresh(), list(variations()) * 3
    random.Random(0).shuffle(every)
    for is_known in (False, True):
        for call in every:
            by_triton, launched = run(fresh(), **call), run(launcher, **call)
            assert not by_triton.is_direct and launched.is_direct >= is_known
            assert launched.comparable() == by_triton.comparable(), call


def what_varies_freely_is_no_other_kernel() -> None:
    launcher = fresh()
    run(launcher)
    assert run(launcher, free=(17, 0.25)).is_direct
    assert run(launcher, specialized=(512, 1)).is_direct
    assert run(launcher, config=Config(splits=3)).is_direct
    assert len(launcher._remembered) == 1


def triton_s_rule() -> Callable[[int], Any]:
    """What Triton makes of an integer that it specializes: compiled code since 3.6."""
    from triton.backends.compiler import BaseBackend

    try:
        from triton._C.libtriton import native_specialize_impl
    except ImportError:
        from triton.runtime.jit import create_specialize_impl

        rule = create_specialize_impl(BaseBackend.get_arg_specialization)
        return lambda number: rule(number, False, True, True)
    return lambda number: native_specialize_impl(BaseBackend, number, False, True, True)


def the_rule_for_integers_is_triton_s() -> None:
    numbers = [0, 1, 2, 15, 16, 17, 32, -1, -16, 2**40]
    numbers += [sign * 2**31 + more for sign in (-1, 1) for more in (-16, -1, 0, 16)]
    numbers += [random.Random(0).randint(0, 2**33) for _ in range(1000)]
    ours = [launch.specializations((number,)) for number in numbers]
    triton_s = [*map(triton_s_rule(), numbers)]
    assert len(set(ours)) == len(set(triton_s)) == len(set(zip(ours, triton_s, strict=True))) == 5


def descriptors_are_launched_as_triton_makes_them() -> None:
    launcher = Launcher(tile_kernel, flags=())
    x, y = torch.zeros(64, 64, dtype=torch.bfloat16), torch.zeros(64, 64, dtype=torch.bfloat16)
    for _ in range(2):
        for block in ([64, 64], [32, 64]):
            made = descriptor(x, block), descriptor(y, block)
            genuine = TensorDescriptor.from_tensor(x, block), TensorDescriptor.from_tensor(y, block)
            assert made == genuine
            launched = [
                run(each, pair, (), (16,), ())
                for each in (launcher, Launcher(tile_kernel, flags=()))
                for pair in (made, genuine)
            ]
            assert len({each.comparable() for each in launched}) == 1
    assert len(launcher._remembered) == 2


def streams_and_devices_are_those_of_the_moment() -> None:
    launcher = fresh()
    assert [run(launcher).stream for _ in range(2)] == [1000, 1000]
    with mock.patch.object(DRIVER, "device", 1):
        first, second = run(launcher), run(launcher)
        assert (first.is_direct, second.is_direct, second.stream) == (False, True, 1001)
    with mock.patch.object(DRIVER, "get_current_stream", lambda device: 7):
        assert (run(launcher).is_direct, run(launcher).stream) == (True, 7)


def hooks_see_every_launch() -> None:
    launcher, seen = fresh(), []
    run(launcher)
    for name in ("launch_enter_hook", "launch_exit_hook"):
        chain = getattr(knobs.runtime, name)
        if chain is not None:  # as it is in Triton 3.4, which has no chains
            with mock.patch.object(chain, "calls", [lambda metadata: None]):
                launched = run(launcher)
                assert not launched.is_direct and chain in launched.hooks
            assert run(launcher).is_direct
        with mock.patch.object(knobs.runtime, name, seen.append):
            assert not run(launcher).is_direct
    with mock.patch.object(copy_kernel, "pre_run_hooks", [lambda *_, **__: seen.append("before")]):
        assert not run(launcher).is_direct and seen == ["before"]


def debugging_goes_through_triton() -> None:
    launcher = fresh()
    run(launcher)
    asked: list[bool] = []
    own = JITFunction.run

    def watching(self: Any, *arguments: Any, **named: Any) -> Any:
        asked.append(knobs.runtime.debug or bool(getattr(knobs.compilation, "instrumentation_mode", "")))
        with mock.patch.object(knobs.compilation, "instrumentation_mode", "", create=True):
            return own(self, *arguments, **named)

    with mock.patch.object(JITFunction, "run", watching):
        run(launcher)
    assert asked == [False], "whoever stands in for Triton's run sees every launch"
    with mock.patch.dict(os.environ), mock.patch.object(knobs.runtime, "debug", True):  # Triton 3.4 writes it there
        assert not run(launcher).is_direct
    with mock.patch.object(knobs.compilation, "instrumentation_mode", "any", create=True):
        assert not launcher._may_launch_directly()
    assert run(launcher).is_direct


def other_versions_go_through_triton() -> None:
    for version, known in (("3.4.0", True), ("3.8.1+git", True), ("3.3.1", False), ("3.9.0", False), ("4.0", False)):
        launch.why_not_direct.cache_clear()
        with mock.patch.object(triton, "__version__", version):
            assert (launch.why_not_direct() is None) is known
            launcher = fresh()
            launches = [run(launcher) for _ in range(3)]
        assert [each.is_direct for each in launches] == [False, known, known]
        assert len({each[:3] for each in launches}) == 1
    launch.why_not_direct.cache_clear()


def few_are_remembered() -> None:
    launcher = fresh()
    with mock.patch.object(launch, "REMEMBERED", 2):
        for call in variations():
            run(launcher, **call)
            assert len(launcher._remembered) <= 2
            assert run(launcher, **call).is_direct


def numbers_that_the_key_lacks_go_through_triton() -> None:
    launcher = fresh()
    small, large = run(launcher), run(launcher, free=(2**31, 0.5))
    assert not large.is_direct and large.function != small.function
    assert run(launcher).is_direct and not run(launcher, free=(2**31, 0.5)).is_direct
    # Specialized by Triton, and not by the launcher: never remembered.
    careless = Launcher(triton.jit(copy_kernel.fn), flags=("DOUBLE", "IS_TENSOR"))
    assert not any(run(careless).is_direct for _ in range(2))


def threads_share_a_launcher() -> None:
    launcher, every = fresh(), list(variations())
    wanted = [run(fresh(), **call).comparable() for call in every]
    failed: list[str] = []
    mine = threading.local()

    def work(seed: int) -> None:
        order = random.Random(seed).choices(range(len(every)), k=100)
        for index in order:
            common = {"pointers": DEFAULT, "free": (3, 0.5), "specialized": (256, 1), "flags": (False, False)}
            launcher((4, 1, 1), **{**common, "config": Config(), **every[index]})
            if mine.launched.comparable() != wanted[index]:
                failed.append(f"{every[index]}: {mine.launched} is not {wanted[index]}")

    def record(*arguments: Any) -> None:
        *grid, stream, function, _, _, enter, leave = arguments[:9]
        mine.launched = Launched(tuple(grid), stream, function, (enter, leave), arguments[9:])

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with mock.patch.object(DRIVER, "launched", record), mock.patch.object(launch, "REMEMBERED", 4):
            workers = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(timeout=120)
    finally:
        sys.setswitchinterval(switch)
    assert not failed, failed[0]
    assert not any(worker.is_alive() for worker in workers)


def every_family_s_launches_become_direct() -> None:
    """Each launch of a training step, twice with the same tensors: what Triton hands on, and what the launcher does."""
    own, kernels = Launcher.__call__, set()

    def twice(self: Launcher, *arguments: Any) -> None:
        LAUNCHED.clear()
        with mock.patch.object(self, "_remembered", {}):
            own(self, *arguments)
            own(self, *arguments)
        by_triton, direct = LAUNCHED
        assert not by_triton.is_direct and direct.is_direct, self.kernel.__name__
        assert by_triton.comparable() == direct.comparable(), self.kernel.__name__
        kernels.add((self.kernel.__module__, self.kernel.__name__))

    with mock.patch.object(Launcher, "__call__", twice), tensors_with_addresses():
        bf16, fp32 = torch.bfloat16, torch.float32
        lora_launches._launch(bf16, fp32, 16, 0.1, 256)
        lora_launches._launch(bf16, bf16, 64, 0.0, 256)
        adapter_launches._launch(bf16, bf16, 64, "relu", 8192, 64, "serial")
        adapter_launches._launch(bf16, fp32, 64, "gelu", 16, 64, "wide")
        prefix_launches._launch(bf16, bf16, 64, True, True, 16, 16, 20, None)
        prefix_launches._launch(bf16, bf16, 64, True, False, 1, 1024, 20, None)
        prompt_launches._launch(bf16, fp32, 2, 64)
        four_bit_weight_launches._launch("nf4", bf16, 64, 256, (64, 64))
        four_bit_weight_launches._launch("nvfp4", bf16, 16, 0, (64, 64))
    modules = {module for module, _ in kernels}
    defined = {
        (module, name)
        for module in modules
        for name, value in vars(sys.modules[module]).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert kernels == defined, f"never launched: {sorted(defined - kernels)}"


@contextmanager
def tensors_with_addresses() -> Iterator[None]:
    """Let what makes tensors on the meta device make small ones on the CPU, whose addresses tell them apart."""
    empty = torch.empty

    def on_cpu(*shape: Any, **named: Any) -> Tensor:
        if named.get("device") == "meta":
            named["device"] = "cpu"
        return empty(*shape, **named)

    with mock.patch.object(torch, "empty", on_cpu):
        yield


SCENARIOS = (
    a_launch_that_is_known_is_direct_and_triton_s_own,
    what_varies_freely_is_no_other_kernel,
    the_rule_for_integers_is_triton_s,
    descriptors_are_launched_as_triton_makes_them,
    streams_and_devices_are_those_of_the_moment,
    hooks_see_every_launch,
    debugging_goes_through_triton,
    other_versions_go_through_triton,
    few_are_remembered,
    numbers_that_the_key_lacks_go_through_triton,
    threads_share_a_launcher,
    every_family_s_launches_become_direct,
)


def main() -> None:
    failures: dict[str, str | None] = {}
    for scenario in SCENARIOS:
        try:
            scenario()
            failures[scenario.__name__] = None
        except Exception:  # the test that reads this fails with it
            failures[scenario.__name__] = traceback.format_exc()
    print(json.dumps(failures))


if __name__ == "__main__":
    main()
