"""FusedLoRALinear: adapters, merging, what modules must survive, and wrong use."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels import FusedLoRALinear
from python_ref import compare
from tests.lora.modules import K, N, expected, lora_layer, saved_and_loaded


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
    linear, layer = nn.Linear(K, N), lora_layer()
    missing, unexpected = layer.load_state_dict(linear.state_dict(), strict=False)
    assert (missing, unexpected) == (["lora_A.default", "lora_B.default"], [])
    assert torch.equal(layer.weight, linear.weight) and torch.equal(layer.bias, linear.bias)


@pytest.mark.parametrize("shape", [(K,), (3, K), (2, 3, K), (0, K)])
@pytest.mark.parametrize("bias", [False, True])
def test_forward(shape: tuple[int, ...], bias: bool) -> None:
    layer, x = lora_layer(bias=bias), torch.randn(shape)
    torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_alone() -> None:
    layer, x = lora_layer(lora_dropout=0.5), torch.randn(5, K)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)


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
        layer, x = lora_layer(), torch.randn(5, K)
        first = layer(x).detach()
        layer.add_adapter("second", r=2, lora_alpha=4)
        layer.lora_B["second"].data.normal_()
        compare.assert_bitwise_equal("adding changes nothing", layer(x).detach(), first)
        before = {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}
        for name in ("second", None, "default"):
            layer.set_adapter(name)
            assert layer.active_adapter == name
            torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)
        assert {name: parameter.data_ptr() for name, parameter in layer.named_parameters()} == before
        compare.assert_bitwise_equal("back again", layer(x).detach(), first)

    def test_no_adapter_is_the_base(self) -> None:
        layer, x = lora_layer(), torch.randn(5, K)
        layer.set_adapter(None)
        compare.assert_bitwise_equal("y", layer(x), F.linear(x, layer.weight, layer.bias))

    def test_only_the_active_one_gets_gradients(self) -> None:
        layer = lora_layer()
        layer.add_adapter("second", r=2)
        layer(torch.randn(5, K)).sum().backward()
        got = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
        assert got == {"lora_A.default", "lora_B.default"}

    def test_delete(self) -> None:
        layer = lora_layer()
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
        layer = lora_layer()
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        with pytest.raises(error, match=message):
            action(layer)
        after = layer.state_dict()
        assert list(after) == list(before)
        for name, tensor in before.items():
            compare.assert_bitwise_equal(name, after[name], tensor)
        assert layer.active_adapter == "default" and set(layer.scaling) == {"default"}


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


@pytest.mark.parametrize("state", ["apart", "merged", "overwritten", "none active"])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), saved_and_loaded]
)
def test_copies(duplicate: Callable[[nn.Module], nn.Module], state: str) -> None:
    layer, x = lora_layer(lora_dropout=0.1).eval(), torch.randn(5, K)
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
    layer = lora_layer().eval()
    if merged:
        layer.merge()
    layer.to(torch.bfloat16)
    assert {tensor.dtype for tensor in (*layer.parameters(), *layer.buffers())} == {torch.bfloat16}
    assert layer(torch.randn(3, K, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_state_dict_round_trip() -> None:
    layer, other, x = lora_layer(0), lora_layer(1), torch.randn(5, K)
    other.load_state_dict(layer.state_dict())
    compare.assert_bitwise_equal("y", other(x).detach(), layer(x).detach())


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
    layer, x = lora_layer(lora_dropout=0.5), torch.randn(3, K)
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
    text = repr(lora_layer(lora_dropout=0.25))
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
    layer, x = lora_layer(adapter_dtype=adapter_dtype), torch.randn(5, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert layer.lora_A["default"].grad.dtype == adapter_dtype
    # Operands of 8 bits: an eps of bfloat16 for each of four roundings on the longest way, of the largest value.
    exact = expected(layer, x).detach()
    assert (y.detach().double() - exact).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    layers = nn.Sequential(lora_layer(lora_dropout=0.3), nn.ReLU())
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
    layer, x = lora_layer(lora_dropout=p).eval(), torch.randn(5, K, requires_grad=True)
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
    layer = lora_layer(dtype=torch.float64)
    with pk.use_backend("triton"), pytest.raises(pk.UnsupportedError, match="cannot run this problem"):
        layer(torch.randn(3, K, dtype=torch.float64))
