"""apply and revert on AdapterHub's models, and AdapterHub's own features on what was applied to."""

from __future__ import annotations

import pytest

pytest.importorskip("adapters", reason="AdapterHub needs an older transformers; `make test-adapterhub` runs these")

import copy
import io
from pathlib import Path

import adapters
import torch
from adapters.methods.modeling import Adapter, ParallelAdapter

import peft_kernels as pk
from peft_kernels.integrations.adapterhub.layers import FusedAdapter
from tests.adapterhub.models import HIDDEN, KINDS, activate, base, build, randomize, run, tokens
from tests.adapterhub.parity import adapters_of, assert_bitwise, assert_close, assert_same, pair


class TestApply:
    def test_is_idempotent(self) -> None:
        fused, plain, first = pair()
        assert pk.apply(fused) == first
        assert_same(fused, plain)

    @pytest.mark.parametrize("kind", KINDS)
    def test_revert_leaves_no_trace(self, kind: str) -> None:
        model = build("bert", kind)
        before = {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()}
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        expected = run(model)[0]
        pk.apply(model)
        run(model)
        pk.revert(model)
        assert {name: (type(module), set(module.__dict__)) for name, module in model.named_modules()} == before
        for name, tensor in model.state_dict().items():
            assert_bitwise(name, tensor, state[name])
        assert_bitwise("logits", run(model)[0], expected)

    def test_strict_changes_nothing(self) -> None:
        model = build("bert", "seq", "a")
        model.add_adapter("b", config=adapters.SeqBnConfig(ln_after=True))
        with pytest.raises(
            pk.UnsupportedError, match=r"(?s)strict, and not everything.*2 not fused: it has a layer norm"
        ):
            pk.apply(model, strict=True)
        assert {type(module) for module in adapters_of(model)} == {Adapter}
        assert len(pk.apply(build("bert", "parallel"), strict=True).fused) == 2

    def test_without_adapters_nothing_is_done(self) -> None:
        with pytest.warns(UserWarning, match="nothing in BertForMaskedLM was put on these kernels"):
            assert pk.apply(base()).fused == ()

    def test_report_prints(self) -> None:
        fused, _, report = pair(dropout=0.5)
        run(fused.train())
        assert str(report).splitlines() == [
            "peft_kernels: 2 modules fused, 0 not",
            "  2 calls fell back: its dropout is active",
        ]

    def test_hook_wrapper_that_came_after(self) -> None:
        """accelerate keeps the bound method in ``_old_forward``."""
        fused, plain, _ = pair()
        for adapter in adapters_of(fused):
            adapter._old_forward = adapter.forward
            adapter.forward = lambda *args, adapter=adapter, **kwargs: adapter._old_forward(*args, **kwargs)
        assert_same(fused, plain)
        pk.revert(fused)
        assert_same(fused, plain, assert_bitwise)


class TestAdapterHubFeatures:
    @pytest.mark.parametrize("setup", [None, "a"])
    def test_disabled_adapters(self, setup: str | None) -> None:
        fused, plain, _ = pair("bert", "double")
        for model in (fused, plain):
            model.set_active_adapters(None)
        (got, _), (expected, _) = run(fused), run(plain)
        assert_bitwise("logits", got, expected)
        assert_bitwise("logits", got, base()(tokens()).logits.detach())
        with adapters.AdapterSetup(setup):
            assert_same(fused, plain)

    @pytest.mark.parametrize("kind", KINDS)
    def test_training(self, kind: str) -> None:
        fused, plain, report = pair("bert", kind, "ab", scaling=0.5)
        histories = []
        for model in (fused, plain):
            model.train_adapter("b")
            model.train()
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
            losses = []
            for step in range(3):
                ids = tokens(seed=step)
                optimizer.zero_grad()
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            histories.append([torch.stack(losses), *(p.detach() for p in model.parameters())])
        assert histories[0][0][2] < histories[0][0][0]
        for index, (got, expected) in enumerate(zip(*histories, strict=True)):
            assert_close(str(index), got, expected)
        assert not report.fallback_calls

    @pytest.mark.parametrize("safe", [False, True])
    @pytest.mark.parametrize("kind", KINDS)
    def test_save_and_load(self, kind: str, safe: bool, tmp_path: Path) -> None:
        """Both ways between a model that was applied to and one that was not."""
        fused, plain, _ = pair("bert", kind, seed=2)
        for model, other in ((fused, plain), (plain, fused)):
            folder = tmp_path / type(adapters_of(model)[0]).__name__
            model.save_adapter(str(folder), "a", use_safetensors=safe, with_head=False)
            other.load_adapter(str(folder), load_as="loaded", use_safetensors=safe)
            other.set_active_adapters("loaded")
            pk.apply(other)
            assert_close("logits", run(other)[0], run(model)[0])
        assert {type(module) for module in adapters_of(fused)} == {type(module) for module in adapters_of(plain)}

    def test_average_delete_and_add(self) -> None:
        fused, plain, _ = pair("bert", "double", "a", reduction_factor=4)
        for model in (fused, plain):
            model.add_adapter("b", config=adapters.DoubleSeqBnConfig(reduction_factor=4))
            randomize(model, 1)
            model.average_adapter("c", ["a", "b"], weights=[0.3, 0.7])
            model.delete_adapter("a")
            activate(model, "c")
        assert_same(fused, plain, assert_bitwise)
        assert {type(module) for module in adapters_of(fused)} == {Adapter}
        assert len(pk.apply(fused).fused) == 8
        assert_same(fused, plain)

    def test_deepcopy_and_torch_save(self) -> None:
        """Of the adapters' layers: AdapterHub makes the classes of its models while running, which no pickle finds."""
        fused, plain, _ = pair("bert", "double")
        x = torch.randn(2, 3, HIDDEN)
        for adapter, original in zip(adapters_of(fused), adapters_of(plain), strict=True):
            buffer = io.BytesIO()
            torch.save(adapter, buffer)
            buffer.seek(0)
            loaded = torch.load(buffer, weights_only=False)
            for copied, cls in ((copy.deepcopy(adapter), FusedAdapter), (loaded, Adapter)):
                assert type(copied) is cls
                assert_close("output", copied(x, x)[0], original(x, x)[0])
        assert_same(copy.deepcopy(fused), plain)

    @pytest.mark.parametrize(("architecture", "kind"), [("bert", "seq"), ("llama", "double"), ("bert", "parallel")])
    def test_gradient_checkpointing(self, architecture: str, kind: str) -> None:
        """The one kind that AdapterHub lets through."""
        fused, _, report = pair(architecture, kind)
        fused.train()
        expected, expected_gradients = run(fused)
        fused.enable_input_require_grads()
        fused.gradient_checkpointing_enable({"use_reentrant": False})
        assert any(getattr(module, "gradient_checkpointing", False) for module in fused.modules())
        got, gradients = run(fused)
        assert_bitwise("logits", got, expected)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            assert_bitwise(name, gradient, expected_gradients[name])
        assert not report.fallback_calls

    def test_layer_of_another_shape_in_parallel_adapter(self) -> None:
        """A parallel adapter's second argument is not read, whatever it is."""
        fused, plain, report = pair("bert", "parallel")
        x = torch.randn(2, 3, HIDDEN)
        got, expected = (adapters_of(model)[0](x, None)[0] for model in (fused, plain))
        assert_close("output", got, expected)
        assert not report.fallback_calls and isinstance(adapters_of(fused)[0], ParallelAdapter)
