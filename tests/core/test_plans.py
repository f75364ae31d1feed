"""Plans: what a call does is decided once for calls that are like it, and only for those."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import peft_kernels as pk
from peft_kernels._core import cuda_tools, dispatch, plans
from peft_kernels.lora.linear.op import OPERATOR
from peft_kernels.lora.linear.problem import Inputs
from tests.contract.operators import CPU, Operator, over


def _tensors(m: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    shapes = {"x": (m, 8), "weight": (6, 8), "lora_a": (2, 8), "lora_b": (6, 2), "bias": (6,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(*shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The calls of lora_linear that are checked, in plans that no earlier test made."""
    calls: list[Any] = []
    make_problem = OPERATOR.make_problem
    monkeypatch.setattr(OPERATOR, "make_problem", lambda call: (calls.append(call), make_problem(call))[1])
    monkeypatch.setattr(OPERATOR, "plans", plans.Cache())
    return calls


def test_a_call_like_an_earlier_one_is_not_checked(made: list[Any]) -> None:
    first = pk.lora_linear(**_tensors(), scale=0.5)
    others = {name: (x + 1).requires_grad_() for name, x in _tensors().items()}
    others["weight"] = nn.Parameter(others["weight"].detach().t().contiguous().t())
    again, other = pk.lora_linear(**_tensors(), scale=0.5), pk.lora_linear(**others, scale=-2.0)
    assert len(made) == 2  # a Parameter is no Tensor to a key
    assert torch.equal(again, first)
    torch.testing.assert_close(other, pk.lora_linear(**others, scale=-2.0, backend="torch"))


@contextlib.contextmanager
def _another_generation() -> Iterator[None]:
    dispatch.choices_changed()
    yield


# What checks or choices read, changed one at a time.
NEIGHBOURS: dict[str, tuple[dict[str, Any], Callable[[], contextlib.AbstractContextManager[Any]]]] = {
    "a leading dimension": ({"x": torch.ones(3, 1, 8)}, contextlib.nullcontext),
    "rows": ({"x": torch.ones(4, 8)}, contextlib.nullcontext),
    "no bias": ({"bias": None}, contextlib.nullcontext),
    "rank": ({"lora_a": torch.ones(1, 8), "lora_b": torch.ones(6, 1)}, contextlib.nullcontext),
    "dtype": (_tensors(dtype=torch.bfloat16), contextlib.nullcontext),
    "scale in a tensor": ({"scale": torch.tensor(0.5)}, contextlib.nullcontext),
    "whole scale": ({"scale": 1}, contextlib.nullcontext),
    "p": ({"dropout_p": 0.25, "seed": 0}, contextlib.nullcontext),
    "another p": ({"dropout_p": 0.5, "seed": 0}, contextlib.nullcontext),
    "backend": ({"backend": "torch"}, contextlib.nullcontext),
    "block": ({}, lambda: pk.use_backend("torch")),
    "no gradients": ({}, torch.no_grad),
    "autocast": ({}, lambda: torch.autocast("cpu", torch.bfloat16)),
    "generation": ({}, _another_generation),
    "device": ({name: x.to("meta") for name, x in _tensors().items()}, contextlib.nullcontext),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_what_is_read_is_in_the_key(name: str, made: list[Any]) -> None:
    """The changed call is checked once, and gives what it gives without plans."""
    given = {**_tensors(), "scale": 0.5}
    changes, context = NEIGHBOURS[name]
    pk.lora_linear(**given)
    for count in (2, 2 if name != "generation" else 3):
        with context():
            got = pk.lora_linear(**given | changes)
        assert len(made) == count
    with context():
        OPERATOR.plans = plans.Cache()
        expected = pk.lora_linear(**given | changes)
    assert got.dtype == expected.dtype and got.device == expected.device
    assert got.is_meta or torch.equal(got, expected)


@over("changes, message", lambda operator: operator.wrong)
def test_a_wrong_call_raises_each_time(operator: Operator, changes: dict[str, Any], message: str) -> None:
    """Also between right ones of nearly its key, in both modes of recording."""
    given = operator.arguments(operator.wrong_case, operator.make(operator.wrong_case, CPU))
    for records in (True, False, True):
        with torch.set_grad_enabled(records):
            operator.function(**given)
            for _ in range(2):
                with pytest.raises(ValueError, match=f"^{operator.name}: {message}"):
                    operator.function(**given | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(3, 8).to_sparse()}, "x must be a dense tensor"),
        ({"lora_a": torch.ones(2, 8).to_sparse()}, "lora_a must be a dense tensor"),
        ({"weight": torch.ones(6, 8).to_mkldnn()}, "weight must be a dense tensor"),
        ({"lora_b": torch.ones(6, 2, device="meta")}, "lora_b must be on the device of x"),
        ({"bias": torch.ones(6, device="meta")}, "bias must be on the device of x"),
        ({"dropout_p": 0.5, "seed": torch.tensor(1.0)}, "seed must be a 0-d int64 tensor"),
        ({"dropout_p": 0.5, "seed": torch.tensor(1, device="meta")}, "seed must be on the device of x"),
        ({"scale": torch.tensor(1)}, "scale must be a float or a 0-d floating tensor"),
        ({"scale": None}, "scale must be a float"),
        ({"x": None}, "x must be a torch.Tensor"),
        ({"weight": (torch.ones(6, 8),)}, "weight must be a torch.Tensor"),
    ],
)
def test_neighbours_of_a_plan_are_refused(changes: dict[str, Any], message: str) -> None:
    given = {**_tensors(), "scale": 0.5, "dropout_p": 0.0}
    pk.lora_linear(**given)
    pk.lora_linear(**given | {"dropout_p": 0.5, "seed": torch.tensor(1)})
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            pk.lora_linear(**given | changes)
    nested = torch.nested.nested_tensor([torch.ones(3, 8)])
    with pytest.raises(pk.UnsupportedError, match="got a nested one"):
        pk.lora_linear(**given | {"x": nested})


@over("", lambda operator: [()])
def test_calls_of_one_key_are_one_problem(operator: Operator) -> None:
    """A problem holds what backends decide on: it must follow from the key."""
    op, seen = operator.op.OPERATOR, {}
    recorded: list[tuple[Any, Any]] = []
    make_problem = op.make_problem
    op.make_problem = lambda call: (recorded.append((call, problem := make_problem(call))), problem)[1]
    op.plans, kept = plans.Cache(), op.plans
    try:
        for case, seed in itertools.product((*operator.kinds, operator.typical, operator.wrong_case), (0, 1)):
            for variant in (None, "torch"):
                operator.call(case, operator.make(case, CPU, seed), variant)
        assert len(recorded) == len(op.plans)
        for call, problem in recorded:
            assert seen.setdefault(op.key(call, "auto"), problem) == make_problem(call) == problem
    finally:
        op.make_problem, op.plans = make_problem, kept
    assert len(seen) > 2


class _Sub(Tensor):
    pass


def _call() -> Inputs:
    given = _tensors()
    return Inputs(**given, scale=0.5, dropout_p=0.0, seed=None)


UNPLAIN: dict[str, Callable[[Callable[[Inputs], Any]], Any]] = {
    "vmap": lambda see: torch.func.vmap(lambda x: (see(_call()), x)[1], randomness="same")(torch.ones(2, 3, 8)),
    "dual level": lambda see: _within(torch.autograd.forward_ad.dual_level(), see),
    "dispatch mode": lambda see: _within(FlopCounterMode(display=False), see),
    "torch function mode": lambda see: _within(torch.device("cpu"), see),
    "subclass": lambda see: see(_call()._replace(x=torch.ones(3, 8).as_subclass(_Sub))),
    "fake tensor": lambda see: see(_call()._replace(x=FakeTensorMode().from_tensor(torch.ones(3, 8)))),
    "jit.trace": lambda see: torch.jit.trace(lambda x: (see(_call()), x)[1], torch.ones(1), check_trace=False),
    "list": lambda see: see(_call()._replace(x=[1.0])),
    "nested": lambda see: see(_call()._replace(x=torch.nested.nested_tensor([torch.ones(3, 8)]))),
}


def _within(context: Any, see: Callable[[Inputs], Any]) -> None:
    with context:
        see(_call())


@pytest.mark.parametrize("name", UNPLAIN)
def test_what_is_not_plain_has_no_key(name: str) -> None:
    keys: list[Any] = []
    assert OPERATOR.key(_call(), "auto") is not None
    UNPLAIN[name](lambda call: keys.append(OPERATOR.key(call, "auto")))
    assert keys and not any(keys)


def test_addresses_are_told_apart() -> None:
    """As a key on CUDA has them, where they say whether rows can be read 16 bytes at a time."""
    x, apart = torch.ones(8, 8), torch.ones(8, 24)
    shifted = torch.ones(72)[1:65].view(8, 8)
    seen: dict[Any, bool] = {}
    for each in (
        x,
        torch.zeros(8, 8),
        x.t(),
        shifted,
        apart[:, :8],
        apart[:, 1:9],
        apart[:, 4:12],
        torch.ones(8, 9)[:, :8],
    ):
        fits = cuda_tools.rows_aligned(each)
        assert seen.setdefault(plans._address(each), fits) == fits
    assert len(seen) == 6 and len(set(seen.values())) == 2
    assert plans._address(x.to_sparse()) is plans._address(None) is None
    assert set(OPERATOR.key._addressed) == {"x", "weight", "lora_a"}


def test_plans_are_few_and_hold_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20,000 shapes the last are known; neither they nor the rest keep a tensor, or anything."""
    cache = plans.Cache(size=64)
    monkeypatch.setattr(OPERATOR, "plans", cache)
    given = _tensors()
    with torch.no_grad():
        for m in range(200):
            pk.lora_linear(**given | {"x": torch.empty(0, m, 8)})
        gc.collect()
        before = len(gc.get_objects())
        for m in range(20_000):
            pk.lora_linear(**given | {"x": torch.empty(0, m, 8)})
        gc.collect()
        after = len(gc.get_objects())
    assert 64 <= len(cache) <= 128
    assert after - before < 1000
    x = torch.ones(3, 8)
    reference = weakref.ref(x)
    pk.lora_linear(**given | {"x": x})
    del x
    gc.collect()
    assert reference() is None


def test_what_was_asked_for_lately_is_known() -> None:
    cache = plans.Cache(size=4)
    plan: Any = plans.Plan(None, "auto", None, None, False, False, 0)  # type: ignore[arg-type]
    for number in range(20):
        cache.put((number,), plan._replace(generation=number))
        assert cache.get((0,)) is not None
        for each in range(max(0, number - 2), number + 1):
            found = cache.get((each,))
            assert found is not None and found.generation == each
    assert cache.get((1,)) is None
    assert 4 <= len(cache) <= 8


def test_threads_share_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OPERATOR, "plans", plans.Cache(size=8))
    given, wrong = [_tensors(m) for m in range(1, 40)], []
    expected = [pk.lora_linear(**each) for each in given]
    start = threading.Barrier(4)

    def run(step: int) -> None:
        start.wait(10)
        for i in range(400):
            place = i * step % len(given)
            if not torch.equal(pk.lora_linear(**given[place]), expected[place]):
                wrong.append(place)

    threads = [threading.Thread(target=run, args=(step,)) for step in (1, 3, 5, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and len(OPERATOR.plans) <= 16


def test_the_backend_in_force_is_asked_for_in_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    given = _tensors()
    for _ in range(2):
        assert "lora_linear: torch\n  cuda:" in pk.explain(pk.lora_linear, **given)
        with pk.use_backend("torch"):
            assert "'torch' is forced" in pk.explain(pk.lora_linear, **given)
        with pk.use_backend("cuda"), pytest.raises(pk.UnsupportedError, match="cannot run this problem"):
            pk.lora_linear(**given)
        monkeypatch.setenv("PEFT_KERNELS_BACKEND", "cuda")
        with pytest.raises(pk.UnsupportedError, match="cannot run this problem"):
            pk.lora_linear(**given)
        monkeypatch.setenv("PEFT_KERNELS_BACKEND", "trition")
        with pytest.raises(ValueError, match="PEFT_KERNELS_BACKEND must be one of"):
            pk.lora_linear(**given)
        monkeypatch.delenv("PEFT_KERNELS_BACKEND")


def test_a_choice_is_made_again_after_it_may_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    given, asked = _tensors(), []
    select = OPERATOR.select
    monkeypatch.setattr(OPERATOR, "select", lambda *args: (asked.append(1), select(*args))[1])
    for _ in range(3):
        dispatch.choices_changed()
        for _ in range(2):
            pk.lora_linear(**given)
    assert len(asked) == 3


def test_nothing_is_remembered_of_a_capture(monkeypatch: pytest.MonkeyPatch, made: list[Any]) -> None:
    """While a CUDA graph is captured a choice may be another one than before and after."""
    monkeypatch.setattr("peft_kernels._core.operator.is_capturing", lambda device: True)
    pk.lora_linear(**_tensors())
    assert len(OPERATOR.plans) == 0
    monkeypatch.undo()


def test_a_plan_is_explained_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatch.choices_changed()
    given = _tensors()
    with caplog.at_level("DEBUG", logger="peft_kernels"):
        for _ in range(3):
            text = pk.explain(pk.lora_linear, **given)
    assert "\n  plan: torch's own operators" in text
    lines = [record.getMessage() for record in caplog.records if "new plan" in record.getMessage()]
    assert len(lines) == 1 and lines[0].startswith("lora_linear: new plan: torch's own operators")
    assert "one function of autograd" in pk.explain(pk.lora_linear, **given, backend="torch")
    with torch.no_grad():
        assert "without a graph" in pk.explain(pk.lora_linear, **given, backend="torch")


def test_large_calls_and_forced_ones_run_the_implementation() -> None:
    large = _tensors(20_000)
    assert "one function of autograd" in pk.explain(pk.lora_linear, **large)
    assert "native" not in pk.explain(pk.lora_linear, **_tensors(), backend="torch")
    half = _tensors(dtype=torch.bfloat16)
    assert "torch's own operators" in pk.explain(pk.lora_linear, **half)
    # Its operators would be cast one by one; what is in autocast's dtype already has no other key but by autocast.
    with torch.autocast("cpu", torch.bfloat16):
        assert "one function of autograd" in pk.explain(pk.lora_linear, **half)


def test_recent_plans_are_for_the_tensors_that_they_were_made_for() -> None:
    recent, given = plans.Recent(size=2), tuple(_tensors().values())
    with torch.no_grad():
        pk.lora_linear(*given[:4], 0.5, given[4])
        plan = OPERATOR.known(Inputs(*given[:4], 0.5, given[4], 0.0, None), None)
        assert plan is not None
        recent.put(1, given, plan)
        assert recent.get(1, given) is plan and recent.get(2, given) is None
        x, *others = given
        for changed in (x[:1], x.double(), x.to("meta"), x.to_sparse(), nn.Parameter(x), x.as_subclass(_Sub)):
            assert recent.get(1, (changed, *others)) is None
        assert recent.get(1, (torch.nested.nested_tensor([x]), *others)) is None
        assert recent.get(1, given[:4]) is None
        for context in (torch.enable_grad(), torch.device("cpu"), torch.autocast("cpu"), pk.use_backend("torch")):
            with context:
                assert recent.get(1, given) is None
        assert recent.get(1, given) is plan
        dispatch.choices_changed()
        assert recent.get(1, given) is None
    for caller in range(10):
        recent.put(caller, given, plan)
    assert len(recent._plans) <= 2
