"""add_prefix and remove_prefix: the results of the same prefix in a cache, in training and in generation."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import transformers

import peft_kernels as pk
from peft_kernels import PrefixEncoder
from peft_kernels.integrations import transformers as integration
from python_ref import compare
from tests.integrations.models import LAYERS, tokens
from tests.integrations.prefixes import CLOSE, P, base, loss_of, padding, train_step, with_cache, with_prefix

MODELS = ["llama", "qwen2", "mistral", "gpt2", "bert"]


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("architecture", MODELS)
def test_equals_the_prefix_in_a_cache(architecture: str, side: str) -> None:
    model, encoder = with_prefix(architecture)
    mask = padding(side)
    logits, gradients = train_step(model.train(), mask)
    expected = with_cache(base(architecture), encoder, tokens(), mask)
    encoder.zero_grad()
    loss_of(expected, mask).backward()
    # Padding rows too: they see the prefix.
    torch.testing.assert_close(logits, expected.detach(), **CLOSE)
    (gradient,) = gradients.values()
    torch.testing.assert_close(gradient, encoder.embedding.grad, **CLOSE)
    assert gradient.abs().max() > 1e-5


def test_the_prefix_is_run_by_prefix_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_kernels.integrations.transformers import interface

    calls = []

    def recorded(*args: object, **kwargs: object) -> torch.Tensor:
        calls.append(kwargs)
        return pk.prefix_attention(*args, **kwargs)

    monkeypatch.setattr(interface, "prefix_attention", recorded)
    model, _ = with_prefix("llama")
    model(tokens())
    assert [call["causal"] for call in calls] == [True] * LAYERS
    assert all(call["key_padding_mask"] is None for call in calls)
    calls.clear()
    model(tokens(), attention_mask=padding("left"))
    assert all(torch.equal(call["key_padding_mask"], padding("left").bool()) for call in calls)


@pytest.mark.parametrize("reparam", [None, 6])
@pytest.mark.parametrize("architecture", ["llama", "bert", "gpt2"])
def test_gradient_checkpointing(architecture: str, reparam: int | None) -> None:
    model, _ = with_prefix(architecture, reparam)
    expected, expected_gradients = train_step(model.train(), padding("left"))
    for use_reentrant in (False, True):
        again = copy.deepcopy(model)
        again.enable_input_require_grads()
        again.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        logits, gradients = train_step(again, padding("left"))
        compare.assert_bitwise_equal("logits", logits, expected)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            # Reentrant, each layer runs the MLP for itself, and gradients are summed in another order.
            torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-5, atol=1e-8)


def test_two_calls_before_one_backward_under_checkpointing() -> None:
    """Each call is recomputed with its own prefixes, whatever was run in between."""
    model, _ = with_prefix("llama", 6)
    model.train()
    expected = train_step(model)[1]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.zero_grad()
    loss = loss_of(model(tokens())[0], None)
    with torch.no_grad():
        model(tokens(seed=1))
    loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            compare.assert_bitwise_equal(name, parameter.grad, expected[name])


@pytest.mark.slow
def test_compiles_without_graph_break() -> None:
    """An encoder; test_peft_prompts.py has a decoder."""
    torch._dynamo.reset()
    model, _ = with_prefix("bert", 6)
    compiled = torch.compile(copy.deepcopy(model.train()), fullgraph=True, backend="aot_eager")
    for mask in (padding("left"), None):
        (logits, gradients), (expected, expected_gradients) = train_step(compiled, mask), train_step(model, mask)
        torch.testing.assert_close(logits, expected, **CLOSE)
        for gradient, name in zip(gradients.values(), expected_gradients, strict=True):
            torch.testing.assert_close(gradient, expected_gradients[name], **CLOSE)


def _draws(run: object, dtype: torch.dtype | None) -> None:
    """As close to a float64 run as the prefix in a cache is; errors of a whole model scatter, so several draws."""
    draws = []
    for seed in range(12):
        model, encoder = with_prefix("llama", seed=seed)
        plain, exact = base("llama", seed=seed), base("llama", seed=seed)
        ours, theirs = run(model.to(dtype), encoder, plain.to(dtype))
        draws.append([ours, theirs, with_cache(exact.double(), copy.deepcopy(encoder).double(), tokens(), None)])
    compare.assert_close("logits", *(torch.stack(logits).detach() for logits in zip(*draws, strict=True)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_a_float32_encoder(dtype: torch.dtype) -> None:
    def run(model: nn.Module, encoder: PrefixEncoder, plain: nn.Module) -> list[torch.Tensor]:
        encoder.float()
        logits, gradients = train_step(model)
        assert logits.dtype == dtype and {gradient.dtype for gradient in gradients.values()} == {torch.float32}
        return [logits, with_cache(plain, copy.deepcopy(encoder).to(dtype), tokens(), None)]

    _draws(run, dtype)


def test_autocast() -> None:
    def run(model: nn.Module, encoder: PrefixEncoder, plain: nn.Module) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            logits, gradients = train_step(model)
            assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
            return [logits, with_cache(plain, encoder, tokens(), None)]

    _draws(run, None)


def test_double_precision_model_with_a_float32_encoder() -> None:
    model, encoder = with_prefix("llama")
    model.double()
    encoder.float()
    expected = with_cache(base("llama").double(), copy.deepcopy(encoder).double(), tokens(), None)
    torch.testing.assert_close(model(tokens()).logits, expected)


class TestGeneration:
    @pytest.mark.parametrize("side", ["none", "left"])
    @pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2"])
    def test_equals_full_passes(self, architecture: str, side: str) -> None:
        """Greedy decoding step by step gives what a pass over the whole sequence predicts."""
        model, _ = with_prefix(architecture)
        ids, mask = tokens(), padding(side)
        generated = _generate(model, ids, mask)
        for step in range(ids.shape[1], generated.shape[1]):
            seen = generated[:, :step]
            full = None if mask is None else torch.cat((mask, mask.new_ones(len(ids), step - ids.shape[1])), dim=1)
            with torch.no_grad():
                # generate counts positions from the first real token; a pass must be told to.
                positions = None if full is None else (full.cumsum(-1) - 1).clamp(min=0)
                logits = model(seen, attention_mask=full, position_ids=positions).logits[:, -1]
            assert torch.equal(logits.argmax(-1), generated[:, step]), step

    def test_the_prefix_stays_outside_the_cache(self) -> None:
        model, encoder = with_prefix("llama")
        ids = tokens()
        with torch.no_grad():
            first = model(ids[:, :4], use_cache=True)
            cache = first.past_key_values
            assert type(cache) is transformers.DynamicCache and cache.get_seq_length() == 4
            second = model(ids[:, 4:], past_key_values=cache)
            assert second.past_key_values is cache and cache.get_seq_length() == ids.shape[1]
            whole = model(ids, use_cache=False)
        assert whole.past_key_values is None
        torch.testing.assert_close(torch.cat((first.logits, second.logits), dim=1), whole.logits, **CLOSE)
        expected = with_cache(base("llama"), encoder, ids, None)
        torch.testing.assert_close(whole.logits, expected, **CLOSE)

    def test_training_fills_no_cache_unless_asked(self) -> None:
        model, _ = with_prefix("llama")
        model.train()
        assert model(tokens()).past_key_values is None
        assert model(tokens(), use_cache=True).past_key_values.get_seq_length() == tokens().shape[1]

    @pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
    @pytest.mark.parametrize("side", ["none", "left"])
    def test_ways_to_generate(self, options: dict[str, object], side: str) -> None:
        model, _ = with_prefix("llama")
        ids, mask = tokens(), padding(side)
        plain = base("llama")
        expected = _generate(model, ids, mask, num_beams=options.get("num_beams", 1))
        assert torch.equal(_generate(model, ids, mask, **options), expected)
        assert not torch.equal(_generate(plain, ids, mask, **options), expected), "the prefix does nothing"


def _generate(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, **options: object) -> torch.Tensor:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "disable_compile": True, **options}
    return model.generate(input_ids=ids, attention_mask=mask, eos_token_id=None, **options)


class TestModelAround:
    @pytest.mark.parametrize("architecture", ["llama", "bert"])
    def test_remove_leaves_no_trace(self, architecture: str) -> None:
        model = base(architecture)
        before = {name: _traces(module) for name, module in model.named_modules()}
        expected = model(tokens())[0]
        encoder = integration.prefix_encoder(model, P)
        integration.add_prefix(model, encoder)
        assert not torch.equal(model(tokens())[0], expected)
        assert integration.remove_prefix(model) is encoder
        assert {name: _traces(module) for name, module in model.named_modules()} == before
        compare.assert_bitwise_equal("logits", model(tokens())[0], expected)

    def test_other_hooks_survive(self) -> None:
        model, _ = with_prefix("llama")
        seen = []
        model.model.register_forward_hook(lambda *_: seen.append(1))
        model.model.register_forward_pre_hook(lambda *_: seen.append(2))
        integration.remove_prefix(model)
        model(tokens())
        assert seen == [2, 1]

    def test_copies(self) -> None:
        model, _ = with_prefix("llama", 6)
        expected = train_step(model)[0]
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            compare.assert_bitwise_equal("logits", train_step(other)[0], expected)
            with torch.no_grad():
                other.model.prefix_encoder.embedding.zero_()
            assert not torch.equal(train_step(other)[0], expected)
        compare.assert_bitwise_equal("logits", train_step(model)[0], expected)

    def test_another_process_registers_when_it_unpickles(self, tmp_path: object) -> None:
        """And not before: importing the package and its integrations registers nothing."""
        model, _ = with_prefix("llama")
        torch.save(model, tmp_path / "model.pt")
        torch.save(train_step(model)[0], tmp_path / "logits.pt")
        program = f"""
import peft_kernels as pk, torch
import peft_kernels.integrations.transformers, peft_kernels.integrations.peft
from transformers import AttentionInterface, AttentionMaskInterface
assert "peft_kernels" not in AttentionInterface().valid_keys()
assert "peft_kernels" not in AttentionMaskInterface().valid_keys()
folder = {str(tmp_path)!r}
model = torch.load(folder + "/model.pt", weights_only=False)
ids = torch.randint(1, {model.config.vocab_size}, (3, 7), generator=torch.Generator().manual_seed(0))
# Not bit for bit: with several threads torch's CPU products depend on where memory happens to lie. A prefix that is
# not attended to moves them by as much as they are.
torch.testing.assert_close(model(ids).logits, torch.load(folder + "/logits.pt"), rtol=1e-5, atol=1e-5)
print("equal")
"""
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert result.stdout.endswith("equal\n"), result.stderr

    def test_state_dict_and_training(self) -> None:
        """The encoder is the only thing that trains, and saves and loads with the model."""
        model, _ = with_prefix("bert", 6)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
        target = torch.randint(1, 61, (3, 7), generator=torch.Generator().manual_seed(3))
        losses = []
        for _ in range(15):
            loss = model(tokens(), labels=target).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        other, _ = with_prefix("bert", 6)
        other.load_state_dict(model.state_dict())
        compare.assert_bitwise_equal("logits", other(tokens())[0], model(tokens())[0])

    def test_two_models_of_one_configuration(self) -> None:
        """The other model runs as before, though the attention implementation is the configuration's."""
        torch.manual_seed(0)
        one = base("llama")
        torch.manual_seed(0)
        other = type(one)(one.config).eval()
        expected = {side: other(tokens(), attention_mask=padding(side))[0] for side in ("none", "left")}
        integration.add_prefix(one, integration.prefix_encoder(one, P))
        for side, logits in expected.items():
            torch.testing.assert_close(other(tokens(), attention_mask=padding(side))[0], logits, **CLOSE)


def _traces(module: nn.Module) -> tuple[object, ...]:
    hooks = [getattr(module, name) for name in vars(module) if "hooks" in name]
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return type(module), set(vars(module)), set(module._modules), [dict(hook) for hook in hooks if hook], implementation
