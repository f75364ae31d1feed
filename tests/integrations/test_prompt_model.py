"""add_prompt and remove_prompt: the results of PEFT's prompt tuning, and ensembles as one batch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import peft_kernels as pk
from peft_kernels import PromptEmbedding, PromptEnsemble
from peft_kernels.integrations import transformers as integration
from python_ref import compare
from tests.integrations.models import HIDDEN, tokens
from tests.integrations.peft_prompts import build, generate, inputs, run, task_base
from tests.integrations.prefixes import CLOSE, P, padding


def _pair(architecture: str = "llama", task: str = "CAUSAL_LM") -> tuple[nn.Module, peft.PeftModel]:
    """A model with a prompt, and PEFT's with the same prompt and head."""
    theirs = build("prompt", architecture, task)
    ours = task_base(architecture, task).requires_grad_(False)
    prompt = PromptEmbedding(P, HIDDEN, theirs.prompt_encoder["default"].embedding.weight)
    integration.add_prompt(ours, prompt)
    return ours, theirs


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(
    ("architecture", "task"),
    [("llama", "CAUSAL_LM"), ("gpt2", "CAUSAL_LM"), ("bert", "SEQ_CLS"), ("bert", "FEATURE_EXTRACTION")],
)
def test_equals_peft(architecture: str, task: str, side: str) -> None:
    ours, theirs = _pair(architecture, task)
    arguments = inputs(architecture, task, True, padding(side))
    (outputs, gradients), (expected, expected_gradients) = run(ours.train(), arguments), run(theirs.train(), arguments)
    torch.testing.assert_close(outputs, expected, **CLOSE)
    key = "prompt_encoder.default.embedding.weight"
    torch.testing.assert_close(gradients["prompt.weight"], expected_gradients[key], **CLOSE)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_generation(options: dict[str, object]) -> None:
    ours, theirs = _pair()
    assert torch.equal(generate(ours, None, **options), generate(theirs, None, **options))


def test_generation_with_padding() -> None:
    """Positions start at the first real token: rows do not depend on how much padding is in front of them."""
    ours, _ = _pair()
    padded = generate(ours, padding("left"))
    for row, first in enumerate((3, 1, 0)):
        alone = ours.generate(
            tokens()[row : row + 1, first:], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        assert torch.equal(padded[row, first:], alone[0])


def _turns(model: nn.Module, **options: object) -> tuple[Tensor, Tensor, list[int]]:
    """First logits of a second turn with and without the first one's cache, and the lengths that the model was fed."""
    lengths: list[int] = []

    def seen(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        lengths.append((kwargs["inputs_embeds"] if ids is None else ids).shape[1])

    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    first = model.generate(tokens(), attention_mask=torch.ones_like(tokens()), **options)
    ids = torch.cat((first.sequences, tokens(seed=1)), dim=1)
    handle = model.base_model.register_forward_pre_hook(seen, with_kwargs=True)
    mask = torch.ones_like(ids)
    with_cache = model.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, **options)
    handle.remove()
    expected = model.generate(ids, attention_mask=mask, **options)
    return with_cache.logits[0], expected.logits[0], lengths


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
def test_second_turn(architecture: str, copied: bool) -> None:
    """What is new to the cache of the first turn is fed, all of it and nothing else."""
    ours, _ = _pair(architecture)
    got, expected, lengths = _turns(pickle.loads(pickle.dumps(copy.deepcopy(ours))) if copied else ours)
    torch.testing.assert_close(got, expected, **CLOSE)
    # The last token of the first turn is not in its cache.
    assert lengths == [1 + 7, 1, 1, 1]


def test_second_turn_in_chunks_is_refused() -> None:
    ours, _ = _pair()
    with pytest.raises(pk.UnsupportedError, match=r"(position_ids|attention_mask) must.* got \d+: tokens are missing"):
        _turns(ours, prefill_chunk_size=4)


_WITHOUT_KEYWORDS = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "megatron-bert": {"is_decoder": True},
    "roberta": {"is_decoder": True, "max_position_embeddings": 64},
}


@pytest.mark.parametrize("architecture", _WITHOUT_KEYWORDS)
def test_heads_that_hand_on_no_keywords(architecture: str) -> None:
    """And those whose positions are made by the model itself, where generate passes some."""
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(architecture, **sizes, **_WITHOUT_KEYWORDS[architecture])
    ours = transformers.AutoModelForCausalLM.from_config(config).eval()
    theirs = peft.get_peft_model(
        copy.deepcopy(ours), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)
    )
    prompt = PromptEmbedding(P, HIDDEN, theirs.prompt_encoder["default"].embedding.weight)
    integration.add_prompt(ours, prompt)
    for side in ("none", "left"):
        arguments = inputs(architecture, "CAUSAL_LM", True, padding(side))
        torch.testing.assert_close(ours(**arguments).logits, theirs.eval()(**arguments).logits, **CLOSE)
    # With padding PEFT leaves out the positions that generate passes.
    assert torch.equal(generate(ours, None), generate(theirs, None))


def test_a_call_that_failed_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one past the hooks is refused like any other."""
    ours, _ = _pair()
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(ours.lm_head, "forward", None)
        ours(tokens())
    with pytest.raises(pk.UnsupportedError, match="the prompt was not inserted"):
        ours.model(tokens())


def test_labels_of_each_token() -> None:
    """Where PEFT has none: its labels are as long as the input, its logits longer."""
    ours, _ = _pair("bert", "TOKEN_CLS")
    labels = tokens() % 3
    output = ours(tokens(), attention_mask=padding("right"), labels=labels)
    assert output.logits.shape == (3, P + 7, 3)
    expected = nn.functional.cross_entropy(output.logits[:, P:].flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize(("architecture", "task"), [("llama", "CAUSAL_LM"), ("bert", "SEQ_CLS")])
def test_ensemble_is_one_batch(architecture: str, task: str) -> None:
    torch.manual_seed(1)
    prompts = [PromptEmbedding(P, HIDDEN) for _ in range(3)]
    model = task_base(architecture, task)
    arguments = inputs(architecture, task, True, padding("left"))
    apart, losses = [], []
    for prompt in prompts:
        integration.add_prompt(model, prompt)
        output = model(**arguments)
        apart.append(output.logits)
        losses.append(output.loss)
        integration.remove_prompt(model)
    ensemble = PromptEnsemble(prompts)
    integration.add_prompt(model, ensemble)
    output = model(**arguments)
    torch.testing.assert_close(output.logits, torch.cat(apart), **CLOSE)
    # The loss is a mean, over as many terms for each prompt.
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())
    if task == "SEQ_CLS":
        assert ensemble.vote(output.logits).shape == (3,)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    ours, _ = _pair()
    arguments = inputs("llama", "CAUSAL_LM", True, padding("left"))
    expected, expected_gradients = run(ours.train(), arguments)
    ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    outputs, gradients = run(ours, arguments)
    for output, other in zip(outputs, expected, strict=False):
        compare.assert_bitwise_equal("output", output, other)
    compare.assert_bitwise_equal("prompt", gradients["prompt.weight"], expected_gradients["prompt.weight"])


@pytest.mark.slow
def test_compiles_without_graph_break() -> None:
    torch._dynamo.reset()
    ours, theirs = _pair()
    arguments = inputs("llama", "CAUSAL_LM", True, padding("left"))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    outputs, gradients = run(compiled, arguments)
    expected, expected_gradients = run(theirs, arguments)
    torch.testing.assert_close(outputs[:2], expected[:2], **CLOSE)
    (gradient,) = gradients.values()
    torch.testing.assert_close(gradient, *expected_gradients.values(), **CLOSE)


def test_positions_of_the_caller() -> None:
    """The prompt comes first, as if the positions had been its own and, after it, the given ones."""
    ours, theirs = _pair()
    got = ours(tokens(), position_ids=torch.arange(7)[None]).logits
    torch.testing.assert_close(got, theirs(tokens()).logits, **CLOSE)
    other = ours(tokens(), position_ids=torch.arange(7)[None] + 3).logits
    assert (other - got).abs().max() > 0.01


def test_prefix_and_prompt_together() -> None:
    """Each adds to what the other does; in either order."""
    results = []
    for first in ("prefix", "prompt"):
        model = task_base("llama")
        torch.manual_seed(2)
        encoder, prompt = integration.prefix_encoder(model, 3), PromptEmbedding(P, HIDDEN)
        steps = {
            "prefix": lambda m=model, e=encoder: integration.add_prefix(m, e),
            "prompt": lambda m=model, p=prompt: integration.add_prompt(m, p),
        }
        for step in sorted(steps, key=lambda name, first=first: name != first):
            steps[step]()
        results.append(model(tokens(), attention_mask=padding("left")).logits)
    compare.assert_bitwise_equal("logits", *results)
    assert results[0].shape[1] == P + 7


def test_remove_leaves_no_trace_and_copies_work() -> None:
    ours, _ = _pair()
    expected = ours(tokens()).logits
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        compare.assert_bitwise_equal("logits", other(tokens()).logits, expected)
    assert isinstance(integration.remove_prompt(ours), PromptEmbedding)
    plain = task_base("llama")
    compare.assert_bitwise_equal("logits", ours(tokens()).logits, plain(tokens()).logits)
    for got, before in zip(ours.modules(), plain.modules(), strict=True):
        assert set(vars(got)) == set(vars(before)) and not got._forward_pre_hooks_with_kwargs


class TestRefused:
    @pytest.mark.parametrize(
        ("model", "prompt", "error", "message"),
        [
            (lambda: task_base("llama"), lambda: PromptEmbedding(P, 31), ValueError, "embedding_dim = 32, got 31"),
            (lambda: task_base("llama"), lambda: nn.Linear(2, 2), ValueError, "got Linear"),
            (lambda: task_base("t5"), lambda: PromptEmbedding(P, 32), pk.UnsupportedError, "encoder-decoder"),
            (lambda: nn.Linear(2, 2), lambda: PromptEmbedding(P, 32), pk.UnsupportedError, "no transformers model"),
            (lambda: _pair()[0], lambda: PromptEmbedding(P, 32), ValueError, "has a prompt already"),
            (lambda: _cpm_ant(), lambda: PromptEmbedding(P, 32), pk.UnsupportedError, "takes no inputs_embeds"),
        ],
    )
    def test_putting_on(self, model: object, prompt: object, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            integration.add_prompt(model(), prompt())

    def test_nothing_to_remove(self) -> None:
        with pytest.raises(ValueError, match="has no prompt"):
            integration.remove_prompt(task_base("llama"))

    def test_forward_past_the_hooks(self) -> None:
        ours, _ = _pair()
        with pytest.raises(pk.UnsupportedError, match="the prompt was not inserted"):
            ours.forward(tokens())

    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            ({"attention_mask": torch.ones(3, 1, 7, 7)}, r"attention_mask must be a tensor \(B, L\)"),
            ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]])}, "packed sequences"),
            ({"past_key_values": "static"}, "a static cache has no room"),
            (
                {"past_key_values": "first", "attention_mask": torch.ones(3, 9)},
                r"be of length 19, got 14: tokens are missing",
            ),
        ],
    )
    def test_calls(self, extra: dict[str, object], message: str) -> None:
        ours, _ = _pair()
        if extra.get("past_key_values") == "static":
            extra = {"past_key_values": transformers.StaticCache(ours.config, max_cache_len=16)}
        if extra.get("past_key_values") == "first":
            extra = {**extra, "past_key_values": ours(tokens()).past_key_values}
        with pytest.raises(pk.UnsupportedError, match=message):
            ours(tokens(), **extra)

    def test_a_classifying_decoder_padded_on_the_right(self) -> None:
        """Without input_ids it would read its class from a padding token."""
        ours, theirs = _pair("llama", "SEQ_CLS")
        left = {"attention_mask": padding("left")}
        torch.testing.assert_close(ours(tokens(), **left).logits, theirs(tokens(), **left).logits, **CLOSE)
        with pytest.raises(pk.UnsupportedError, match="must be padded on the left"):
            ours(tokens(), attention_mask=padding("right"))

    def test_an_ensemble_behind_a_cache(self) -> None:
        model = task_base("llama")
        integration.add_prompt(model, PromptEnsemble([PromptEmbedding(P, HIDDEN) for _ in range(2)]))
        with pytest.raises(pk.UnsupportedError, match="an ensemble answers a call at once"):
            model(tokens(), past_key_values=transformers.DynamicCache())


def _cpm_ant() -> nn.Module:
    config = transformers.CpmAntConfig(
        vocab_size=61, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=48, num_hidden_layers=1
    )
    return transformers.CpmAntForCausalLM(config)


def test_the_prompt_is_written_by_prompt_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_kernels.prompt import module, prompt_tuning

    calls = []

    def recorded(*args: object) -> Tensor:
        calls.append(args)
        return prompt_tuning(*args)

    monkeypatch.setattr(module, "prompt_tuning", recorded)
    ours, _ = _pair()
    ours(tokens())
    assert len(calls) == 1
