"""Models of diffusers' with LoRA: the plain ones' outputs and gradients, and diffusers' own methods."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")
safetensors_torch = pytest.importorskip("safetensors.torch")

import peft_kernels as pk
from tests.integrations.models import randomize

pytestmark = pytest.mark.slow
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def _unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def _flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def _run_unet(model: nn.Module, **extra: object) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 5, 16, generator=draw)
    return model(latents, torch.tensor([3, 500]), encoder_hidden_states=text, **extra).sample


def _run_flux(model: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    tokens, text = torch.randn(2, 9, 4, generator=draw), torch.randn(2, 5, 16, generator=draw)
    return model(
        tokens, text, torch.randn(2, 16, generator=draw), torch.tensor([0.1, 0.7]), torch.zeros(9, 3), torch.zeros(5, 3)
    ).sample


MODELS = {"unet": (_unet, _run_unet, 32), "flux": (_flux, _run_flux, 7)}


def _pair(name: str) -> tuple[nn.Module, nn.Module, Callable[..., Tensor], pk.integrations.Report]:
    """The plain model, the fused one, and how to run them."""
    make, run, layers = MODELS[name]
    torch.manual_seed(0)
    plain = make().requires_grad_(False)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    plain.add_adapter(config)
    randomize(plain)
    fused = copy.deepcopy(plain)
    report = pk.apply(fused, strict=True)
    assert len(report.fused) == layers
    return plain, fused, run, report


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name: str) -> None:
    plain, fused, run, report = _pair(name)
    gradients = []
    for model in (plain, fused):
        run(model).square().mean().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(run(fused), run(plain), **CLOSE)
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) == 2 * len(report.fused)
    # Gradients are as small as the mean over all outputs makes them: close in units of the largest of each.
    for key, expected in gradients[0].items():
        assert (gradients[1][key] - expected).abs().max() <= 1e-4 * expected.abs().max(), key
    assert not report.fallback_calls


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_own_methods(name: str, tmp_path: Path) -> None:
    plain, fused, run, report = _pair(name)

    def both(change: Callable[[nn.Module], object]) -> Tensor:
        results = []
        for model in (plain, fused):
            change(model)
            with torch.no_grad():
                results.append(run(model))
        torch.testing.assert_close(results[1], results[0], **CLOSE)
        return results[1]

    whole = both(lambda model: None)
    assert not torch.allclose(both(lambda model: model.set_adapters("default", 0.5)), whole, **CLOSE)
    torch.testing.assert_close(both(lambda model: model.set_adapters("default", 1.0)), whole, **CLOSE)
    assert not report.fallback_calls
    both(lambda model: model.disable_lora())
    torch.testing.assert_close(both(lambda model: model.enable_lora()), whole, **CLOSE)
    both(lambda model: model.fuse_lora())
    both(lambda model: model.unfuse_lora())
    assert set(report.fallback_calls) == {"adapters are disabled", "adapters are merged into the weight"}
    files = []
    for model, folder in ((plain, tmp_path / "plain"), (fused, tmp_path / "fused")):
        model.save_lora_adapter(folder)
        (path,) = folder.glob("*.safetensors")
        files.append(safetensors_torch.load_file(path))
    assert files[0].keys() == files[1].keys() and len(files[0]) == 2 * len(report.fused)
    assert all(torch.equal(value, files[1][key]) for key, value in files[0].items())


def test_a_scale_in_the_call() -> None:
    plain, fused, run, report = _pair("unet")
    scaled = run(fused, cross_attention_kwargs={"scale": 0.25})
    torch.testing.assert_close(scaled, run(plain, cross_attention_kwargs={"scale": 0.25}), **CLOSE)
    assert not torch.allclose(scaled, run(fused), **CLOSE) and not report.fallback_calls
