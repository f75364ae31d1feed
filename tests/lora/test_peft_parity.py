"""FusedLoRALinear next to PEFT's own LoRA layer with the same weights: outputs, gradients, merged weights, training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from peft_kernels import FusedLoRALinear
from python_ref import compare
from python_ref import lora as oracle

peft = pytest.importorskip("peft")

K, N, R, M = 72, 56, 8, 96


def _pair(
    dtype: torch.dtype, adapter_dtype: torch.dtype, *, rslora: bool = False, p: float = 0.0
) -> tuple[FusedLoRALinear, nn.Module]:
    """Our layer and PEFT's over the same base weight, with equal adapters in memory of their own."""
    torch.manual_seed(0)
    linear = nn.Linear(K, N, dtype=dtype)
    ours = FusedLoRALinear.from_linear(
        linear, r=R, lora_alpha=12, lora_dropout=p, use_rslora=rslora, adapter_dtype=adapter_dtype
    )
    nn.init.normal_(ours.lora_B["default"])
    config = peft.LoraConfig(r=R, lora_alpha=12, lora_dropout=p, use_rslora=rslora, target_modules=["q"])
    theirs = peft.inject_adapter_in_model(config, nn.ModuleDict({"q": linear}))["q"]
    theirs.to(dtype=dtype)
    for module, parameter in ((theirs.lora_A, ours.lora_A), (theirs.lora_B, ours.lora_B)):
        module["default"].weight = nn.Parameter(parameter["default"].detach().clone())
    return ours, theirs


def _results(layer: nn.Module, a: Tensor, b: Tensor, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    dx, da, db = torch.autograd.grad(y, (leaf, a, b), dy)
    return {"y": y.detach(), "x": dx, "lora_a": da, "lora_b": db}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_outputs_and_gradients(dtype: torch.dtype, adapter_dtype: torch.dtype, rslora: bool) -> None:
    """PEFT's own layer is the eager torch of the error budget."""
    ours, theirs = _pair(dtype, adapter_dtype, rslora=rslora)
    assert ours.scaling["default"] == theirs.scaling["default"]
    x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    a, b = ours.lora_A["default"], ours.lora_B["default"]
    got = _results(ours, a, b, x, dy)
    expected = _results(theirs, theirs.lora_A["default"].weight, theirs.lora_B["default"].weight, x, dy)

    wide = [tensor.detach().double() for tensor in (x, ours.weight, a, b)]
    y, _ = oracle.forward(*wide, ours.scaling["default"], ours.bias.double())
    grads = oracle.backward(dy.double(), *wide, ours.scaling["default"])
    exact = {"y": y, "x": grads.x, "lora_a": grads.lora_a, "lora_b": grads.lora_b}
    for name, value in got.items():
        compare.assert_close(name, value, expected[name], exact[name].detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weight(dtype: torch.dtype) -> None:
    """Held against float64: PEFT's merge rounds the update before it adds it."""
    ours, theirs = _pair(dtype, dtype)
    a, b = ours.lora_A["default"].double(), ours.lora_B["default"].double()
    exact = (ours.weight.double() + ours.scaling["default"] * b @ a).detach()
    ours.merge()
    merged = ours._merged_weight.clone()
    theirs.merge()  # writes into the weight that both share
    compare.assert_close("weight", merged, theirs.get_base_layer().weight.detach(), exact)


def test_training_takes_the_same_path() -> None:
    """Twenty steps of Adam from the same start: the losses differ by rounding alone."""
    losses = []
    for layer in _pair(torch.float32, torch.float32):
        torch.manual_seed(1)
        x, target = torch.randn(M, K), torch.randn(M, N)
        parameters = [p for p in layer.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=1e-2)
        run = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = (layer(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            run.append(loss.item())
        losses.append(torch.tensor(run, dtype=torch.float64))
    ours, theirs = losses
    assert ours[-1] < 0.9 * ours[0]
    # Adam divides by the gradient's own size, so a rounding moves a step by about as much: 20 steps of 1e-7, and room.
    assert ((ours - theirs).abs() / theirs).max() < 1e-5


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_keeps_less_for_backward(p: float) -> None:
    """Saved for backward besides parameters and x: PEFT keeps S and, with dropout, x dropped and a mask."""

    def saved(layer: nn.Module, x: Tensor) -> int:
        known = {tensor.untyped_storage().data_ptr() for tensor in (x, *layer.parameters())}
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(x)
        del y
        return sum(storages.values())

    ours, theirs = _pair(torch.bfloat16, torch.float32, p=p)
    x = torch.randn(M, K).bfloat16().requires_grad_()
    kept = saved(ours, x)
    assert kept == M * R * 4 + (8 if p else 0)
    # PEFT's cast of x to float32 alone is M K 4 bytes.
    assert saved(theirs, x) >= kept + M * K * 4
