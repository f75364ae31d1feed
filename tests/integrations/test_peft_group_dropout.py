"""Masks of groups: of one seed for an input, in the lanes of the layers' places, and the same however a call runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.integrations.peft.siblings import Siblings
from peft_kernels.lora.kernels import dropout
from tests.integrations.siblings import (
    WIDTH,
    Attention,
    Counts,
    Model,
    assert_close,
    build,
    counts,
    given,
    inner,
    outcome,
    pair,
    siblings_of,
)
from tests.integrations.test_peft_groups import assert_like_peft, build_architecture, run

__all__ = ["counts"]

P = 0.4


class Masked(nn.Module):
    """Dropout with a mask that is given."""

    def __init__(self, mask: Tensor, p: float) -> None:
        super().__init__()
        self.mask, self.scale = mask, 65536 / (65536 - round(p * 65536))

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.mask, x * self.scale, 0.0)


@pytest.fixture
def seeds(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every seed that is drawn."""
    drawn, draw = [], dropout.draw_seed
    monkeypatch.setattr(dropout, "draw_seed", lambda device: (drawn.append(draw(device)), drawn[-1])[1])
    return drawn


def with_masks(layer: Any, lanes: dict[str, int], seed: Tensor, rows: int = 5) -> None:
    """Give PEFT's layer the masks that ours had: a lane for each adapter."""
    for name, lane in lanes.items():
        p = layer.lora_dropout[name].p
        mask = pk.lora_linear_dropout_mask(seed, rows, WIDTH, p, lane=lane)
        layer.lora_dropout[name] = Masked(mask, p)


class TestSeveralAdapters:
    """Lanes of one layer, with groups or without."""

    @pytest.mark.parametrize("ps", [(P, P), (P, 0.1), (P, 0.0), (0.0, P), (P, 0.25, 0.5)], ids=str)
    @pytest.mark.parametrize("bias", [False, True])
    def test_by_themselves(self, ps: tuple[float, ...], bias: bool, seeds: list[Tensor], counts: Counts) -> None:
        model = build(Attention, adapters=len(ps), lora_dropout=P, lora_bias=bias)
        names = ["default", *(f"other{index}" for index in range(1, len(ps)))]
        for layer in inner(model).children():
            for name, p in zip(names, ps, strict=True):
                layer.lora_dropout[name] = nn.Dropout(p)
        plain = copy.deepcopy(inner(model))
        pk.apply(model)
        got: dict[str, Tensor] = {}
        assert counts.of(lambda: got.update(outcome(inner(model), inner(model)))) == {"alone": 4}
        assert len(seeds) == 4
        for layer, seed in zip(plain.children(), seeds, strict=True):
            with_masks(layer, {name: lane for lane, name in enumerate(names)}, seed)
        assert_close(got, outcome(plain, plain))

    def test_in_a_group(self, seeds: list[Tensor], counts: Counts) -> None:
        """The second adapter's lanes follow the first's of all layers."""
        model = build(Attention, adapters=2, lora_dropout=P)
        plain = copy.deepcopy(inner(model))
        pk.apply(model, groups=[("q", "k", "v")])
        got: dict[str, Tensor] = {}
        made = counts.of(lambda: got.update(outcome(inner(model), inner(model))))
        assert made == {"lead": 1, "hit": 2, "alone": 1} and len(seeds) == 2
        for lane, (name, layer) in enumerate(plain.named_children()):
            with_masks(layer, {"default": lane, "other1": lane + 4}, seeds[name == "o"])
        assert_close(got, outcome(plain, plain))

    def test_p_of_1_runs_peft(self, counts: Counts) -> None:
        model = build(Attention, adapters=2, lora_dropout=P)
        for layer in inner(model).children():
            layer.lora_dropout["other1"] = nn.Dropout(1.0)
        plain = copy.deepcopy(inner(model))
        pk.apply(model, group=True)
        torch.manual_seed(1)
        got = outcome(inner(model), inner(model))
        torch.manual_seed(1)
        assert_close(got, outcome(plain, plain))
        assert counts["peft"] == 4


@pytest.mark.parametrize("mode", ["observing", "grouped", "dissolved", "named"])
def test_masks_are_those_of_seed_and_place(mode: str, seeds: list[Tensor], counts: Counts) -> None:
    model = build(Attention, lora_dropout=P)
    plain = copy.deepcopy(inner(model))
    pk.apply(model, **({"groups": [("q", "k", "v")]} if mode == "named" else {"group": True}))
    as_it_is(model, mode)
    seeds.clear()
    got: dict[str, Tensor] = {}
    made = counts.of(lambda: got.update(outcome(inner(model), inner(model))))
    assert made == ({"lead": 1, "hit": 2, "alone": 1} if mode in ("grouped", "named") else {"alone": 4})
    assert len(seeds) == 2 and not torch.equal(*seeds)
    masks = []
    for lane, (name, layer) in enumerate(plain.named_children()):
        with_masks(layer, {"default": lane}, seeds[name == "o"])
        masks.append(layer.lora_dropout["default"].mask)
    assert_close(got, outcome(plain, plain))
    assert not any(torch.equal(one, other) for one in masks for other in masks if one is not other)


def as_it_is(model: nn.Module, mode: str) -> None:
    """Bring the siblings of a model that was just applied into a mode."""
    if mode == "observing":
        return
    for each in siblings_of(model):
        assert isinstance(each, Siblings)
    if mode == "grouped":
        with torch.no_grad():
            inner(model)(given())
    elif mode == "dissolved":
        for each in siblings_of(model):
            each.unseen = set()


@pytest.mark.parametrize("architecture", ["Llama", "DeepSeek-V3", "T5", "Qwen3.5"])
def test_a_mode_changes_neither_masks_nor_the_generator(architecture: str, counts: Counts) -> None:
    """DeepSeek calls q_b between q_a and kv_a, which are a group."""
    # PEFT refuses dropout for experts, which "all-linear" includes.
    mla = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    options = {"target_modules": mla} if architecture == "DeepSeek-V3" else {}
    model, call = build_architecture(architecture, lora_dropout=P, **options)
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            module.train()
    found, states, kinds = [], [], []
    for mode in ("observing", "grouped", "dissolved"):
        fused = copy.deepcopy(model)
        pk.apply(fused, group=True)
        if mode == "grouped":
            call(fused)
        elif mode == "dissolved":
            for each in siblings_of(fused):
                each.unseen = set()
        torch.manual_seed(3)
        kinds.append(counts.of(lambda: found.append(run(fused, call))))  # noqa: B023
        states.append(torch.get_rng_state())
    assert kinds[1]["hit"] and kinds[0].keys() == kinds[2].keys() == {"alone"}
    for got, state in zip(found[1:], states[1:], strict=True):
        assert_like_peft(got, found[0])
        assert torch.equal(state, states[0])
    torch.manual_seed(4)
    assert float((run(fused, call)["y"] - found[0]["y"]).norm()) > 1e-3  # else nothing was dropped


class TestRules:
    """What is called in another order, or twice, draws the same seeds in groups as without them."""

    @staticmethod
    def _both(forward: Callable[[Any, Tensor], Tensor], counts: Counts, change: Any = None) -> dict[str, int]:
        """Run a forward in a group and without; the results are equal, and so is the generator's state after them."""
        found = []
        for grouped in (True, False):
            model = build(Attention, lora_dropout=P)
            pk.apply(model, group=True)
            if grouped:
                with torch.no_grad():
                    model(given())
            else:
                siblings_of(model)[0].unseen = set()
            attention = inner(model)
            if change is not None:
                change(attention)
            attention.forward = lambda x, attention=attention: forward(attention, x)
            torch.manual_seed(2)
            made: dict[str, Tensor] = {}
            kinds = counts.of(lambda: made.update(outcome(attention, attention)))  # noqa: B023
            found.append((made, torch.get_rng_state(), kinds))
        (got, state, kinds), (expected, expected_state, _) = found
        assert_close(got, expected)
        assert torch.equal(state, expected_state)
        return kinds

    @pytest.mark.parametrize("mode", ["grouped", "dissolved"])
    def test_a_layer_that_is_called_twice_has_two_masks(self, mode: str, seeds: list[Tensor]) -> None:
        model = build(Attention, lora_dropout=P)
        pk.apply(model, group=True)
        as_it_is(model, mode)
        attention = inner(model)
        seeds.clear()
        attention.forward = lambda x: attention.q(x) - attention.q(x)
        assert float(attention(given()).norm()) > 1e-3 and len(seeds) == 2

    def test_a_member_twice(self, counts: Counts) -> None:
        kinds = self._both(lambda a, x: a.q(x) * a.q(x) + a.k(x) - a.k(x) * a.v(x), counts)
        assert kinds["hit"] == 2

    def test_the_first_member_twice_at_the_end(self, counts: Counts) -> None:
        assert self._both(lambda a, x: a.q(x) * a.k(x) + a.v(x) * a.q(x), counts)["lead"] == 2

    def test_a_follower_before_the_first(self, counts: Counts) -> None:
        assert self._both(lambda a, x: a.k(x) * a.q(x) + a.v(x), counts)["hit"] >= 1

    def test_a_follower_before_the_first_and_again(self, counts: Counts) -> None:
        self._both(lambda a, x: a.k(x) * a.q(x) + a.k(x) * a.v(x), counts)

    def test_another_layer_between(self, counts: Counts) -> None:
        kinds = self._both(lambda a, x: a.q(x) + a.o(a.q.base_layer(x)) * a.k(x) * a.v(x), counts)
        assert kinds["hit"] == 2

    def test_two_inputs_in_turns(self, counts: Counts) -> None:
        def forward(a: Any, x: Tensor) -> Tensor:
            other = x.flip(0)
            return a.q(x) + a.q(other) * a.k(x) + a.k(other) * a.v(x) + a.v(other)

        self._both(forward, counts)

    @pytest.mark.parametrize("name", ["q", "k"])
    def test_a_member_without_dropout(self, name: str, counts: Counts) -> None:
        def change(attention: Any) -> None:
            getattr(attention, name).lora_dropout["default"] = nn.Identity()

        forward = lambda a, x: a.q(x) + torch.rand(()) * a.k(x) + torch.rand(()) * a.v(x)  # noqa: E731
        kinds = self._both(forward, counts, change)
        assert kinds["hit"] == (1 if name == "q" else 2)

    @pytest.mark.parametrize("name", ["q", "k"])
    def test_a_member_that_peft_runs(self, name: str, counts: Counts) -> None:
        """It draws from the same generator, at its own call."""

        def change(attention: Any) -> None:
            getattr(attention, name).base_layer.register_forward_hook(lambda *_: None)

        kinds = self._both(lambda a, x: a.q(x) + a.k(x) * torch.rand(()) + a.v(x), counts, change)
        assert kinds == {"lead": 1, "hit": 1, "peft": 1}

    def test_a_follower_that_never_comes(self, counts: Counts) -> None:
        self._both(lambda a, x: a.q(x) + a.v(x) * a.o(x), counts)


class Checkpointed(Model):
    """``region`` is what runs each attention."""

    region: Callable[..., Tensor] = staticmethod(lambda attention, x: attention(x))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.region(self.second, self.region(self.first, x).relu())
        return y


REGIONS = {
    "reentrant": lambda attention, x: checkpoint(attention, x, use_reentrant=True),
    "non-reentrant": lambda attention, x: checkpoint(attention, x, use_reentrant=False),
    "without early stop": lambda attention, x: _whole(attention, x),
}


def _whole(attention: Any, x: Tensor) -> Tensor:
    with torch.utils.checkpoint.set_checkpoint_early_stop(False):
        y: Tensor = checkpoint(attention, x, use_reentrant=False)
    return y


def steps(model: Any, count: int, forwards: int = 1) -> list[dict[str, Tensor]]:
    """Outcomes of steps, each of one backward pass of several forward passes."""
    torch.manual_seed(7)
    return [
        outcome(lambda x: sum(model(x * factor) for factor in range(1, forwards + 1)), model)  # type: ignore[arg-type]
        for _ in range(count)
    ]


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("region", REGIONS)
def test_checkpointing(region: str, forwards: int, p: float, counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Observed in the first step's forward passes; a step has one of them, or two before its backward pass, as DPO."""
    whole = build(Checkpointed, lora_dropout=p)
    parts = copy.deepcopy(whole)
    inner(parts).region = REGIONS[region]
    report = pk.apply(parts, group=True)
    pk.apply(whole, group=False)
    pk.apply(whole, group=True)
    expected = steps(whole, 3, forwards)
    got = steps(parts, 3, forwards)
    for ours, theirs in zip(got, expected, strict=True):
        assert_close(ours, theirs)
    assert len(report.groups) == 2 and not report.dissolved
    found = counts.of(lambda: steps(parts, 1, forwards))
    # Two attentions, each called and called again.
    assert (found["lead"], found["hit"]) == (4 * forwards, 8 * forwards)


@pytest.mark.parametrize("region", REGIONS)
def test_dissolved_between_forward_and_backward(region: str, counts: Counts) -> None:
    """Calls that miss come between a step's forward pass and its backward pass, which repeats the forward pass."""
    found = []
    for name in (None, region):
        model = build(Checkpointed, lora_dropout=P)
        if name is not None:
            inner(model).region = REGIONS[name]
        report = pk.apply(model, group=True)
        with torch.no_grad():
            model(given())
        attentions = inner(model).first, inner(model).second
        torch.manual_seed(7)
        x = given().requires_grad_()
        y = model(x)
        with torch.no_grad():
            for attention in attentions:
                for _ in range(3):
                    attention(given(), lambda x, name: x.clone() if name == "v" else x)
        assert len(report.dissolved) == 2
        y.square().sum().backward()
        found.append(
            {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        )
        model.zero_grad(set_to_none=True)
        kinds = counts.of(lambda: outcome(model, model))  # noqa: B023
        assert "hit" not in kinds
    assert_close(found[1], found[0])


def test_a_graph_that_waits_keeps_what_was_observed(counts: Counts) -> None:
    """Only that of a region that is recomputed, and only as long as it waits."""
    model = build(Checkpointed)
    inner(model).region = REGIONS["non-reentrant"]
    report = pk.apply(model, group=True)
    y = model(given())
    assert len(report.groups) == 2
    assert "hit" not in counts.of(lambda: model(given()))
    y.sum().backward()
    assert counts.of(lambda: model(given()))["hit"] == 4


def test_transformers_checkpointing_with_dropout(counts: Counts) -> None:
    for use_reentrant in (True, False):
        model, call = build_architecture("Llama", lora_dropout=P)
        model.train()
        fused = copy.deepcopy(model)
        pk.apply(model, group=True)
        pk.apply(fused, group=True)
        fused.enable_input_require_grads()
        fused.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        for step in range(3):
            torch.manual_seed(step)
            expected = run(model, call)
            torch.manual_seed(step)
            counts.clear()
            assert_like_peft(run(fused, call), expected)
        assert counts["hit"] >= 6


def test_lora_config_is_what_is_trained() -> None:
    """The other tests would hold nothing if dropout were off."""
    fused, _, _ = pair(lora_dropout=P)
    assert isinstance(inner(fused).first.q.lora_dropout["default"], nn.Dropout) and fused.training
    assert isinstance(fused, peft.PeftModel)
