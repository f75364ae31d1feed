"""PEFT's layers that something happens to while merged, and those that PEFT merges: nothing is undone in silence."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft_kernels as pk
from peft_kernels.integrations import kept
from peft_kernels.integrations.peft import merging
from peft_kernels.integrations.peft.layers import FusedLoraLinear, PeftLinear
from python_ref import compare
from tests.integrations.merging import K, N, assert_bits, bits, layer_of, model_of, of_kind


def _hook(layer: Any) -> None:
    layer.base_layer.register_forward_hook(lambda *_: None)


def _hook_factor(layer: Any) -> None:
    layer.lora_B["default"].register_forward_pre_hook(lambda *_: None)


def _set(path: str, change: Callable[[Tensor], Any]) -> Callable[[Any], None]:
    def setter(layer: Any) -> None:
        part, name = path.rsplit(".", 1)
        setattr(layer.get_submodule(part), name, change(getattr(layer.get_submodule(part), name)))

    return setter


class _Sub(Tensor):
    pass


class _Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


# What PEFT merges, whatever becomes of it, and the reason that the report gives.
PEFT_MERGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "get_delta_weight of its own": (
        lambda layer: setattr(layer, "get_delta_weight", lambda name: torch.ones(N, K)),
        "its get_delta_weight was replaced",
    ),
    "hooked base": (_hook, "there are hooks inside the layer"),
    "hooked factor": (_hook_factor, "there are hooks inside the layer"),
    "tensor subclass": (
        _set("base_layer.weight", lambda weight: nn.Parameter(weight.detach().as_subclass(_Sub))),
        "a weight of it is a _Sub of torch.bfloat16 on cpu",
    ),
    "factor without memory": (
        _set("lora_A.default.weight", lambda weight: nn.Parameter(weight.to("meta"))),
        "a weight of it is a Parameter of torch.float32 on meta",
    ),
    "parametrized": (
        lambda layer: nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", _Same()),
        "its weight is no parameter",
    ),
    "factors of another rank": (
        _set("lora_A.default.weight", lambda weight: nn.Parameter(weight[:2].detach())),
        "its factors' product is not (40, 24)",
    ),
    "scaling by feature": (
        lambda layer: layer.scaling.update(default=torch.ones(K)),
        "its scaling is a Tensor",
    ),
    "no bias": (
        lambda layer: (layer.lora_bias.update(default=True), setattr(layer.base_layer, "bias", None)),
        "its base layer has no bias to merge into",
    ),
}


class TestPeftsOwn:
    """Where PEFT's code runs, results are PEFT's."""

    @pytest.mark.parametrize("case", PEFT_MERGES)
    def test_what_peft_merges(self, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
        prepare, reason = PEFT_MERGES[case]
        model = model_of()
        report = pk.apply(model)
        layer = layer_of(model)
        prepare(layer)
        called = []
        # Not on PEFT's class, where it would be another tool's.
        monkeypatch.setattr(merging, "PeftLinear", type("Peft", (), {"merge": lambda *args: called.append(args)}))
        layer.merge()
        assert called == [(layer, False, None)]
        (counted,) = report.fallback_calls
        assert counted.startswith(reason)

    def test_a_layer_moved_in_part(self) -> None:
        """Two devices, of which one is made up: the weights are asked, not the machine."""
        model = model_of()
        layer = layer_of(model)

        class Elsewhere(nn.Parameter):
            device = torch.device("cuda", 1)

        weights = [layer.base_layer.weight, torch.Tensor._make_subclass(Elsewhere, layer.lora_A["default"].weight.data)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(merging, "is_plain", lambda _: True)
            assert "several devices" in str(merging._why_not_weights(layer, ["default"], weights))

    @pytest.mark.parametrize("method", ["merge", "unmerge", "get_delta_weight"])
    def test_another_tool_s_methods(self, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model, plain = model_of(), model_of()
        report = pk.apply(model)
        original = getattr(PeftLinear, method)
        called = []
        monkeypatch.setattr(
            PeftLinear, method, lambda *args, **kwargs: (called.append(method), original(*args, **kwargs))[1]
        )
        for each in (model, plain):
            each.merge_adapter()
        assert_bits(layer_of(model), bits(layer_of(plain)))
        for each in (model, plain):
            each.unmerge_adapter()
        assert_bits(layer_of(model), bits(layer_of(plain)))
        assert f"Linear.{method} was replaced, so that it merges" in report.fallback_calls and called

    @pytest.mark.filterwarnings("ignore:.*additionally merging")
    def test_variants(self) -> None:
        """Also where one is merged into a weight that a plain adapter was merged into here."""
        for steps in (["dora"], ["default", "dora"], ["default+dora"]):
            outcomes = []
            for ours in (False, True):
                model = model_of(torch.float32)
                model.add_adapter("dora", peft.LoraConfig(target_modules=["0"], r=2, use_dora=True))
                layer = layer_of(model)
                torch.manual_seed(3)
                layer.lora_B["dora"].weight.data.normal_(std=0.1)
                before = bits(layer)
                report = pk.apply(model) if ours else None
                for step in steps:
                    layer.merge(adapter_names=step.split("+"))
                merged = bits(layer)
                assert kept.of(layer) is None
                layer.unmerge()
                outcomes.append([*merged, *bits(layer), *before])
            torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-6, atol=1e-7)
            assert "its adapter is a DoraLinearVariant, which PEFT merges" in report.fallback_calls

    @pytest.mark.parametrize("comes", ["before apply", "from a file"])
    @pytest.mark.filterwarnings("ignore:.*additionally merging")
    def test_merged_elsewhere(self, comes: str) -> None:
        """Nothing was kept, and another merge on top of it keeps nothing either."""
        model, plain = model_of(adapters=2), model_of(adapters=2)
        for each in (model, plain):
            layer_of(each).merge(adapter_names=["default"])
        if comes == "from a file":
            model = pickle.loads(pickle.dumps(model))
        with pytest.warns(UserWarning, match="adapters are merged into the weight"):
            report = pk.apply(model)
        layer = layer_of(model)
        for each in (layer, layer_of(plain)):
            each.merge(adapter_names=["a1"])
        assert kept.of(layer) is None
        for each in (layer, layer_of(plain)):
            each.unmerge()
        assert_bits(layer, bits(layer_of(plain)))
        assert dict(report.fallback_calls) == {merging._NOT_KEPT.text: 1}


def _new_parameter(base: nn.Linear) -> None:
    base.weight = nn.Parameter(base.weight.detach() + 1, requires_grad=False)


def _changed_in_place(base: nn.Linear) -> None:
    with torch.no_grad():
        base.weight[3, 5] += 1


def _changed_elsewhere(base: nn.Linear) -> None:
    """By another module that shares its memory."""
    nn.Parameter(base.weight.detach(), requires_grad=False).data[3, 5] += 1


def _new_data(base: nn.Linear) -> None:
    base.weight.data = base.weight.data + 1


def _loaded(base: nn.Linear) -> None:
    base.load_state_dict({name: value + 1 for name, value in base.state_dict().items()})


CHANGES = {
    "in place": _changed_in_place,
    "through .data": lambda base: base.weight.data[3:4].mul_(2),
    "in shared memory": _changed_elsewhere,
    "new data": _new_data,
    "new parameter": _new_parameter,
    "loaded": _loaded,
    "cast": lambda base: base.to(torch.float16),
}
KEEPS = {
    "new parameter of the same bits": lambda base: setattr(
        base, "weight", nn.Parameter(base.weight.detach().clone(), requires_grad=False)
    ),
    "there and back": lambda base: base.float().bfloat16(),
    "loaded as it is": lambda base: base.load_state_dict(copy.deepcopy(base.state_dict())),
    "written with its own bits": lambda base: base.weight.data.copy_(base.weight.data.clone()),
}


class TestChangedWhileMerged:
    @pytest.mark.parametrize("change", CHANGES)
    def test_a_changed_weight_is_not_undone(self, change: str) -> None:
        """PEFT subtracts, and what somebody wrote stays; the user is told."""
        model, plain = model_of(), model_of()
        report = pk.apply(model)
        layers = layer_of(model), layer_of(plain)
        for layer in layers:
            layer.merge()
            CHANGES[change](layer.base_layer)
        with pytest.warns(UserWarning, match="unmerge: its weight changed while it was merged, so that PEFT unmerges"):
            layers[0].unmerge()
        layers[1].unmerge()
        assert_bits(layers[0], bits(layers[1]))
        assert dict(report.fallback_calls) == {merging._CHANGED.text: 1} and kept.of(layers[0]) is None

    def test_a_changed_bias_is_not_undone(self) -> None:
        """Where it was merged; else it is nobody's business."""
        for kind, is_undone in (("bias", False), ("plain", True)):
            model = of_kind(kind)
            pk.apply(model)
            layer = layer_of(model)
            before = bits(layer)
            layer.merge()
            layer.base_layer.bias.data.add_(8)
            with contextlib.nullcontext() if is_undone else pytest.warns(UserWarning, match="changed while"):
                layer.unmerge()
            assert torch.equal(bits(layer)[0], before[0]) == is_undone
            assert float((bits(layer)[1] - before[1]).float().mean()) == pytest.approx(8, abs=0.1)

    @pytest.mark.filterwarnings("ignore:.*additionally merging")
    def test_a_changed_weight_is_not_kept_by_the_next_merge(self) -> None:
        model = model_of(torch.float32, adapters=2)
        pk.apply(model)
        layer = layer_of(model)
        before = bits(layer)
        layer.merge(adapter_names=["default"])
        layer.base_layer.weight.data.add_(8)
        layer.merge(adapter_names=["a1"])
        assert kept.of(layer) is None
        layer.unmerge()
        torch.testing.assert_close(bits(layer)[0], before[0] + 8, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("change", KEEPS)
    def test_the_same_bits_elsewhere_are_no_change(self, change: str) -> None:
        model = model_of()
        report = pk.apply(model)
        layer = layer_of(model)
        before = bits(layer)
        layer.merge()
        KEEPS[change](layer.base_layer)
        layer.unmerge()
        assert_bits(layer, before)
        assert not report.fallback_calls

    def test_a_list_of_merged_adapters_that_others_changed(self) -> None:
        model = model_of(torch.float32, adapters=2)
        pk.apply(model)
        layer = layer_of(model)
        before = bits(layer)
        layer.merge()
        layer.merged_adapters.remove("a1")
        expected = before[0] + layer.get_delta_weight("a1").detach()
        with pytest.warns(UserWarning, match="changed while"):
            layer.unmerge()
        torch.testing.assert_close(bits(layer)[0], expected, rtol=1e-5, atol=1e-6)
        assert not layer.merged

    def test_moved_models(self) -> None:
        model = model_of()
        pk.apply(model)
        layer = layer_of(model)
        before = bits(layer)
        layer.merge()
        model.to("cpu").requires_grad_(False)
        assert kept.of(layer) is not None
        layer.unmerge()
        assert_bits(layer, before)
        layer.merge()
        with pytest.warns(UserWarning, match="changed while"):
            model.to(torch.float32).unmerge_adapter()
        assert layer.base_layer.weight.dtype == torch.float32
        layer.merge()
        model.to("meta")
        assert kept.of(layer) is None

    def test_tied_weights(self) -> None:
        """Another module's weight follows; two layers on one weight give it back in the order that undoes theirs."""
        embedding = nn.Embedding(N, K)
        model = model_of(base=nn.Linear(K, N))
        layer_of(model).base_layer.weight = embedding.weight = nn.Parameter(embedding.weight.detach().bfloat16())
        first, second = layer_of(model), copy.deepcopy(layer_of(model))
        second.base_layer.weight = embedding.weight
        second.lora_B["default"].weight.data.mul_(3)
        both = nn.ModuleList([first, second])
        report = pk.apply(both)
        before = embedding.weight.detach().clone()
        for layer in (first, second):
            layer.merge(safe_merge=layer is second)
        assert not torch.equal(embedding.weight, before)
        second.unmerge()
        first.unmerge()
        compare.assert_bitwise_equal("weight", embedding.weight.detach(), before)
        first.merge()
        second.merge()
        with pytest.warns(UserWarning, match="changed while"):
            first.unmerge()
        with pytest.warns(UserWarning, match="changed while"):
            second.unmerge()
        torch.testing.assert_close(embedding.weight.detach(), before, rtol=0, atol=0.05)
        assert report.fallback_calls[merging._CHANGED.text] == 2


class TestCopiesAndFiles:
    def test_deepcopy_while_merged(self) -> None:
        model = model_of()
        pk.apply(model, keep_base="host")
        layer = layer_of(model)
        before = bits(layer)
        layer.merge()
        copied = copy.deepcopy(model)
        assert type(layer_of(copied)) is FusedLoraLinear and kept.of(layer_of(copied)) is kept.of(layer)
        for each in (copied, model):
            each.unmerge_adapter()
            assert_bits(layer_of(each), before)
        assert kept.chosen(layer_of(copied)) == kept.chosen(copy.copy(layer)) == "host"

    @pytest.mark.filterwarnings("ignore:Already unmerged")
    def test_shallow_copy_while_merged(self) -> None:
        """It has the same weight and the same list of merged adapters, and no claim to what is kept."""
        model = model_of()
        pk.apply(model)
        layer = layer_of(model)
        layer.merge()
        copied = copy.copy(layer)
        assert copied.merged_adapters is layer.merged_adapters and kept.of(copied) is None
        before = bits(layer)
        copied.unmerge()
        layer.unmerge()
        assert not layer.merged and not torch.equal(bits(layer)[0], before[0]) and kept.of(layer) is None

    @pytest.mark.parametrize("how", ["pickle", "revert"])
    def test_peft_unmerges_what_leaves(self, how: str) -> None:
        """A pickled or reverted layer is PEFT's: merged, and its unmerge subtracts from the merged weight."""
        model = model_of(torch.bfloat16)
        report = pk.apply(model)
        layer = layer_of(model)
        before, state = bits(layer), set(model.state_dict())
        layer.merge()
        assert set(model.state_dict()) == state
        merged = bits(layer)
        if how == "pickle":
            data = pickle.dumps(model)
            assert b"peft_kernels" not in data
            model = pickle.loads(data)
            layer.unmerge()
            assert_bits(layer, before)
        else:
            unmerge = layer.unmerge
            pk.revert(model)
            assert kept.of(layer) is None
        layer = layer_of(model)
        assert type(layer) is PeftLinear and layer.merged_adapters == ["default"]
        expected = merged[0] - layer.get_delta_weight("default").detach().bfloat16()
        # What a tool has kept of a fused layer's methods is PEFT's after revert.
        (layer.unmerge if how == "pickle" else unmerge)()
        compare.assert_bitwise_equal("weight", bits(layer)[0], expected)
        assert not report.fallback_calls
        # Off by the rounding of the merged weight, and of the update and the difference.
        slack = 2 * torch.finfo(torch.bfloat16).eps * float(merged[0].abs().max())
        assert 0 < float((bits(layer)[0].float() - before[0].float()).abs().max()) <= slack

    def test_a_kept_merge_after_revert(self) -> None:
        model = model_of()
        pk.apply(model)
        layer = layer_of(model)
        merge = layer.merge
        pk.revert(model)
        merge()
        assert layer.merged_adapters == ["default"] and kept.of(layer) is None


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["device", "host"])
def test_on_a_gpu(where: Any) -> None:
    """Also moved to the host while merged: what is kept beside the weight follows."""
    model = model_of(adapters=2).cuda()
    pk.apply(model, keep_base=where)
    layer = layer_of(model)
    before = bits(layer)
    for moves in (False, True):
        model.merge_adapter()
        original = kept.of(layer).originals["weight"]
        assert original.is_cuda == (where == "device") and original.is_pinned() == (where == "host")
        if moves:
            model.cpu()
            assert not kept.of(layer).originals["weight"].is_cuda
        model.unmerge_adapter()
        assert_bits(layer, [each.to(layer.base_layer.weight.device) for each in before])
