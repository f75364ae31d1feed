"""State dicts with PEFT's names in a FusedLoRALinear: which fit, and what is said of those that do not."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from peft_kernels import FusedLoRALinear
from python_ref import compare
from tests.lora.modules import K, N, lora_layer


def _peft_state(layer: FusedLoRALinear, names: dict[str, str | None] | None = None) -> dict[str, Tensor]:
    """A layer's state dict under PEFT's keys, with other names for its adapters; None leaves the name out."""
    state: dict[str, Tensor] = {"base_layer.weight": layer.weight}
    if layer.bias is not None:
        state["base_layer.bias"] = layer.bias
    for letter, factors in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
        for name, value in factors.items():
            other = (names or {}).get(name, name)
            state[f"{letter}.weight" if other is None else f"{letter}.{other}.weight"] = value
    return {key: value.detach().clone() for key, value in state.items()}


def _assert_equal(layer: FusedLoRALinear, other: FusedLoRALinear) -> None:
    want = other.state_dict()
    assert list(layer.state_dict()) == list(want)
    for key, value in layer.state_dict().items():
        compare.assert_bitwise_equal(key, value, want[key])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["default", "another", None])
def test_one_adapter_under_any_name(name: str | None, bias: bool) -> None:
    source, layer = lora_layer(0, bias=bias), lora_layer(1, bias=bias)
    state = _peft_state(source, {"default": name})
    keys = list(state)
    assert layer.load_state_dict(state) == ([], [])
    _assert_equal(layer, source)
    assert list(state) == keys, "the caller's dict was changed"


def test_several_adapters_go_by_name() -> None:
    layers = lora_layer(0), lora_layer(1)
    for layer in layers:
        layer.add_adapter("second", r=2)
        nn.init.normal_(layer.lora_B["second"])
    source, layer = layers
    layer.load_state_dict(_peft_state(source))
    _assert_equal(layer, source)


def test_one_of_several_goes_by_name_too() -> None:
    source, layer = FusedLoRALinear(K, N, r=4, adapter_name="second"), lora_layer(1)
    nn.init.normal_(source.lora_B["second"])
    before = layer.lora_B["default"].clone()
    layer.add_adapter("second", r=4)
    missing, unexpected = layer.load_state_dict(_peft_state(source), strict=False)
    assert missing == ["lora_A.default", "lora_B.default"] and not unexpected
    compare.assert_bitwise_equal("second", layer.lora_B["second"], source.lora_B["second"])
    compare.assert_bitwise_equal("default", layer.lora_B["default"], before)


def test_inside_of_a_model_and_assigned() -> None:
    source, model = lora_layer(0), nn.ModuleDict({"a": nn.ModuleDict({"q": lora_layer(1)}), "b": nn.Linear(2, 2)})
    state = {f"a.q.{key}": value for key, value in _peft_state(source, {"default": "x"}).items()}
    state |= {f"b.{key}": value for key, value in model["b"].state_dict().items()}
    model.load_state_dict(state, assign=True)
    _assert_equal(model["a"]["q"], source)
    assert model["a"]["q"].lora_B["default"].data_ptr() == state["a.q.lora_B.x.weight"].data_ptr()


@pytest.mark.parametrize("keep_base", [False, True])
def test_a_merged_layer(keep_base: bool) -> None:
    source, layer, x = lora_layer(0).eval(), lora_layer(1).eval(), torch.randn(5, K)
    layer.merge(keep_base=keep_base)
    layer.load_state_dict(_peft_state(source))
    assert layer.merged == keep_base
    torch.testing.assert_close(layer(x), source(x), rtol=1e-5, atol=1e-5)


def test_the_state_of_peft_s_own_layer() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    theirs = peft.get_peft_model(
        nn.ModuleDict({"q": nn.Linear(K, N), "head": nn.Linear(3, 3)}),
        peft.LoraConfig(r=4, target_modules=["q"], init_lora_weights=False),
        adapter_name="task",
    )
    ours = nn.ModuleDict({"q": FusedLoRALinear(K, N, r=4, lora_alpha=8), "head": nn.Linear(3, 3)})
    ours.load_state_dict(theirs.base_model.model.state_dict())
    x = torch.randn(5, K)
    torch.testing.assert_close(ours["q"](x), theirs.base_model.model["q"](x), rtol=1e-5, atol=1e-5)


def test_own_names_stay_own() -> None:
    """lora_A.weight is this package's key where an adapter is called so."""
    source, layer = (FusedLoRALinear(K, N, r=2, adapter_name="weight") for _ in range(2))
    layer.load_state_dict(source.state_dict())
    _assert_equal(layer, source)
    layer.load_state_dict(_peft_state(source))
    missing, unexpected = lora_layer().load_state_dict({"lora_A.other": torch.ones(4, K)}, strict=False)
    assert unexpected == ["lora_A.other"] and "lora_A.default" in missing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(N, K)}, r"at 'q' is given both base_layer\.weight and weight"),
        (
            {"lora_magnitude_vector.default.weight": torch.ones(N)},
            r"has no place for lora_magnitude_vector\.default",
        ),
        ({"lora_B.default.bias": torch.ones(N)}, r"at 'q' has no place for lora_B\.default\.bias"),
        ({"base_layer.bias": torch.ones(N + 1)}, r"size mismatch for q\.bias"),
        ({"lora_A.default.weight": torch.ones(2, K)}, r"size mismatch for q\.lora_A\.default"),
        ({"lora_A.default.weight": None}, r'Missing key\(s\) in state_dict: "q\.lora_A\.default"'),
        ({"base_layer.weight": None}, r'Missing key\(s\) in state_dict: "q\.weight"'),
    ],
)
def test_says_what_does_not_fit(change: dict[str, Tensor | None], message: str) -> None:
    model = nn.ModuleDict({"q": lora_layer(0)})
    model["q"].add_adapter("second", r=2)
    state = {key: value for key, value in (_peft_state(model["q"]) | change).items() if value is not None}
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict({f"q.{key}": value for key, value in state.items()})


@pytest.mark.parametrize(("name", "said"), [("third", "'third'"), (None, "one without a name")])
def test_adapters_that_the_layer_has_not(name: str | None, said: str) -> None:
    """Torch names the keys, and raises or leaves them out; a warning says in one line for all layers what to do."""
    source, model = lora_layer(0), nn.Sequential(lora_layer(1), lora_layer(1))
    for layer in (source, *model):
        layer.add_adapter("second", r=2)
    given = _peft_state(source, {"second": name})
    state = {f"{place}.{key}": value for place in (0, 1) for key, value in given.items()}
    left_out = sorted(key for key in state if key.split(".", 1)[1] not in _peft_state(source))
    message = rf"have the adapters \['default', 'second'\], and not {said}, .*; add_adapter makes one"
    with pytest.warns(UserWarning, match=message) as seen:
        missing, unexpected = model.load_state_dict(state, strict=False)
    assert len({str(warning.message) for warning in seen}) == 1
    assert sorted(unexpected) == left_out and len(left_out) == 4
    assert set(missing) == {f"{place}.lora_{letter}.second" for place in (0, 1) for letter in "AB"}
    compare.assert_bitwise_equal("B", model[1].lora_B["default"], source.lora_B["default"])
    with pytest.warns(UserWarning, match=message), pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(state)


def test_strict_false_does_not_leave_out_what_changes_the_rest() -> None:
    dora = {"lora_magnitude_vector.default.weight": torch.ones(N)}
    with pytest.raises(RuntimeError, match=re.escape("FusedLoRALinear has no place for lora_magnitude_vector")):
        lora_layer().load_state_dict(dora, strict=False)
