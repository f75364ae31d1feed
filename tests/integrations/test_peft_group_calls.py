"""One parent's calls: a layer takes what was made for it only where it would compute the same, and nothing is left."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.integrations.peft import grouped, siblings
from tests.integrations.siblings import (
    Attention,
    Counts,
    assert_close,
    counts,
    first_of,
    given,
    inner,
    outcome,
    pair,
    siblings_of,
)

__all__ = ["counts"]

Between = Callable[[Any, Tensor, str], Tensor]


def _assert_outcome(fused: Any, expected: dict[str, Tensor]) -> None:
    assert_close(outcome(fused, fused), expected)


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
    assert found == dict(Counts(lead=1, hit=1, alone=1) + Counts([kind]))


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
        found = counts.of(partial(_assert_outcome, fused, expected))
        # A hooked base layer makes its output by itself, and the call does not go on to a product here.
        assert found == {"lead": 1, "hit": 1, "alone": 1, "peft": 1}
    assert not report.dissolved


@pytest.mark.parametrize("adapter", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("casts", [True, False])
def test_dtypes(base: torch.dtype, adapter: torch.dtype, casts: bool, counts: Counts) -> None:
    """Groups are of what is fused alone; what PEFT's own code refuses, it still does."""
    fused, _, _ = first_of()
    for layer in fused.children():
        layer.base_layer.to(base)
        layer.lora_A.to(adapter)
        layer.lora_B.to(adapter)
        layer.cast_input_dtype_enabled = casts
    is_fused = adapter == base or (adapter == torch.float32 and casts)

    def call() -> None:
        with contextlib.nullcontext() if is_fused or casts else pytest.raises(RuntimeError, match="dtype"):
            fused(given().to(base))

    found = counts.of(call)
    assert found == ({"lead": 1, "hit": 2, "alone": 1} if is_fused else {"peft": 4 if casts else 1})


def test_another_adapter_for_all_between_calls(counts: Counts) -> None:
    fused, plain, report = first_of(adapters=2)
    for names in (["default"], ["other1"], ["default", "other1"], ["other1"]):
        for attention in (fused, plain):
            for layer in attention.children():
                layer.set_adapter(names)
        expected = outcome(plain, plain)
        assert counts.of(partial(_assert_outcome, fused, expected))["hit"] == 2
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
            assert counts.of(partial(_assert_outcome, fused, expected)) == made
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

    def test_first_call_with_two_inputs(self) -> None:
        """A layer is in one group: that of the first input that it was handed."""
        fused, _, report = pair()
        attention = inner(fused).first

        def forward(x: Tensor) -> Tensor:
            y: Tensor = attention.q(x) + attention.k(x)
            return attention.q(y) + attention.k(y) + attention.v(y)

        attention.forward = forward
        attention(given())
        assert [[name.rpartition(".")[2] for name in group] for group in report.groups] == [["q", "k"]]

    def test_a_member_called_twice(self, counts: Counts) -> None:
        fused, plain, report = first_of()

        def forward(attention: Any) -> Callable[[Tensor], Tensor]:
            return lambda x: attention.q(x) + attention.q(x) * attention.k(x) - attention.k(x) + attention.v(x)

        for attention in (fused, plain):
            attention.forward = forward(attention)
        expected = outcome(plain, plain)
        assert counts.of(lambda: assert_close(outcome(fused, fused), expected)) == {"lead": 1, "hit": 2, "alone": 2}
        assert not report.dissolved


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


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_region_of_each_member(use_reentrant: bool, counts: Counts) -> None:
    """A region that is recomputed without its parent finds no group there, and had none before."""
    fused, plain, _ = first_of()

    def forward(attention: Any, x: Tensor) -> Tensor:
        q, k, v = (checkpoint(layer, x, use_reentrant=use_reentrant) for layer in list(attention.children())[:3])
        return q * k + v

    for attention in (fused, plain):
        attention.forward = partial(forward, attention)
    expected = outcome(plain, plain)
    assert counts.of(lambda: assert_close(outcome(fused, fused), expected)).keys() == {"alone"}


def test_siblings_of_an_attention() -> None:
    fused, _, _ = pair()
    assert [tuple(each.lanes) for each in siblings_of(fused)] == [("q", "k", "v", "o")] * 2
    assert isinstance(inner(fused).first, Attention) and siblings.MISSES == 2
