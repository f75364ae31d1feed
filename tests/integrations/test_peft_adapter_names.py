"""``adapter_names`` on applied models: one plan for all layers, one operation for each, and PEFT's results."""

from __future__ import annotations

import copy
import pickle
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft_kernels as pk
from peft_kernels.integrations.peft import by_row, row_calls, slots
from tests.integrations.mixed import (
    BASE,
    LAST_BITS,
    NAMES,
    ROWS,
    assert_close,
    build,
    inputs,
    layer_of,
    pair,
    tokens,
)
from tests.integrations.models import ARCHITECTURES, lora_layers

ORDERS = {
    "mixed": NAMES,
    "sorted": [*["de"] * 3, *["en"] * 2, *["ar"] * 2, BASE],
    "one adapter": ["ar"] * 8,
    "base alone": [BASE] * 8,
    "a row of two": ["de", "en", *[BASE] * 6],
}


@pytest.fixture(autouse=True)
def no_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_row, "_plans", by_row.Cache(16))


def _logits(model: Any, names: list[str], **options: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs(model, len(names), **options), adapter_names=names).logits
    return found


def _counted(monkeypatch: pytest.MonkeyPatch, holder: Any, name: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    run = getattr(holder, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return run(*args, **kwargs)

    monkeypatch.setattr(holder, name, counting)
    return counts


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_logits_are_peft_s(architecture: str, order: str) -> None:
    fused, plain, report = pair(architecture)
    assert_close(_logits(fused, ORDERS[order]), _logits(plain, ORDERS[order]))
    assert not report.fallback_calls and not report.fallbacks


def test_every_layer_is_one_operation_of_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, _, _ = pair()
    calls, plans = _counted(monkeypatch, row_calls, "rows_call"), _counted(monkeypatch, by_row, "_made")
    for _ in range(3):
        _logits(fused, list(NAMES))
    assert calls == {"rows_call": 3 * len(lora_layers(fused))} and plans == {"_made": 1}


def test_the_plan_is_that_of_rows_of() -> None:
    """It is made without a sort, from what the host knows."""
    for names in ORDERS.values():
        found = by_row.ByRow.of(names).rows(torch.zeros(len(names), 3, 2, 5))
        expected = pk.Rows.of(names, known=found.names, length=6)
        for each in ("slot", "order", "first"):
            assert torch.equal(getattr(found, each), getattr(expected, each)), each
        assert found.runs is not None and expected.runs is not None
        assert torch.equal(found.runs[found.runs[:, 2] > 0], expected.runs[expected.runs[:, 2] > 0])


@pytest.mark.parametrize("shape", [(8, 32), (8, 3, 32), (8, 2, 3, 32), (8, 0, 32)])
def test_shapes_of_x(shape: tuple[int, ...]) -> None:
    fused, plain, report = pair()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got, expected = (layer_of(each)(x, adapter_names=NAMES) for each in (fused, plain))
    assert got.shape == expected.shape
    assert_close(got, expected)
    assert not report.fallback_calls


def test_gradients_reach_the_adapters_that_rows_use() -> None:
    """PEFT's layer differentiates such a call, though its model refuses it in training."""
    fused, plain, _ = pair()
    found = []
    for model in (fused, plain):
        model.set_requires_grad(["en", "de", "ar"])
        model(
            tokens(), adapter_names=["de" if name == "ar" else name for name in NAMES]
        ).logits.square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and not any(".ar." in name for name in found[0])
    for name, gradient in found[0].items():
        # Gradients are sums over all rows, which PEFT's loop adds in another order.
        assert_close(gradient, found[1][name], 1e-13, name)


class TestGenerate:
    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
    @pytest.mark.parametrize("beams", [1, 3])
    def test_tokens_are_peft_s(self, architecture: str, beams: int) -> None:
        """PEFT repeats names for beams, and gives the encoder those that are not repeated."""
        fused, plain, report = pair(architecture)
        options = {"max_new_tokens": 5, "num_beams": beams, "pad_token_id": 0, "adapter_names": NAMES}
        options |= {"output_scores": True, "return_dict_in_generate": True, "do_sample": False}
        got, expected = (model.generate(input_ids=tokens(), **options) for model in (fused, plain))
        assert torch.equal(got.sequences, expected.sequences) and not report.fallback_calls
        for one, other in zip(got.scores, expected.scores, strict=True):
            # Of beams that are out of the race, scores are -inf.
            assert torch.equal(one.isfinite(), other.isfinite())
            assert_close(one[one.isfinite()], other[other.isfinite()], 1e-13)

    def test_factors_are_stacked_for_two_steps_and_kept_for_the_next(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fused, _, _ = pair()
        counts, cat = Counter[str](), torch.cat

        def counting(parts: Any, *args: Any, **kwargs: Any) -> Tensor:
            counts["factors"] += all(isinstance(part, torch.nn.Parameter) for part in parts)
            return cat(parts, *args, **kwargs)

        monkeypatch.setattr(slots.torch, "cat", counting)
        fused.generate(input_ids=tokens(), max_new_tokens=6, pad_token_id=0, adapter_names=NAMES)
        assert counts["factors"] == 2 * 2 * len(lora_layers(fused))
        assert not slots._stacks  # PEFT's hooks are gone

    @pytest.mark.parametrize("how", ["in place", "through data", "another tensor"])
    def test_a_factor_that_changes_between_calls(self, how: str) -> None:
        fused, plain, _ = pair()
        options = {"max_new_tokens": 4, "pad_token_id": 0, "adapter_names": NAMES, "output_scores": True}
        for model in (fused, plain):
            model.generate(input_ids=tokens(), **options)
            for layer in lora_layers(model):
                factor = layer.lora_B["de"]
                if how == "in place":
                    with torch.no_grad():
                        factor.weight.mul_(-3)
                elif how == "through data":
                    factor.weight.data.mul_(-3)
                else:
                    factor.weight = torch.nn.Parameter(-3 * factor.weight.detach())
        got, expected = (
            m.generate(input_ids=tokens(), return_dict_in_generate=True, **options) for m in (fused, plain)
        )
        for one, other in zip(got.scores, expected.scores, strict=True):
            assert_close(one, other, 1e-13)

    def test_a_factor_that_changes_between_steps(self) -> None:
        import transformers

        class Changing(transformers.LogitsProcessor):
            def __init__(self, model: Any) -> None:
                self.model = model

            def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
                for layer in lora_layers(self.model):
                    layer.lora_A["en"].weight.mul_(0.5)
                return scores

        fused, plain, _ = pair()
        options = {"max_new_tokens": 5, "pad_token_id": 0, "adapter_names": NAMES, "output_scores": True}
        options |= {"return_dict_in_generate": True}
        got, expected = (
            model.generate(input_ids=tokens(), logits_processor=[Changing(model)], **options)
            for model in (fused, plain)
        )
        for one, other in zip(got.scores, expected.scores, strict=True):
            assert_close(one, other, 1e-13)


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("adapters", ["half", "float32", "both"])
    def test_half_precision(self, dtype: torch.dtype, adapters: str) -> None:
        """No further from the same layer in float64 than PEFT's, but for a rounding of y."""
        fused, plain, report = pair()
        x = torch.randn(ROWS, 5, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
        for model in (fused, plain):
            model.to(dtype)
            for layer in lora_layers(model):
                for name in layer.lora_A if adapters == "float32" else ("de",) if adapters == "both" else ():
                    layer.lora_A[name].float(), layer.lora_B[name].float()
        exact = layer_of(copy.deepcopy(plain).double())(x.double(), adapter_names=NAMES)
        got, expected = (layer_of(model)(x, adapter_names=NAMES) for model in (fused, plain))
        assert got.dtype == expected.dtype == dtype and not report.fallback_calls
        error, theirs = (float((each.double() - exact).norm()) for each in (got, expected))
        assert error <= theirs + torch.finfo(dtype).eps / 4 * float(exact.norm())

    def test_autocast(self) -> None:
        fused, plain, report = pair()
        fused.float(), plain.float()
        x = torch.randn(ROWS, 5, 32, generator=torch.Generator().manual_seed(1))
        exact = layer_of(plain)(x, adapter_names=NAMES)
        with torch.autocast("cpu", torch.bfloat16):
            got, expected = (layer_of(model)(x, adapter_names=NAMES) for model in (fused, plain))
        assert got.dtype == expected.dtype == torch.bfloat16 and not report.fallback_calls
        error, theirs = (float((each.float() - exact).norm()) for each in (got, expected))
        assert error <= theirs + torch.finfo(torch.bfloat16).eps / 4 * float(exact.norm())

    def test_half_precision_adapters_beside_a_wider_base_are_peft_s(self) -> None:
        fused, plain, report = pair()
        for model in (fused, plain):
            for layer in lora_layers(model):
                layer.lora_A["de"].bfloat16(), layer.lora_B["de"].bfloat16()
        assert torch.equal(_logits(fused, NAMES), _logits(plain, NAMES))
        (reason,) = report.fallback_calls
        assert reason == "x is torch.float64, the adapters are torch.bfloat16"


def _with_adapter(model: Any, **options: Any) -> None:
    torch.manual_seed(3)
    model.add_adapter("more", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **options))
    model.double().eval()


class TestPeftS:
    """What is not fused is PEFT's, with its errors."""

    def _both(self, fused: Any, plain: Any, names: Any = ("more", *NAMES[1:])) -> str | None:
        """The error of both models, which must be one; else their logits must be equal."""
        found = []
        for model in (fused, plain):
            try:
                found.append(_logits(model, list(names)))
            except ValueError as error:
                found.append(str(error))
        if isinstance(found[1], str):
            assert found[0] == found[1]
            return found[1]
        assert_close(found[0], found[1])
        return None

    def test_lora_bias(self) -> None:
        fused, plain, report = pair()
        for model in (fused, plain):
            _with_adapter(model, lora_bias=True)
            with torch.no_grad():
                layer_of(model).lora_B["more"].bias.fill_(2.0)
        assert self._both(fused, plain) is None
        assert report.fallback_calls == {"an adapter that rows choose has a bias (lora_bias)": 2}  # of two q_proj

    def test_dora(self) -> None:
        fused, plain, _ = pair()
        for model in (fused, plain):
            _with_adapter(model, use_dora=True)
        assert "DoRA" in str(self._both(fused, plain))
        assert self._both(fused, plain, NAMES) is None  # it is there, and no row uses it

    def test_merged(self) -> None:
        fused, plain, _ = pair()
        for model in (fused, plain):
            model.merge_adapter()
        assert "merged" in str(self._both(fused, plain, NAMES))

    def test_disabled(self) -> None:
        fused, plain, report = pair()
        with fused.disable_adapter(), plain.disable_adapter():
            assert self._both(fused, plain, NAMES) is None
        assert set(report.fallback_calls) == {"adapters are disabled"}

    def test_too_few_names(self) -> None:
        fused, plain, _ = pair()
        found = []
        for model in (fused, plain):
            with pytest.raises(ValueError, match="7 and 8 respectively") as caught:
                model(tokens(), adapter_names=NAMES[1:])
            found.append(str(caught.value))
        assert found[0] == found[1]

    def test_unknown_name(self) -> None:
        fused, plain, _ = pair()
        assert "non-existing adapter(s): nobody" in str(self._both(fused, plain, ["nobody", *NAMES[1:]]))

    def test_training(self) -> None:
        fused, _, _ = pair()
        with pytest.raises(ValueError, match="training mode"):
            fused.train()(tokens(), adapter_names=NAMES)

    def test_further_arguments(self) -> None:
        fused, _, report = pair()
        layer = layer_of(fused)
        with pytest.raises(TypeError):
            layer(torch.zeros(ROWS, 32, dtype=torch.float64), adapter_names=NAMES, more=1)
        assert report.fallback_calls == {"the call has arguments beside x": 1}


@pytest.mark.parametrize("group", [True, [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]])
def test_groups(group: Any) -> None:
    """A group's layers compute by themselves where rows choose, and as a group again where they do not."""
    plain = build()
    fused = copy.deepcopy(plain)
    report = pk.apply(fused, group=True) if group is True else pk.apply(fused, groups=group)
    for _ in range(3):
        assert_close(_logits(fused, NAMES), _logits(plain, NAMES))
        with torch.no_grad():
            assert_close(fused(tokens()).logits, plain(tokens()).logits, 1e-13)
    assert len(report.groups) == 4 and not report.dissolved and not report.fallback_calls


class TestCopies:
    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
    )
    def test_a_copy_is_right(self, copied: Callable[[Any], Any]) -> None:
        fused, plain, _ = pair()
        _logits(fused, NAMES)
        other = copied(fused)
        with torch.no_grad():
            for model in (other, plain):
                for layer in lora_layers(model):
                    layer.lora_A["de"].weight.add_(1)
        assert_close(_logits(other, NAMES), _logits(plain, NAMES))

    def test_inference_mode_and_then_gradients(self) -> None:
        fused, plain, _ = pair()
        with torch.inference_mode():
            fused(tokens(), adapter_names=NAMES)
        for model in (fused, plain):
            model(tokens(), adapter_names=NAMES).logits.square().mean().backward()
        got, expected = (layer_of(model).lora_A["en"].weight.grad for model in (fused, plain))
        assert_close(got, expected, 1e-13)


def test_threads() -> None:
    """Layers called with names of their own, each in a thread; PEFT's hooks on a whole model know no threads."""
    fused, plain, _ = pair()
    x = torch.randn(ROWS, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    orders = [NAMES[shift:] + NAMES[:shift] for shift in range(4)]
    expected = [layer_of(plain)(x, adapter_names=names) for names in orders]
    errors: list[str] = []

    def work(index: int) -> None:
        for _ in range(20):
            with torch.no_grad():
                got = layer_of(fused)(x, adapter_names=orders[index])
            if not (got - expected[index]).norm() <= LAST_BITS * expected[index].norm():
                errors.append(f"thread {index}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not errors


# What moves no element: views, allocations, and operators that are made of others, which are counted.
_FREE = {
    "view", "reshape", "t", "transpose", "numpy_T", "expand", "expand_as", "unsqueeze", "squeeze", "slice", "select",
    "narrow", "permute", "as_strided", "split", "split_with_sizes", "unbind", "chunk", "detach", "detach_", "alias",
    "_unsafe_view", "resolve_conj", "resolve_neg", "lift_fresh", "empty", "empty_like", "empty_strided", "linear",
    "matmul", "to", "contiguous", "result_type", "item", "_local_scalar_dense", "is_nonzero",
}  # fmt: skip


def _work(call: Callable[[], object]) -> int:
    """Operators that a call runs; those within this package's, too, which a dispatch mode would not see."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call()
    names = (event.name.removeprefix("aten::") for event in profiler.events() if event.name.startswith("aten::"))
    return sum(name not in _FREE for name in names)


@pytest.mark.parametrize("length", [1, 6])
def test_operators_of_eight_adapters_are_less_than_half_of_peft_s(length: int) -> None:
    """Of the whole model, attention and norms among them; 0.41 was counted."""
    torch.manual_seed(0)
    names = [f"n{index}" for index in range(8)]
    config = {"target_modules": ARCHITECTURES["llama"][1], "init_lora_weights": False}
    configs = [peft.LoraConfig(r=r, lora_alpha=2 * r, **config) for r in (4, 5, 6, 7, 4, 5, 6, 7)]
    plain = peft.get_peft_model(ARCHITECTURES["llama"][0](), configs[0], adapter_name=names[0])
    for name, each in zip(names[1:], configs[1:], strict=True):
        plain.add_adapter(name, each)
    plain.eval()
    fused = copy.deepcopy(plain)
    pk.apply(fused)
    options = {"length": length}
    ours, theirs = (_work(lambda model=model: _logits(model, 2 * names, **options)) for model in (fused, plain))
    assert ours <= 0.5 * theirs, (ours, theirs)
