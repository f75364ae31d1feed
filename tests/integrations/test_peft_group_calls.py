"""One parent's calls: a layer takes what was made for it only where it would compute the same, and nothing is left."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.integrations import faster
from peft_kernels.integrations.peft import eligibility, grouped, groups, layers, siblings
from peft_kernels.integrations.peft.layers import PeftLinear
from tests.clock import Clock
from tests.integrations.siblings import (
    Attention,
    Counts,
    assert_close,
    build,
    counts,
    given,
    inner,
    outcome,
    pair,
    siblings_of,
)

__all__ = ["counts"]

Between = Callable[[Any, Tensor, str], Tensor]


def first_of(**options: Any) -> tuple[Any, Any, pk.Report]:
    """A fused attention that was observed, PEFT's, and the report."""
    fused, plain, report = pair(**options)
    fused(given())
    return inner(fused).first, inner(plain).first, report


def at(name: str, change: Callable[[Any, Tensor], Tensor | None]) -> Between:
    """Do something before a layer is called; it may hand the layer another x."""

    def between(attention: Any, x: Tensor, called: str) -> Tensor:
        changed = change(attention, x) if called == name else None
        return x if changed is None else changed

    return between


def _merge(attention: Any, x: Tensor) -> None:
    attention.k.merge()


def _data(attention: Any, x: Tensor) -> None:
    parameter = attention.k.lora_B["default"].weight
    parameter.data = 2 * parameter.data


def _frozen(attention: Any, x: Tensor) -> None:
    attention.k.lora_A["default"].weight.requires_grad_(False)


def _hooked(attention: Any, x: Tensor) -> None:
    attention.k.lora_A["default"].register_forward_hook(lambda *_: None)


def _replaced(attention: Any, x: Tensor) -> None:
    weight = attention.k.lora_A["default"].weight
    attention.k.lora_A["default"].weight = nn.Parameter(weight.detach().clone())


def _bias(attention: Any, x: Tensor) -> None:
    attention.k.base_layer.bias = nn.Parameter(torch.ones(8, dtype=torch.float64), requires_grad=False)


# What happens before k is called, and what k's call then is; v takes its own all the same.
CHANGES: dict[str, tuple[Callable[[Any, Tensor], Tensor | None], str]] = {
    "another x": (lambda attention, x: x.flip(0), "alone"),
    "an equal x": (lambda attention, x: x.clone(), "alone"),
    "scaling": (lambda attention, x: attention.k.scaling.__setitem__("default", 3.5), "alone"),
    "merged": (_merge, "peft"),
    "disabled": (lambda attention, x: attention.k.enable_adapters(False), "peft"),
    "another adapter": (lambda attention, x: attention.k.set_adapter(["other1"]), "alone"),
    "both adapters": (lambda attention, x: attention.k.set_adapter(["default", "other1"]), "alone"),
    "adapters in another order": (lambda attention, x: attention.k.set_adapter(["other1", "default"]), "alone"),
    "memory of a factor": (_data, "alone"),
    "factor replaced": (_replaced, "alone"),
    "a bias": (_bias, "alone"),
    "frozen": (_frozen, "alone"),
    "hook inside": (_hooked, "peft"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_between_members(name: str, counts: Counts) -> None:
    change, kind = CHANGES[name]
    fused, plain, _ = first_of(adapters=2)
    for attention in (fused, plain):
        for layer in attention.children():
            layer.set_adapter(["default"])
    if name == "merged":
        # A merged weight is another sum, and in place of PEFT's.
        for attention in (fused, plain):
            attention.eval()
    expected = outcome(lambda x: plain(x, lambda x, called: at("k", change)(plain, x, called)), plain)
    got: dict[str, Tensor] = {}

    def call() -> None:
        got.update(outcome(lambda x: fused(x, lambda x, called: at("k", change)(fused, x, called)), fused))

    found = counts.of(call)
    assert_close(got, expected)
    assert found == {key: value for key, value in (Counts(lead=1, hit=1, alone=1) + Counts([kind])).items()}


@pytest.mark.parametrize("what", ["x", "weight"])
def test_written_in_place(what: str, counts: Counts) -> None:
    """Between q and k; x is then another one for v too. With gradients torch refuses what was saved and written."""

    def between(attention: Any) -> Callable[[Tensor, str], Tensor]:
        def write(x: Tensor, name: str) -> Tensor:
            if name == "k":
                (x if what == "x" else attention.k.base_layer.weight).mul_(2)
            return x

        return write

    fused, plain, _ = first_of()
    with torch.no_grad():
        expected, got = plain(given(), between(plain)), []
        found = counts.of(lambda: got.append(fused(given(), between(fused))))
    assert found == ({"lead": 1, "alone": 3} if what == "x" else {"lead": 1, "hit": 1, "alone": 2})
    assert float((got[0] - expected).norm() / expected.norm()) <= 1e-12


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "backend": lambda: pk.use_backend("torch"),
}


@pytest.mark.parametrize("inside", MODES)
def test_a_mode_around_one_member(inside: str, counts: Counts) -> None:
    fused, plain, _ = first_of()
    x = given()

    def call(attention: Any) -> list[Tensor]:
        made = []

        def forward(x: Tensor) -> Tensor:
            q = attention.q(x)
            with MODES[inside]():
                k = attention.k(x)
            made.extend([q, k, attention.v(x)])
            return q

        attention.forward = forward
        attention(x)
        del attention.forward
        return made

    expected, got = call(plain), []
    found = counts.of(lambda: got.extend(call(fused)))
    assert found == {"lead": 1, "hit": 1, "alone": 1}
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.requires_grad == theirs.requires_grad and ours.is_inference() == theirs.is_inference()
        assert float((ours - theirs).norm() / theirs.norm()) <= 1e-12


@pytest.mark.parametrize("around", MODES)
def test_a_mode_around_all(around: str, counts: Counts) -> None:
    """In inference mode tensors have no versions, so that a write could not be seen: there is no group there."""
    fused, plain, report = first_of()
    with MODES[around]():
        x = given()
        expected, got = plain(x), []
        found = counts.of(lambda: got.append(fused(x)))
    assert float((got[0] - expected).norm() / expected.norm()) <= 1e-12
    one = {"lead": 1, "hit": 2, "alone": 1}
    assert found == ({"alone": 4} if around == "inference" else one)
    assert not report.dissolved


def test_inference_mode_on_a_tensor_that_has_a_version(counts: Counts) -> None:
    fused, plain, _ = first_of()
    x = given()
    with torch.inference_mode():
        got: list[Tensor] = []
        assert counts.of(lambda: got.append(fused(x)))["hit"] == 2
        torch.testing.assert_close(got[0], plain(x))


@pytest.mark.parametrize("state", ["merged", "disabled", "no adapter", "hooked", "other forward"])
@pytest.mark.parametrize("name", ["q", "k"])
def test_a_member_that_is_not_fused(name: str, state: str, counts: Counts) -> None:
    """It is left out of its group, whose other members stay one."""

    def change(attention: Any) -> None:
        layer = getattr(attention, name)
        if state == "merged":
            layer.merge()
        elif state == "disabled":
            layer.enable_adapters(False)
        elif state == "no adapter":
            layer.set_adapter([])
        elif state == "hooked":
            layer.base_layer.register_forward_hook(lambda module, args, y: 2 * y)
        else:
            layer.lora_A["default"].forward = lambda x: 2 * nn.Linear.forward(layer.lora_A["default"], x)

    fused, plain, report = first_of()
    for attention in (fused, plain):
        change(attention)
    expected = outcome(plain, plain)
    for _ in range(3):
        found = counts.of(lambda: assert_close(outcome(fused, fused), expected))
        assert found == {"lead": 1, "hit": 1, "alone": 1, "peft": 1}
    assert not report.dissolved


def test_another_adapter_for_all_between_calls(counts: Counts) -> None:
    fused, plain, report = first_of(adapters=2)
    for names in (["default"], ["other1"], ["default", "other1"], ["other1"]):
        for attention in (fused, plain):
            for layer in attention.children():
                layer.set_adapter(names)
        expected = outcome(plain, plain)
        assert counts.of(lambda: assert_close(outcome(fused, fused), expected))["hit"] == 2
    assert not report.dissolved


def test_hooks_on_layers_run(counts: Counts) -> None:
    fused, plain, report = first_of()
    for attention in (fused, plain):
        attention.k.register_forward_hook(lambda module, args, y: 2 * y)
        attention.v.register_forward_pre_hook(lambda module, args: (args[0].flip(0),))
    expected = outcome(plain, plain)
    assert counts.of(lambda: assert_close(outcome(fused, fused), expected))["hit"] == 1
    assert_close(outcome(fused, fused), expected)
    assert len(report.dissolved) == 1
    assert_close(outcome(fused, fused), expected)


def test_backward_hooks_on_layers_run() -> None:
    """They hand each layer an x of its own, which was no group when it was observed and is none after it."""
    fused, plain, report = first_of()
    for attention in (fused, plain):
        for layer in attention.children():
            layer.register_full_backward_hook(lambda module, given, taken: tuple(2 * each for each in given))
    expected = outcome(plain, plain)
    for _ in range(3):
        assert_close(outcome(fused, fused), expected)
    assert len(report.dissolved) == 1


def test_an_output_changed_in_place(counts: Counts) -> None:
    """Outputs of one operation are no views of each other, and its backward pass reads none of them."""
    fused, plain, _ = first_of()
    for attention in (fused, plain):
        attention.q.register_forward_hook(lambda module, args, y: y.mul_(2))
    expected = outcome(plain, plain)
    assert counts.of(lambda: assert_close(outcome(fused, fused), expected))["hit"] == 2


class TestOneMemberAlone:
    def test_outside_of_the_parent(self, counts: Counts) -> None:
        fused, plain, _ = first_of()
        expected = outcome(plain.q, plain)
        got: dict[str, Tensor] = {}
        assert counts.of(lambda: got.update(outcome(fused.q, fused))) == {"alone": 1}
        assert_close(got, expected)  # the others have no gradient

    def test_inside(self, counts: Counts) -> None:
        """As where layers share keys and values: what was made for k and v is dropped, twice, and never again."""
        fused, plain, report = first_of()
        for attention in (fused, plain):
            attention.forward = attention.q.__call__
        expected = outcome(plain, plain)
        for made in ({"lead": 1}, {"lead": 1}, {"alone": 1}):
            assert counts.of(lambda: assert_close(outcome(fused, fused), expected)) == made
        assert len(report.dissolved) == 1

    def test_first_call_without_the_others(self, counts: Counts) -> None:
        """A layer that was handed x alone is in no group; those that come later may be one."""
        fused, plain, report = pair()
        fused, plain = inner(fused).first, inner(plain).first
        fused.forward = fused.q.__call__
        fused(given())
        del fused.forward
        fused(given())
        assert [name.rpartition(".")[2] for name in report.groups[0]] == ["k", "v"]
        expected = outcome(plain, plain)
        assert counts.of(lambda: assert_close(outcome(fused, fused), expected)) == {"lead": 1, "hit": 1, "alone": 2}

    def test_a_member_called_twice(self, counts: Counts) -> None:
        fused, plain, report = first_of()

        def forward(attention: Any) -> Callable[[Tensor], Tensor]:
            return lambda x: attention.q(x) + attention.q(x) * attention.k(x) - attention.k(x) + attention.v(x)

        for attention in (fused, plain):
            attention.forward = forward(attention)
        expected = outcome(plain, plain)
        assert counts.of(lambda: assert_close(outcome(fused, fused), expected)) == {"lead": 1, "hit": 2, "alone": 2}
        assert not report.dissolved


class TestNothingIsLeft:
    @staticmethod
    def _graph_of(fused: Any, forward: Callable[[Tensor], Tensor], errors: Any) -> Any:
        """A weak reference to an input of the fused layers, whose call ends in one of the errors or in none."""
        fused.forward = forward
        x = (given().requires_grad_() * 2).detach().requires_grad_()
        with contextlib.suppress(*errors):
            fused(x)
        reference = weakref.ref(x)
        del x, fused.forward
        return reference

    def test_after_an_error(self) -> None:
        """Else a whole graph would wait for the parent's next call."""
        fused, _, report = first_of()

        def forward(x: Tensor) -> Tensor:
            fused.q(x)
            raise ValueError("between q and k")

        for _ in range(3):
            assert self._graph_of(fused, forward, (ValueError,))() is None
        assert not report.dissolved  # an error says nothing of the group

    def test_after_a_member_that_was_not_called(self) -> None:
        fused, _, _ = first_of()
        assert self._graph_of(fused, lambda x: fused.q(x).detach(), ())() is None

    def test_after_an_interrupt_it_goes_with_the_next_call(self, counts: Counts) -> None:
        """torch runs no hooks then."""
        fused, plain, _ = first_of()

        def forward(x: Tensor) -> Tensor:
            fused.q(x)
            raise KeyboardInterrupt

        reference = self._graph_of(fused, forward, (KeyboardInterrupt,))
        expected = outcome(plain, plain)
        assert counts.of(lambda: assert_close(outcome(fused, fused), expected))["hit"] == 2
        gc.collect()
        assert reference() is None

    def test_a_model_goes(self) -> None:
        fused = pair()[0]
        fused(given())
        reference = weakref.ref(inner(fused).first.q)
        del fused
        gc.collect()
        assert reference() is None


def test_threads(counts: Counts) -> None:
    """Two threads meet between q and k; each has its own outputs."""
    fused, plain, report = first_of()
    inputs = [given(seed=seed) for seed in (1, 2)]
    expected = [plain(x).detach() for x in inputs]
    barrier, got = threading.Barrier(2, timeout=60), {}

    def between(x: Tensor, name: str) -> Tensor:
        barrier.wait()
        return x

    def work(index: int) -> None:
        for _ in range(5):
            got[index] = fused(inputs[index], between).detach()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        torch.testing.assert_close(got[index], expected[index])
    assert counts["hit"] == 20 and not report.dissolved


def test_a_parent_inside_itself(counts: Counts) -> None:
    fused, plain, _ = first_of()
    x = given()
    deep = [True]

    def between(attention: Any) -> Callable[[Tensor, str], Tensor]:
        def called(x: Tensor, name: str) -> Tensor:
            if name == "k" and deep:
                deep.clear()
                attention(x)
            return x

        return called

    expected = plain(x, between(plain))
    deep.append(True)
    torch.testing.assert_close(fused(x, between(fused)), expected)


def test_a_global_hook_runs_peft(counts: Counts) -> None:
    fused, plain, _ = first_of()
    handle = register_module_forward_hook(lambda module, args, y: 2 * y if isinstance(module, nn.Linear) else y)
    try:
        expected = plain(given())
        got: list[Tensor] = []
        assert counts.of(lambda: got.append(fused(given()))) == {"peft": 4}
        torch.testing.assert_close(got[0], expected)
    finally:
        handle.remove()


def test_an_operation_that_refuses_the_group(monkeypatch: pytest.MonkeyPatch, counts: Counts) -> None:
    """A backend that has no group runs each layer by itself."""
    run = grouped.group_call

    def refusing(x: Tensor, weights: tuple[Tensor, ...], *rest: Any) -> Any:
        if len(weights) > 1:
            raise pk.UnsupportedError("no group")
        return run(x, weights, *rest)

    monkeypatch.setattr(grouped, "group_call", refusing)
    fused, plain, _ = first_of()
    expected = outcome(plain, plain)
    assert counts.of(lambda: assert_close(outcome(fused, fused), expected)) == {"alone": 4}


def test_an_input_of_another_width_is_the_layer_s_own_error() -> None:
    fused, plain, _ = first_of()
    for attention in (plain, fused):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            attention(given()[:, :5])


class TestClock:
    """"auto": a group runs where the clock finds it faster than the calls of its members, whatever these run."""

    @staticmethod
    def _applied(monkeypatch: pytest.MonkeyPatch, **costs: float) -> tuple[Any, Any, Clock]:
        monkeypatch.setattr(groups, "_is_worth_it", lambda layers: True)
        fused = build()
        plain = copy.deepcopy(fused)
        pk.apply(fused)
        fused(given())
        clock = Clock(**costs)
        clock.install(monkeypatch)
        monkeypatch.setattr(faster, "_decided", faster.Cache())
        call = grouped.group_call
        monkeypatch.setattr(grouped, "group_call", clock.takes("group", call))
        monkeypatch.setattr(layers, "_fused", clock.takes("ours", layers._fused))
        monkeypatch.setattr(PeftLinear, "forward", clock.takes("theirs", PeftLinear.forward))
        monkeypatch.setattr(eligibility.OWN, "replaced", lambda: None)
        return inner(fused).first, inner(plain).first, clock

    @pytest.mark.parametrize(
        ("costs", "expected"),
        [
            ({"group": 250.0, "ours": 100.0, "theirs": 120.0}, ["group", "ours"]),
            ({"group": 350.0, "ours": 100.0, "theirs": 120.0}, ["ours"] * 4),
            ({"group": 250.0, "ours": 120.0, "theirs": 80.0}, ["theirs"] * 4),
            ({"group": 200.0, "ours": 120.0, "theirs": 80.0}, ["group", "theirs"]),
        ],
        ids=str,
    )
    def test_what_is_faster_runs(
        self, costs: dict[str, float], expected: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fused, plain, clock = self._applied(monkeypatch, **costs)
        x = given()
        fused(x)
        assert clock.ran(lambda: fused(x)) == expected
        torch.testing.assert_close(fused(x), plain(x))

    def test_forced_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fused, _, clock = self._applied(monkeypatch, group=1000.0, ours=1.0, theirs=1.0)
        place = grouped.place_of(fused.q)[0]
        place.is_forced = True
        assert clock.ran(lambda: fused(given()))[0] == "group"

    def test_masks_that_peft_draws_stay_peft_s(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A layer that the clock leaves to PEFT draws other masks alone: it is in no group while it draws any."""
        fused, _, clock = self._applied(monkeypatch, group=1.0, ours=120.0, theirs=80.0)
        for layer in fused.children():
            layer.lora_dropout["default"] = nn.Dropout(0.5)
        fused(given())
        assert clock.ran(lambda: fused(given())) == ["theirs"] * 4


def test_named_children_may_be_called_by_a_checkpoint_each(counts: Counts) -> None:
    """A region that is recomputed without its parent finds no group there, and had none before."""
    fused, plain, _ = first_of()
    for use_reentrant in (True, False):
        for attention in (fused, plain):

            def forward(x: Tensor, attention: Any = attention) -> Tensor:
                q, k, v = (
                    checkpoint(layer, x, use_reentrant=use_reentrant) for layer in (attention.q, attention.k, attention.v)
                )
                return q * k + v

            attention.forward = forward
        expected = outcome(plain, plain)
        found = counts.of(lambda: assert_close(outcome(fused, fused), expected))
        assert found.keys() == {"alone"}
        for attention in (fused, plain):
            del attention.forward


def test_siblings_of_an_attention() -> None:
    fused, _, _ = pair()
    assert [tuple(each.lanes) for each in siblings_of(fused)] == [("q", "k", "v", "o")] * 2
    assert isinstance(inner(fused).first, Attention) and siblings.MISSES == 2
