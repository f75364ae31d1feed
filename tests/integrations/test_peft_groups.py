"""apply's groups on models: what is observed, what the report says, and PEFT's logits and gradients."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import peft_kernels as pk
from peft_kernels.integrations.peft import groups as groups_file
from peft_kernels.integrations.peft import siblings
from peft_kernels.integrations.peft.grouped import GroupedLoraLinear
from peft_kernels.integrations.peft.layers import FusedLoraLinear, PeftLinear
from peft_kernels.integrations.transformers import ApplyCallback
from tests.integrations.siblings import (
    NAMES,
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

VOCABULARY = 61
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_DECODER = {**_SIZES, "num_key_value_heads": 2, "vocab_size": VOCABULARY, "head_dim": 8}
_EXPERTS = {"moe_intermediate_size": 20, "num_experts_per_tok": 2}
_MLA = {"kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_QKV, _GATED = "q_proj + k_proj + v_proj", "gate_proj + up_proj"

# What makes the model, and how many groups of which layers it has.
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "Llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_DECODER)), {_QKV: 2, _GATED: 2}),
    "Qwen3-MoE": (
        lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**_DECODER, **_EXPERTS, num_experts=4, decoder_sparse_step=1)),
        {_QKV: 2},
    ),
    "BERT": (lambda: tf.BertModel(tf.BertConfig(**_SIZES, vocab_size=VOCABULARY)), {"query + key + value": 2}),
    "GPT-2": (
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY)),
        {},
    ),
    "T5": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                vocab_size=VOCABULARY,
                feed_forward_proj="gated-gelu",
            )
        ),
        {"q + k + v": 4, "wi_0 + wi_1": 4, "k + v": 2},
    ),
    "DeepSeek-V3": (
        lambda: tf.DeepseekV3ForCausalLM(
            tf.DeepseekV3Config(
                **_SIZES,
                **_EXPERTS,
                **_MLA,
                num_key_value_heads=4,
                n_routed_experts=4,
                n_group=1,
                topk_group=1,
                vocab_size=VOCABULARY,
                first_k_dense_replace=1,
            )
        ),
        {"q_a_proj + kv_a_proj_with_mqa": 2},
    ),
    "Qwen3.5": (
        lambda: tf.Qwen3_5ForCausalLM(
            tf.Qwen3_5TextConfig(**_DECODER, **_LINEAR, layer_types=["linear_attention", "full_attention"])
        ),
        {"in_proj_qkv + in_proj_z + in_proj_b + in_proj_a": 1, _QKV: 1, _GATED: 2},
    ),
}


def build_architecture(name: str, **options: Any) -> tuple[Any, Callable[[Any], Tensor]]:
    """A PEFT model in float64, and what calls it."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, **{"target_modules": "all-linear", "init_lora_weights": False, **options})
    base: Any = ARCHITECTURES[name][0]().eval()
    base.set_experts_implementation("eager")  # torch has no grouped product of float64
    model = peft.get_peft_model(base, config).double().eval()
    ids = torch.randint(1, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    extra = {"decoder_input_ids": ids.flip(1)} if name == "T5" else {}

    def call(model: Any) -> Tensor:
        found = model(input_ids=ids, **extra)
        y: Tensor = found.logits if "logits" in found else found.last_hidden_state
        return y

    return model, call


def run(model: Any, call: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """Logits, and every gradient."""
    model.zero_grad(set_to_none=True)
    y = call(model)
    # Not the square alone, which is nearly constant behind a layer norm.
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(5))
    (y * weights).mean().backward()
    return {"y": y.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_like_peft(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert float((got["y"] - expected["y"]).abs().max()) <= 1e-12
    assert_close(got, expected)


def own_names(groups: tuple[tuple[str, ...], ...]) -> dict[str, int]:
    return dict(Counter(" + ".join(name.rpartition(".")[2] for name in group) for group in groups))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str, counts: Counts) -> None:
    """Observed in the first call, and groups in the next ones: every member but the first takes its output."""
    plain, call = build_architecture(name)
    fused = copy.deepcopy(plain)
    report, expected = pk.apply(fused, group=True), run(plain, call)
    groups = ARCHITECTURES[name][1]
    layers = len(report.fused)
    assert not report.groups
    assert counts.of(lambda: assert_like_peft(run(fused, call), expected)) == {"alone": layers}
    assert own_names(report.groups) == groups
    hits = sum(names.count("+") * number for names, number in groups.items())
    made = {"lead": sum(groups.values()), "hit": hits, "alone": layers - sum(groups.values()) - hits}
    for _ in range(2):
        found = counts.of(lambda: assert_like_peft(run(fused, call), expected))
        assert found == {name: number for name, number in made.items() if number}
    with torch.no_grad():
        assert counts.of(lambda: call(fused))["alone"] == made["alone"]
    assert not report.dissolved and not report.fallback_calls


def test_generation_with_a_cache(counts: Counts) -> None:
    plain, _ = build_architecture("Llama")
    fused = copy.deepcopy(plain)
    report = pk.apply(fused, group=True)
    ids = torch.ones(1, 4, dtype=torch.long)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = plain.generate(input_ids=ids, **options)
    for _ in range(2):
        assert torch.equal(fused.generate(input_ids=ids, **options), expected)
    assert counts["hit"] == 9 * 6 and not report.dissolved


class TestReport:
    def test_says_which(self) -> None:
        fused, _, report = pair()
        assert str(report) == "peft_kernels: 8 modules fused, 0 not"
        fused(given())
        places = [f"base_model.model.{parent}" for parent in ("first", "second")]
        assert report.groups == tuple((f"{place}.q", f"{place}.k", f"{place}.v") for place in places)
        assert "  2 groups (q + k + v: 2)" in str(report)

    def test_dissolved(self) -> None:
        fused, _, report = pair()
        attention = inner(fused).first
        for _ in range(3):
            attention(given(), lambda x, name: x.clone())
            assert not report.dissolved  # it was observed so, and is none
        fused, _, report = pair()
        attention = inner(fused).first
        attention(given())
        for expected in (0, 1):
            assert len(report.dissolved) == 0
            attention(given(), lambda x, name: x.clone() if name == "v" else x)
            assert len(report.dissolved) == expected
        assert len(report.groups) == 0 and "1 groups dissolved (q + k + v: 1)" in str(report)

    def test_applying_twice_changes_nothing(self, counts: Counts) -> None:
        fused, _, first = pair()
        fused(given())
        second = pk.apply(fused, group=True)
        assert first == second and first.groups == second.groups and len(second.groups) == 2
        assert counts.of(lambda: fused(given()))["hit"] == 4
        assert len(siblings_of(fused)) == 2

    def test_another_choice_is_another_one(self, counts: Counts) -> None:
        fused, _, _ = pair()
        fused(given())
        pk.apply(fused, group=False)
        assert not siblings_of(fused) and {type(layer) for layer in lora_layers(fused)} == {FusedLoraLinear}
        assert counts.of(lambda: fused(given())) == {"alone": 8}
        report = pk.apply(fused, groups=[("k", "v")])
        assert own_names(report.groups) == {"k + v": 2}
        assert counts.of(lambda: fused(given())) == {"lead": 2, "hit": 2, "alone": 4}
        pk.apply(fused)
        assert not siblings_of(fused)


def lora_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, PeftLinear)]


class TestChoice:
    @pytest.mark.parametrize("options", [{}, {"group": "auto"}, {"group": False}], ids=str)
    def test_layers_are_by_themselves(self, options: dict[str, Any], counts: Counts) -> None:
        """On a CPU; the class and what is on the modules are what they are without groups."""
        model = build()
        report = pk.apply(model, **options)
        assert {type(layer) for layer in lora_layers(model)} == {FusedLoraLinear}
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        model(given())
        assert counts.of(lambda: model(given())) == {"alone": 8} and not report.groups

    def test_auto_where_it_may_help(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(groups_file, "_is_worth_it", lambda layers: True)
        model = build()
        pk.apply(model)
        assert {type(layer) for layer in lora_layers(model)} == {GroupedLoraLinear}
        assert not any(each.is_forced for each in siblings_of(model))

    def test_one_layer_has_no_siblings(self) -> None:
        model = build(target_modules=["q"])
        pk.apply(model, group=True)
        assert {type(layer) for layer in lora_layers(model)} == {FusedLoraLinear} and not siblings_of(model)

    @pytest.mark.parametrize("group", [None, 1, 0, "yes", 1.0])
    def test_no_choice(self, group: Any) -> None:
        with pytest.raises(ValueError, match=r"apply: group must be 'auto', True or False, got"):
            pk.apply(build(), group=group)

    def test_torch_that_is_too_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(siblings, "SEES_REGIONS", False)
        monkeypatch.setattr(groups_file, "_is_worth_it", lambda layers: True)
        model = build()
        assert not pk.apply(model).grouped
        pk.revert(model)
        for options in ({"group": True}, {"groups": [("q", "k")]}):
            with pytest.raises(pk.UnsupportedError, match=r"need torch 2\.8"):
                pk.apply(model, **options)
        assert {type(layer) for layer in lora_layers(model)} == {PeftLinear}

    def test_strict_changes_nothing(self) -> None:
        model = build()
        lora_layers(model)[0].merge()
        with pytest.raises(pk.UnsupportedError, match="merged"):
            pk.apply(model, group=True, strict=True)
        assert not siblings_of(model) and {type(layer) for layer in lora_layers(model)} == {PeftLinear}


def test_the_callback_hands_them_on() -> None:
    model = build()
    callback = ApplyCallback(groups=[("q", "k")])
    callback.on_train_begin(None, None, None, model=model)
    assert callback.report is not None and own_names(callback.report.groups) == {"q + k": 2}
    assert own_names(callback.report.dissolved) == {}


class TestNamed:
    def test_needs_no_observation(self, counts: Counts) -> None:
        plain = build()
        fused = copy.deepcopy(plain)
        report = pk.apply(fused, groups=[["q", "k", "v"]])
        assert own_names(report.groups) == {"q + k + v": 2}
        expected = outcome(plain, plain)
        assert counts.of(lambda: assert_close(outcome(fused, fused), expected)) == {"lead": 2, "hit": 4, "alone": 2}

    def test_wrong_for_some_parents(self, counts: Counts) -> None:
        """T5's cross-attention has a q of another x: its group is dissolved, the others stay."""
        plain, call = build_architecture("T5")
        fused = copy.deepcopy(plain)
        report, expected = pk.apply(fused, groups=[("q", "k", "v")]), run(plain, call)
        for _ in range(3):
            assert_like_peft(run(fused, call), expected)
        assert len(report.groups) == 4 and len(report.dissolved) == 2
        assert all("EncDecAttention" in name for group in report.dissolved for name in group)

    @pytest.mark.parametrize(
        ("groups", "message"),
        [
            ([("q", "nothing")], r"\['k', 'o', 'q', 'v'\], got \['nothing'\]"),
            ([("q", "k"), ("k", "v")], r"groups name \['k'\] more than once"),
            ([("q", "q")], r"groups name \['q'\] more than once"),
            ([("q", "other")], r"none has all of \('q', 'other'\)"),
            ([("q",)], "at least two names"),
            (["qk"], "tuples of at least two"),
            ("qk", "tuples of at least two"),
            ([("q", 1)], "tuples of names"),
        ],
        ids=str,
    )
    def test_wrong_names(self, groups: Any, message: str) -> None:
        class Wider(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.attention, self.below = type(inner(build()).first)(), nn.Module()
                self.below.other = nn.Linear(8, 8)

        names = [*NAMES, "other"] if "other" in str(groups) else list(NAMES)
        model = build(Wider, target_modules=names)
        with pytest.raises(ValueError, match=f"apply: .*{message}"):
            pk.apply(model, groups=groups)
        assert {type(layer) for layer in lora_layers(model)} == {PeftLinear}

    def test_contradiction(self) -> None:
        with pytest.raises(ValueError, match="group=False makes no groups"):
            pk.apply(build(), group=False, groups=[("q", "k")])


class TestTraces:
    def test_revert(self) -> None:
        model = build()
        before = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
        pk.apply(model, group=True)
        model(given())
        model(given())
        pk.revert(model)
        assert {name: (type(module), set(vars(module))) for name, module in model.named_modules()} == before
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs")
        assert not any(getattr(module, name) for module in model.modules() for name in hooks)

    def test_hooks_of_others_stay(self) -> None:
        model = build()
        seen: list[int] = []
        inner(model).first.register_forward_hook(lambda *_: seen.append(1), always_call=True)
        pk.apply(model, group=True)
        model(given())
        pk.revert(model)
        model(given())
        assert len(seen) == 2 and len(inner(model).first._forward_hooks_always_called) == 1

    def test_copies_have_groups_of_their_own(self, counts: Counts) -> None:
        fused, plain, report = pair()
        fused(given())
        copied = copy.deepcopy(fused)
        assert {id(each) for each in siblings_of(copied)}.isdisjoint(map(id, siblings_of(fused)))
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(1.5)
            for parameter in plain.parameters():
                parameter.mul_(1.5)
        expected = outcome(plain, plain)
        assert counts.of(lambda: assert_close(outcome(copied, copied), expected))["hit"] == 4
        for _ in range(2):
            inner(copied).first(given(), lambda x, name: x.clone() if name == "v" else x)
        assert not report.dissolved and len(report.groups) == 2

    def test_copy_of_a_layer_alone(self) -> None:
        fused, plain, _ = pair()
        fused(given())
        torch.testing.assert_close(copy.deepcopy(inner(fused).first.q)(given()), inner(plain).first.q(given()))

    def test_pickles_open_without_this_package(self, tmp_path: Path) -> None:
        plain, call = build_architecture("Llama")
        fused = copy.deepcopy(plain)
        pk.apply(fused, group=True)
        call(fused)
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        assert b"peft_kernels" not in buffer.getvalue()
        torch.save((fused, call(fused).detach()), tmp_path / "model.pt")
        program = f"""
import sys
sys.modules["peft_kernels"] = None
import torch
model, expected = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
ids = torch.randint(1, {VOCABULARY}, (2, 7), generator=torch.Generator().manual_seed(0))
for _ in range(2):
    assert (model(input_ids=ids).logits - expected).abs().max() <= 1e-12
print("equal")
"""
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert result.stdout.endswith("equal\n"), result.stderr

    def test_a_pickled_model_is_applied_again(self, counts: Counts) -> None:
        fused, plain, _ = pair()
        fused(given())
        loaded = pickle.loads(pickle.dumps(fused))
        assert {type(layer) for layer in lora_layers(loaded)} == {PeftLinear} and not siblings_of(loaded)
        assert "_peft_kernels_place" not in vars(lora_layers(loaded)[0])
        pk.apply(loaded, group=True)
        loaded(given())
        expected = outcome(plain, plain)
        assert counts.of(lambda: assert_close(outcome(loaded, loaded), expected))["hit"] == 4
        pk.revert(loaded)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.modules())
