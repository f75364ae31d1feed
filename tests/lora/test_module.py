"""FusedLoRALinear: adapters, merging, what modules must survive, and wrong use."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels import FusedLoRALinear
from python_ref import compare

K, N = 24, 20


# New in torch 2.11.
_LINEAR_LOSSES = [(lambda: nn.LinearCrossEntropyLoss(K, 5), "linear")] if hasattr(nn, "LinearCrossEntropyLoss") else []


def _layer(seed: int = 0, **options: object) -> FusedLoRALinear:
    """A layer whose adapter does something: B is not zero."""
    torch.manual_seed(seed)
    layer = FusedLoRALinear(K, N, r=4, **options)
    with torch.no_grad():
        for parameter in layer.lora_B.values():
            parameter.normal_()
    return layer


def _expected(layer: FusedLoRALinear, x: Tensor) -> Tensor:
    """The layer's equation in float64, with the active adapter and no dropout."""
    y = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    name = layer.active_adapter
    if name is not None:
        update = x.double() @ layer.lora_A[name].double().t() @ layer.lora_B[name].double().t()
        y = y + layer.scaling[name] * update
    return y


def test_fresh_layer_is_its_base() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(K, N)
    layer = FusedLoRALinear.from_linear(linear, r=4)
    x = torch.randn(7, K)
    compare.assert_bitwise_equal("y", layer(x).detach(), linear(x).detach())
    assert torch.count_nonzero(layer.lora_B["default"]) == 0
    assert torch.count_nonzero(layer.lora_A["default"]) > 0


def test_from_linear_shares_and_freezes() -> None:
    linear = nn.Linear(K, N).eval()
    layer = FusedLoRALinear.from_linear(linear, r=4)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not layer.training
    trainable = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trainable == {"lora_A.default", "lora_B.default"}


def test_checkpoint_of_linear_loads() -> None:
    linear, layer = nn.Linear(K, N), _layer()
    missing, unexpected = layer.load_state_dict(linear.state_dict(), strict=False)
    assert (missing, unexpected) == (["lora_A.default", "lora_B.default"], [])
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)


@pytest.mark.parametrize("shape", [(K,), (3, K), (2, 3, K), (0, K)])
@pytest.mark.parametrize("bias", [False, True])
def test_forward(shape: tuple[int, ...], bias: bool) -> None:
    layer, x = _layer(bias=bias), torch.randn(shape)
    torch.testing.assert_close(layer(x).double(), _expected(layer, x), rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_alone() -> None:
    layer, x = _layer(lora_dropout=0.5), torch.randn(5, K)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x).double(), _expected(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling(rslora: bool) -> None:
    layer = FusedLoRALinear(K, N, r=16, lora_alpha=8, use_rslora=rslora)
    assert layer.scaling["default"] == (8 / math.sqrt(16) if rslora else 8 / 16)


@pytest.mark.parametrize(
    ("dtype", "asked", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
)
def test_adapter_dtype(dtype: torch.dtype, asked: torch.dtype | None, expected: torch.dtype) -> None:
    layer = FusedLoRALinear(K, N, dtype=dtype, adapter_dtype=asked)
    layer.add_adapter("second")
    assert {parameter.dtype for parameter in (*layer.lora_A.values(), *layer.lora_B.values())} == {expected}
    assert layer(torch.randn(3, K, dtype=dtype)).dtype == dtype


class TestAdapters:
    def test_switching_copies_nothing(self) -> None:
        layer, x = _layer(), torch.randn(5, K)
        first = layer(x).detach()
        layer.add_adapter("second", r=2, lora_alpha=4)
        layer.lora_B["second"].data.normal_()
        compare.assert_bitwise_equal("adding changes nothing", layer(x).detach(), first)
        before = {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
        for name in ("second", None, "default"):
            layer.set_adapter(name)
            assert layer.active_adapter == name
            torch.testing.assert_close(layer(x).double(), _expected(layer, x), rtol=1e-5, atol=1e-5)
        assert {name: parameter.data_ptr() for name, parameter in layer.named_parameters()} == before
        compare.assert_bitwise_equal("back again", layer(x).detach(), first)

    def test_no_adapter_is_the_base(self) -> None:
        layer, x = _layer(), torch.randn(5, K)
        layer.set_adapter(None)
        compare.assert_bitwise_equal("y", layer(x), F.linear(x, layer.weight, layer.bias))

    def test_only_the_active_one_gets_gradients(self) -> None:
        layer = _layer()
        layer.add_adapter("second", r=2)
        layer(torch.randn(5, K)).sum().backward()
        got = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
        assert got == {"lora_A.default", "lora_B.default"}

    def test_delete(self) -> None:
        layer = _layer()
        layer.add_adapter("second")
        layer.delete_adapter("second")
        assert set(layer.scaling) == set(layer.lora_A) == set(layer.lora_B) == {"default"}

    @pytest.mark.parametrize(
        ("action", "error", "message"),
        [
            (lambda layer: layer.set_adapter("x"), KeyError, r"no adapter 'x'; there are \['default'\]"),
            (lambda layer: layer.delete_adapter("x"), KeyError, "no adapter 'x'"),
            (lambda layer: layer.delete_adapter("default"), ValueError, "'default' is active; call set_adapter"),
            (lambda layer: layer.add_adapter("default"), ValueError, "an adapter 'default' already"),
            (lambda layer: layer.add_adapter("a.b"), ValueError, "without dots, got 'a.b'"),
            (lambda layer: layer.add_adapter(""), ValueError, "non-empty string"),
            (lambda layer: layer.add_adapter("x", r=0), ValueError, "r must be an int of at least 1, got 0"),
            (lambda layer: layer.add_adapter("x", r=1.5), ValueError, "r must be an int of at least 1, got 1.5"),
            (
                lambda layer: layer.add_adapter("x", lora_alpha="16"),
                ValueError,
                "lora_alpha must be a finite number, got '16'",
            ),
            *(
                (
                    partial(FusedLoRALinear.add_adapter, name=name),
                    ValueError,
                    f"no attribute of nn.ParameterDict, got '{name}'",
                )
                for name in (
                    "train",
                    "keys",
                    "half",
                    "training",
                    "_keys",
                    "_parameters",
                    "__class__",
                    "reset_parameters",
                )
            ),
            (lambda layer: layer.add_adapter(1), ValueError, "non-empty string without dots, got 1"),
            (lambda layer: layer.unmerge(), ValueError, "is not merged"),
        ],
    )
    def test_wrong_use_changes_nothing(
        self, action: Callable[[FusedLoRALinear], None], error: type[Exception], message: str
    ) -> None:
        layer = _layer()
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        with pytest.raises(error, match=message):
            action(layer)
        after = layer.state_dict()
        assert list(after) == list(before)
        for name, tensor in before.items():
            compare.assert_bitwise_equal(name, after[name], tensor)
        assert layer.active_adapter == "default" and set(layer.scaling) == {"default"}


class TestMerge:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_merged_weight_is_rounded_once(self, dtype: torch.dtype) -> None:
        """W + s B A accumulates in float32 (or float64) and is rounded to the weight's dtype at the end."""
        layer = _layer(dtype=dtype).eval()
        weight = layer.weight.clone()
        a, b = layer.lora_A["default"].double(), layer.lora_B["default"].double()
        exact = weight.double() + layer.scaling["default"] * b @ a
        layer.merge()
        x = torch.eye(K, dtype=dtype)
        merged = (layer(x) - layer.bias).t() if dtype == torch.float64 else layer._merged_weight
        # Half an eps of the largest addend for the last rounding, as much again for a float32 sum of five terms.
        slack = 2 * torch.finfo(dtype).eps * exact.abs().max()
        assert (merged.double() - exact).abs().max() <= slack

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_unmerge_restores_every_bit(self, dtype: torch.dtype) -> None:
        layer, x = _layer(dtype=dtype), torch.randn(5, K, dtype=dtype)
        weight, before = layer.weight.clone(), layer(x).detach()
        pointer = layer.weight.data_ptr()
        layer.merge()
        assert layer.merged and layer.weight.data_ptr() == pointer
        compare.assert_bitwise_equal("weight while merged", layer.weight, weight)
        layer.unmerge()
        assert not layer.merged
        compare.assert_bitwise_equal("weight", layer.weight, weight)
        compare.assert_bitwise_equal("y", layer(x).detach(), before)

    def test_merged_forward_is_one_product(self) -> None:
        layer, x = _layer(lora_dropout=0.5), torch.randn(5, K)
        layer.eval()
        apart = layer(x).detach()
        layer.merge()
        torch.testing.assert_close(layer(x), apart, rtol=1e-5, atol=1e-5)
        layer.train().requires_grad_(False)
        compare.assert_bitwise_equal("no dropout is left", layer(x), layer(x))

    def test_overwriting_keeps_no_copy(self) -> None:
        layer, x = _layer().eval(), torch.randn(5, K)
        apart, pointer = layer(x).detach(), layer.weight.data_ptr()
        layer.merge(keep_base=False)
        assert layer.merged and layer.weight.data_ptr() == pointer and layer._merged_weight is None
        torch.testing.assert_close(layer(x), apart, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match=r"merge\(keep_base=False\) overwrote the base weight"):
            layer.unmerge()

    def test_checkpoint_of_a_merged_layer_is_that_of_the_base(self) -> None:
        layer = _layer()
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        layer.merge()
        assert list(layer.state_dict()) == list(before)
        for name, tensor in layer.state_dict().items():
            compare.assert_bitwise_equal(name, tensor, before[name])

    @pytest.mark.parametrize(
        ("action", "message"),
        [
            (lambda layer: layer.merge(), "'default' is merged already"),
            (lambda layer: layer.set_adapter("second"), r"call unmerge\(\) before set_adapter\('second'\)"),
            (lambda layer: layer.set_adapter(None), r"call unmerge\(\) before set_adapter\(None\)"),
            (lambda layer: layer.delete_adapter("default"), "is active"),
        ],
    )
    def test_a_merged_layer_refuses(self, action: Callable[[FusedLoRALinear], None], message: str) -> None:
        layer, x = _layer().eval(), torch.randn(5, K)
        layer.add_adapter("second")
        layer.merge()
        before = layer(x)
        with pytest.raises(ValueError, match=message):
            action(layer)
        assert layer.merged and layer.active_adapter == "default"
        compare.assert_bitwise_equal("y", layer(x), before)

    def test_nothing_to_merge(self) -> None:
        layer = _layer()
        layer.set_adapter(None)
        with pytest.raises(ValueError, match="no active adapter to merge"):
            layer.merge()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be an int of at least 1, got 0"),
        ({"r": True}, "r must be an int of at least 1, got True"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"lora_dropout": -0.1}, r"lora_dropout must be in \[0, 1\), got -0.1"),
        ({"lora_dropout": "0.1"}, r"lora_dropout must be in \[0, 1\), got '0.1'"),
        ({"lora_alpha": "16"}, "lora_alpha must be a finite number, got '16'"),
        ({"lora_alpha": math.nan}, "lora_alpha must be a finite number, got nan"),
        ({"adapter_dtype": torch.int8}, "adapter_dtype must be one of torch.float32, .*, got torch.int8"),
        ({"adapter_dtype": "float32"}, "adapter_dtype must be one of torch.float32, .*, got 'float32'"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedLoRALinear(K, N, **options)
    linear = nn.Linear(K, N)
    with pytest.raises(ValueError, match=message):
        FusedLoRALinear.from_linear(linear, **options)
    assert linear.weight.requires_grad, "a refused layer was frozen"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8.0, 6), "in_features must be an int of at least 0, got 8.0"),
        ((8, "6"), "out_features must be an int of at least 0, got '6'"),
        ((8, -6), "out_features must be an int of at least 0, got -6"),
    ],
)
def test_wrong_sizes(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"FusedLoRALinear: {message}"):
        FusedLoRALinear(*arguments)
    with pytest.raises(ValueError, match=r"dtype must be one of torch\.float32, .*, got torch\.int32"):
        FusedLoRALinear(8, 6, dtype=torch.int32)


class _Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _Renamed(nn.Linear):
    """A subclass that computes nothing of its own."""


def _with_forward(linear: nn.Linear) -> nn.Linear:
    linear.forward = lambda x: x
    return linear


def _hooked(register: str, linear: nn.Linear) -> nn.Linear:
    getattr(linear, register)(lambda *args: None)
    return linear


def _packed(linear: nn.Linear) -> nn.Linear:
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
    return linear


_HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda linear: nn.Conv1d(2, 2, 1), "must be an nn.Linear, got Conv1d"),
        (lambda linear: linear.weight, "must be an nn.Linear, got Parameter"),
        (lambda linear: _layer(), "must be an nn.Linear, got FusedLoRALinear"),
        (lambda linear: _Doubled(K, N), "must have nn.Linear's own forward, got a _Doubled"),
        (_with_forward, "must have nn.Linear's own forward, got a Linear"),
        (lambda linear: nn.MultiheadAttention(8, 2).out_proj, "reads its out_proj's weight and never calls it"),
        *((partial(_hooked, register), "must have no hooks, which would be lost, got _") for register in _HOOKS),
        (nn.utils.parametrizations.weight_norm, "must have a parameter weight, got one that is computed"),
        (nn.utils.spectral_norm, "must have a parameter weight"),
        (lambda linear: prune.l1_unstructured(linear, "bias", 0.5), "must have a parameter bias"),
        (
            lambda linear: nn.LazyLinear(N),
            "must have a floating weight that is a plain tensor, got UninitializedParameter",
        ),
        (_packed, "must have a floating weight that is a plain tensor, got Parameter of torch.int8"),
    ],
)
def test_from_linear_refuses_what_does_more(make: Callable[[nn.Linear], nn.Module], message: str) -> None:
    given = make(nn.Linear(K, N))
    with pytest.raises(ValueError, match=f"FusedLoRALinear: linear .*{message}"):
        FusedLoRALinear.from_linear(given)
    if not isinstance(given, (Tensor, FusedLoRALinear)) and given.weight.is_floating_point():
        assert all(parameter.requires_grad for parameter in given.parameters()), "a refused layer was frozen"


def test_from_linear_takes_a_subclass_that_computes_the_same() -> None:
    linear, x = _Renamed(K, N), torch.randn(3, K)
    assert torch.equal(FusedLoRALinear.from_linear(linear)(x), linear(x))


def _saved(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("state", ["apart", "merged", "overwritten", "none active"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), _saved])
def test_copies(duplicate: Callable[[nn.Module], nn.Module], state: str) -> None:
    layer, x = _layer(lora_dropout=0.1).eval(), torch.randn(5, K)
    layer.add_adapter("second", r=2)
    if state == "none active":
        layer.set_adapter(None)
    elif state != "apart":
        layer.merge(keep_base=state == "merged")
    other = duplicate(layer)
    compare.assert_bitwise_equal("y", other(x).detach(), layer(x).detach())
    assert repr(other) == repr(layer)
    assert other.scaling == layer.scaling and other.scaling is not layer.scaling
    if state == "merged":
        other.unmerge()
        assert layer.merged
        compare.assert_bitwise_equal("weight", other.weight, layer.weight)


@pytest.mark.parametrize("merged", [False, True])
def test_moves_with_to(merged: bool) -> None:
    layer = _layer().eval()
    if merged:
        layer.merge()
    layer.to(torch.bfloat16)
    assert {tensor.dtype for tensor in (*layer.parameters(), *layer.buffers())} == {torch.bfloat16}
    assert layer(torch.randn(3, K, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_state_dict_round_trip() -> None:
    layer, other, x = _layer(0), _layer(1), torch.randn(5, K)
    other.load_state_dict(layer.state_dict())
    compare.assert_bitwise_equal("y", other(x).detach(), layer(x).detach())


def _changed(change: str, layer: FusedLoRALinear) -> None:
    """One way of changing what a merged weight was made from."""
    other = _layer(1)
    if change == "load":
        layer.load_state_dict(other.state_dict())
    elif change == "assign":
        layer.load_state_dict(other.state_dict(), assign=True)
    elif change == "optimizer":
        parameters = [layer.lora_A["default"], layer.lora_B["default"]]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        torch.optim.AdamW(parameters, lr=0.1).step()
    elif change == "scaling":
        layer.scaling["default"] *= 2
    elif change == "parameter":
        layer.lora_B["default"] = other.lora_B["default"]
    else:
        with torch.no_grad():
            layer.get_parameter(change).add_(1)


_CHANGES = ("load", "assign", "optimizer", "scaling", "parameter", "weight", "lora_A.default", "lora_B.default")


@pytest.mark.parametrize("duplicate", [lambda layer: layer, copy.deepcopy, _saved])
@pytest.mark.parametrize("change", _CHANGES)
def test_merged_weight_follows_every_change(change: str, duplicate: Callable[[nn.Module], nn.Module]) -> None:
    layer, x = _layer().eval(), torch.randn(5, K)
    layer.merge()
    before = layer(x)
    _changed(change, layer)
    layer = duplicate(layer)
    torch.testing.assert_close(layer(x).double(), _expected(layer, x), rtol=1e-5, atol=1e-5)
    assert layer.merged and not torch.equal(layer(x), before)
    pointer = layer._merged_weight.data_ptr()
    layer(x)
    assert layer._merged_weight.data_ptr() == pointer, "merged anew without a change"


def test_compiled_merged_layer_follows_a_loaded_state() -> None:
    torch._dynamo.reset()
    layer, x = _layer().eval(), torch.randn(5, K)
    layer.merge()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    compiled(x)
    layer.load_state_dict(_layer(1).state_dict())
    torch.testing.assert_close(compiled(x).double(), _expected(layer, x), rtol=1e-5, atol=1e-5)


def test_merged_in_inference_mode_serves_outside_of_it() -> None:
    layer, x = _layer().eval(), torch.randn(5, K, requires_grad=True)
    with torch.inference_mode():
        layer.merge()
    layer(x).sum().backward()
    assert x.grad is not None


class TestOverwritten:
    def _overwritten(self) -> FusedLoRALinear:
        layer = _layer().eval()
        layer.merge(keep_base=False)
        return layer

    def test_its_state_is_what_it_computes(self) -> None:
        layer, x = nn.Sequential(self._overwritten()), torch.randn(5, K)
        fresh = nn.Sequential(FusedLoRALinear(K, N, r=4))
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(fresh(x), layer(x))
        assert torch.count_nonzero(layer[0].lora_B["default"]), "the adapter itself is kept"

    @pytest.mark.parametrize("assign", [False, True])
    def test_a_whole_state_undoes_it(self, assign: bool) -> None:
        layer, other, x = nn.Sequential(self._overwritten()), nn.Sequential(_layer(1)), torch.randn(5, K)
        layer.load_state_dict(other.state_dict(), assign=assign)
        assert not layer[0].merged
        assert torch.equal(layer(x), other(x))

    @pytest.mark.parametrize("part", ["weight", "lora_"])
    def test_part_of_a_state_is_refused(self, part: str) -> None:
        layer, x = self._overwritten(), torch.randn(5, K)
        before, state = layer(x), {name: value for name, value in _layer(1).state_dict().items() if part in name}
        with pytest.raises(
            ValueError, match=r"overwrote the base weight; a state dict for this layer must have .*weight"
        ):
            layer.load_state_dict(state, strict=False)
        assert torch.equal(layer(x), before) and layer.merged

    def test_a_computed_weight_is_not_overwritten(self) -> None:
        layer, x = _layer().eval(), torch.randn(5, K)
        nn.utils.parametrizations.weight_norm(layer)
        before = layer(x)
        with pytest.raises(ValueError, match="weight is computed, so that it cannot be overwritten"):
            layer.merge(keep_base=False)
        assert torch.equal(layer(x), before) and not layer.merged
        layer.merge()
        with torch.no_grad():
            layer.parametrizations.weight.original0.mul_(2)
        torch.testing.assert_close(layer(x).double(), _expected(layer, x), rtol=1e-5, atol=1e-5)

    def test_autograd_sees_the_overwriting(self) -> None:
        layer, x = _layer(), torch.randn(5, K, requires_grad=True)
        y = layer(x)
        layer.merge(keep_base=False)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("keep_base", [False, True])
def test_training_a_merged_layer_warns(keep_base: bool, recwarn: pytest.WarningsRecorder) -> None:
    layer, x = _layer(), torch.randn(5, K)
    layer.merge(keep_base)
    with torch.no_grad():
        layer(x)
    layer.eval()(x)
    layer.train()
    layer.lora_A.requires_grad_(False)
    layer(x)
    assert not recwarn.list
    layer.lora_A.requires_grad_()
    with pytest.warns(
        UserWarning, match=r"'default' is merged and gets no gradient; call unmerge\(\) to train it"
    ) as said:
        layer(x)
    assert said[0].filename == __file__


class TestReadersOfWeights:
    """Modules of torch that read ``linear.weight`` instead of calling the linear layer."""

    @pytest.mark.parametrize("norm_first", [False, True])
    @pytest.mark.parametrize("duplicate", [lambda layer: layer, copy.deepcopy, _saved])
    def test_encoder_layer_calls_the_adapters(
        self, norm_first: bool, duplicate: Callable[[nn.Module], nn.Module]
    ) -> None:
        block = nn.TransformerEncoderLayer(K, 4, N, dropout=0.0, batch_first=True, norm_first=norm_first)
        for name in ("linear1", "linear2"):
            fused = FusedLoRALinear.from_linear(block.get_submodule(name), r=4)
            nn.init.normal_(fused.lora_B["default"])
            block.add_module(name, fused) if norm_first else setattr(block, name, fused)
        block, x = duplicate(block), torch.randn(2, 5, K)
        want = block.train()(x)
        with torch.no_grad():
            torch.testing.assert_close(block.eval()(x), want)

    def test_encoder_with_padding_says_how_to_go_on(self) -> None:
        block = nn.TransformerEncoderLayer(K, 4, N, dropout=0.0, batch_first=True)
        block.linear1 = _layer()
        encoder = nn.TransformerEncoder(block, 2).eval()
        padding = torch.arange(5) >= torch.tensor([[5], [3]])
        with torch.no_grad(), pytest.raises(ValueError, match="use_nested_tensor = False"):
            encoder(torch.randn(2, 5, K), src_key_padding_mask=padding)
        encoder.use_nested_tensor = False
        x = torch.randn(2, 5, K)
        want = encoder.train()(x, src_key_padding_mask=padding)
        with torch.no_grad():
            torch.testing.assert_close(encoder.eval()(x, src_key_padding_mask=padding), want)

    @pytest.mark.parametrize(("make", "name"), [(lambda: nn.MultiheadAttention(K, 4), "out_proj"), *_LINEAR_LOSSES])
    def test_others_refuse(self, make: Callable[[], nn.Module], name: str) -> None:
        holder = make()
        before = holder.get_submodule(name)
        for register in (setattr, nn.Module.add_module):
            with pytest.raises(
                ValueError, match=f"{type(holder).__name__} reads the weight of its {name} and never calls it"
            ):
                register(holder, name, FusedLoRALinear(K, K))
        assert holder.get_submodule(name) is before

    def test_a_forward_that_calls_it_is_fine(self) -> None:
        class Calling(nn.MultiheadAttention):
            def forward(self, x: Tensor) -> Tensor:
                return self.out_proj(x)

        holder = Calling(K, 4)
        holder.out_proj = FusedLoRALinear(K, N)
        assert holder(torch.randn(2, K)).shape == (2, N)


@pytest.mark.parametrize("merged", [None, False, True])
def test_meta_construction(merged: bool | None) -> None:
    """Built on meta, made real, and then every module's own reset_parameters, as FSDP does."""
    layer = FusedLoRALinear(K, N, r=4, device="meta")
    layer.add_adapter("second", r=2)
    if merged is not None:
        layer.merge(keep_base=merged)
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(math.nan)
    torch.manual_seed(0)
    for module in layer.modules():
        if list(module.parameters(recurse=False)):
            module.reset_parameters()
    assert not layer.merged
    x = torch.randn(3, K)
    for name, r in (("default", 4), ("second", 2)):
        layer.set_adapter(name)
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        assert 0 < layer.lora_A[name].abs().max() <= K**-0.5 and layer.lora_A[name].shape == (r, K)
    assert 0 < layer.weight.abs().max() <= K**-0.5 and 0 < layer.bias.abs().max() <= K**-0.5


def test_default_device_plays_no_part() -> None:
    layer, x = _layer(lora_dropout=0.5), torch.randn(3, K)
    linear = nn.Linear(K, N)
    torch.manual_seed(3)
    want = layer(x)
    with torch.device("meta"):
        torch.manual_seed(3)
        assert torch.equal(layer(x), want)
        layer.add_adapter("second")
        layer.eval().merge()
        assert {each.device.type for each in (*layer.parameters(), *layer.buffers(), layer(x))} == {"cpu"}
        assert FusedLoRALinear.from_linear(linear)(x).device.type == "cpu"
        assert FusedLoRALinear(K, N).lora_A["default"].device.type == "meta"


def test_repr_tells_what_is_active() -> None:
    text = repr(_layer(lora_dropout=0.25))
    for part in (
        f"in_features={K}",
        f"out_features={N}",
        "lora_dropout=0.25",
        "default: r=4 scaling=4",
        "merged=False",
    ):
        assert part in text


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_autocast(adapter_dtype: torch.dtype) -> None:
    layer, x = _layer(adapter_dtype=adapter_dtype), torch.randn(5, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert layer.lora_A["default"].grad.dtype == adapter_dtype
    # Operands of 8 bits: an eps of bfloat16 for each of four roundings on the longest way, of the largest value.
    exact = _expected(layer, x).detach()
    assert (y.detach().double() - exact).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    layers = nn.Sequential(_layer(lora_dropout=0.3), nn.ReLU())
    x = torch.randn(5, K, requires_grad=True)

    def gradients(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(7)
        layers.zero_grad()
        x.grad = None
        run(x).square().sum().backward()
        return [x.grad.clone(), *(p.grad.clone() for p in layers.parameters() if p.requires_grad)]

    plain = gradients(layers)
    again = gradients(lambda x: checkpoint(layers, x, use_reentrant=use_reentrant))
    for first, second in zip(plain, again, strict=True):
        compare.assert_bitwise_equal("gradient", second, first)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiles_without_graph_break(p: float) -> None:
    torch._dynamo.reset()
    layer, x = _layer(lora_dropout=p).eval(), torch.randn(5, K, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    layer.train()
    torch._dynamo.reset()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)


def test_trains() -> None:
    """A rank-4 target is learnt by the adapter, and the base does not move."""
    torch.manual_seed(0)
    layer = FusedLoRALinear(K, N, r=4, lora_alpha=4)
    weight = layer.weight.clone()
    update = torch.randn(N, 4) @ torch.randn(4, K) / K**0.5
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.03)
    x = torch.randn(256, K)
    with torch.no_grad():
        target = F.linear(x, weight + update, layer.bias)
    first = F.mse_loss(layer(x), target).item()
    for _ in range(300):
        optimizer.zero_grad()
        loss = F.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3 * first
    compare.assert_bitwise_equal("weight", layer.weight, weight)


def test_forced_backend_reaches_the_layer() -> None:
    layer = _layer(dtype=torch.float64)
    with pk.use_backend("triton"), pytest.raises(pk.UnsupportedError, match="cannot run this problem"):
        layer(torch.randn(3, K, dtype=torch.float64))
