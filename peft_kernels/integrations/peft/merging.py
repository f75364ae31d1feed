"""``merge`` and ``unmerge`` of PEFT's LoRA layers: summed in float32, undone to the bit.

PEFT rounds each adapter's update to the weight's dtype, and subtracts it again: in half precision the weight drifts.
Here the weight before the first merge is kept (``integrations.kept``), and put back if it is still the merged one.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from peft_kernels._core.checks import FLOATING
from peft_kernels.integrations import kept
from peft_kernels.integrations.calls import is_plain
from peft_kernels.integrations.hooks import OwnMethods, is_hooked
from peft_kernels.integrations.report import count_fallback
from peft_kernels.integrations.rules import Support
from peft_kernels.integrations.sites import Swapped
from peft_kernels.lora.merging import Update, accumulated_in, write_merged

SUPPORT = Support(
    "PEFT: merging LoRA layers",
    (
        "`merge_adapter()`, `merge_and_unload()`: several adapters too, summed in float32 and rounded once",
        "`unmerge_adapter()`, `set_adapter` and `disable_adapter()` while merged: the weight's exact bits",
        "rsLoRA, `lora_bias`, `fan_in_fan_out`, `safe_merge`; changed factors, a copied or moved model while merged",
    ),
)
_REPLACED = SUPPORT.rule("methods for merging that another tool replaced", "{method} was replaced, so that it merges")
_VARIANT = SUPPORT.rule("DoRA and PEFT's other variants", "its adapter is a {variant}, which PEFT merges")
_HOOKED = SUPPORT.rule(
    "hooks inside the layer: offloading, tensor parallelism", "there are hooks inside the layer, so that PEFT merges"
)
_NO_PLAIN_WEIGHT = SUPPORT.rule(
    "a weight that is a tensor subclass, without memory or not floating",
    "a weight of it is {weight}, so that PEFT merges",
)
_COMPUTED = SUPPORT.rule(
    "a weight that is computed, as parametrizations do", "its weight is no parameter, so that PEFT merges"
)
_SEVERAL_DEVICES = SUPPORT.rule("weights on several devices", "its weights are on several devices, so that PEFT merges")
_SHAPES = SUPPORT.rule(
    "factors of other shapes than the weight", "its factors' product is not {shape}, so that PEFT merges"
)
_SCALING = SUPPORT.rule("a scaling that is no number", "its scaling is a {scaling}, so that PEFT merges")
_NO_BIAS = SUPPORT.rule("`lora_bias` on a base layer without one", "its base layer has no bias to merge into")
_NOT_KEPT = SUPPORT.rule(
    "`unmerge` of what was merged before `apply`, in a file, by PEFT, or with `keep_base=False`",
    "its weight before the merge was not kept, so that PEFT unmerges",
)
_CHANGED = SUPPORT.rule(
    "`unmerge` of a weight that was changed, replaced or cast while merged",
    "its weight changed while it was merged, so that PEFT unmerges",
)

_OWN = OwnMethods(*((PeftLinear, name) for name in ("merge", "unmerge", "get_delta_weight")))
_NOT_COMPILED = "peft_kernels: merging keeps weights beside their layers"


class Merging(Swapped):
    """``lora.Linear`` with a merge that can be undone to the bit; PEFT's class comes after it.

    What it cannot merge runs PEFT's own code, and so does the unmerge of a weight that is no longer the merged one.
    """

    @torch.compiler.disable(reason=_NOT_COMPILED)
    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT's; with ``safe_merge`` an error leaves all as it was, for several adapters too."""
        # A tool may have kept this method, and call it after revert.
        if isinstance(self, Merging):
            began = kept.of(self) if self.merged else None
            _merge(self, safe_merge, adapter_names, kept.chosen(self) if began is None else began.where)
        else:
            PeftLinear.merge(self, safe_merge, adapter_names)

    @torch.compiler.disable(reason=_NOT_COMPILED)
    def unmerge(self: Any) -> None:
        """As PEFT's; warns where a weight was kept and has changed, so that PEFT's subtraction runs."""
        if isinstance(self, Merging) and self.merged:
            found = kept.of(self)
            reason = _why_not_restored(self, found)
            if found is not None and reason is None:
                _restore(self, found)
                return
            count_fallback(self, str(reason))
            if found is not None:
                warnings.warn(f"unmerge: {reason}, which does not give back the bits of before", stacklevel=3)
        PeftLinear.unmerge(self)
        kept.drop(self)

    def unload_and_optionally_merge_module(
        self: Any, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> Any:
        """Return the base layer, merged if asked to; PEFT calls it for layers that have it. Nothing is kept."""
        if merge:
            _merge(self, safe_merge, adapter_names, False)
        kept.drop(self)
        return self.get_base_layer()

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        applied = PeftLinear._apply(self, fn, recurse)
        kept.follow(self, _tensors(self).get("weight"))
        return applied

    def __copy__(self) -> Any:
        copied = Swapped.__copy__(self)
        kept.share(self, copied, is_copied=False)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = Swapped.__deepcopy__(self, memo)
        kept.share(self, copied, is_copied=True)
        return copied


def _merge(layer: Any, safe_merge: bool, names: list[str] | None, where: kept.KeepBase) -> None:
    added = _added(layer, names)
    reason = _why_not_merged(layer, added) if added else None
    if reason is not None:
        count_fallback(layer, reason)
    if reason is not None or not added:
        PeftLinear.merge(layer, safe_merge, names)
        if added:
            kept.drop(layer)
        return
    check_adapters_to_merge(layer, names)
    originals = _originals(layer, added, where)
    _write(layer, added, safe_merge)
    layer.merged_adapters.extend(added)
    if originals is None:
        kept.drop(layer)
        return
    merged = {name: kept.fingerprint(tensor) for name, tensor in _tensors(layer).items() if name in originals}
    kept.put(layer, kept.Kept(tuple(layer.merged_adapters), originals, merged, where))


def _added(layer: Any, names: Any) -> list[str]:
    """The adapters that a merge adds; none where PEFT refuses the names."""
    if isinstance(names, str):
        return []
    wanted = layer.active_adapters if names is None else names
    return [name for name in wanted if name in layer.lora_A and name not in layer.merged_adapters]


def _originals(layer: Any, added: list[str], where: kept.KeepBase) -> dict[str, Tensor] | None:
    """Copies of what a merge writes to, or what an earlier one has kept of it; None if it cannot be undone."""
    if where is False:
        return None
    tensors = _tensors(layer)
    originals: dict[str, Tensor] = {}
    if layer.merged:
        before = kept.of(layer)
        if before is None or not before.is_of(layer.merged_adapters, tensors):
            return None
        originals.update(before.originals)
    for name in _written(layer, added):
        if name not in originals:
            originals[name] = kept.copied(tensors[name], where)
    return originals


def _write(layer: Any, added: list[str], safe_merge: bool) -> None:
    """Write the merged weight, and the bias where there is one to merge.

    Raises:
        ValueError: ``safe_merge``, and they would not be finite; nothing was written.
    """
    # As PEFT does: autograd does not learn of it.
    targets = {name: tensor.data for name, tensor in _tensors(layer).items() if name in _written(layer, added)}
    if not safe_merge:
        _sum(layer, added, targets, targets)
        return
    merged = {name: torch.empty_like(target) for name, target in targets.items()}
    _sum(layer, added, targets, merged)
    if not all(bool(torch.isfinite(tensor).all()) for tensor in merged.values()):
        raise ValueError(f"merge: the weight would not be finite with {', '.join(added)}; an adapter holds nan or inf")
    for name, target in targets.items():
        target.copy_(merged[name])


@torch.no_grad()
def _sum(layer: Any, added: list[str], sources: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
    updates = [
        Update(layer.lora_B[name].weight, layer.lora_A[name].weight, float(layer.scaling[name])) for name in added
    ]
    write_merged(_oriented(layer, targets["weight"]), _oriented(layer, sources["weight"]), updates)
    if "bias" not in targets:
        return
    biases = {name: layer.lora_B[name].bias for name in added if layer.lora_bias[name]}
    total = sources["bias"].to(accumulated_in(sources["bias"], *biases.values()))
    for name, bias in biases.items():
        total = torch.add(total, bias.to(total.dtype), alpha=float(layer.scaling[name]))
    targets["bias"].copy_(total)


def _restore(layer: Any, found: kept.Kept) -> None:
    tensors = _tensors(layer)
    for name, original in found.originals.items():
        tensors[name].data.copy_(original)
    layer.merged_adapters.clear()
    kept.drop(layer)


def _why_not_restored(layer: Any, found: kept.Kept | None) -> str | None:
    """Reason why the weight of before the merge is not put back."""
    if found is None:
        return _NOT_KEPT()
    if not found.is_of(layer.merged_adapters, _tensors(layer)):
        return _CHANGED()
    return _why_not_ours(layer)


def _why_not_merged(layer: Any, added: list[str]) -> str | None:
    """Reason why PEFT's own code merges."""
    reason = _why_not_ours(layer)
    if reason is not None:
        return reason
    base, tensors = layer.get_base_layer(), _tensors(layer)
    hooked, factors = is_hooked(base), []
    for name in added:
        if name in layer.lora_variant:
            return _VARIANT(variant=type(layer.lora_variant[name]).__name__)
        if layer.lora_bias[name] and "bias" not in tensors:
            return _NO_BIAS()
        down, up, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        if not isinstance(scaling, (int, float)) and not (is_plain(scaling) and scaling.dim() == 0):
            return _SCALING(scaling=type(scaling).__name__)
        hooked = hooked or is_hooked(down) or is_hooked(up)
        factors += [down.weight, up.weight, *([up.bias] if layer.lora_bias[name] else [])]
    if hooked:
        return _HOOKED()
    return _why_not_weights(layer, added, [*(tensors.get(name) for name in _written(layer, added)), *factors])


def _why_not_weights(layer: Any, added: list[str], weights: list[Any]) -> str | None:
    for weight in weights:
        if weight is None:
            return _COMPUTED()
        if not is_plain(weight) or weight.is_meta or weight.dtype not in FLOATING:
            return _NO_PLAIN_WEIGHT(weight=f"a {type(weight).__name__} of {weight.dtype} on {weight.device.type}")
        if weight.device != weights[0].device:
            return _SEVERAL_DEVICES()
    shape = _oriented(layer, weights[0]).shape
    for name in added:
        up, down = layer.lora_B[name].weight.shape, layer.lora_A[name].weight.shape
        if len(shape) != 2 or (up[0], down[1]) != shape or up[1] != down[0]:
            return _SHAPES(shape=tuple(shape))
    return None


def _why_not_ours(layer: Any) -> str | None:
    replaced = "its get_delta_weight" if "get_delta_weight" in layer.__dict__ else _OWN.replaced()
    return None if replaced is None else _REPLACED(method=replaced)


def _tensors(layer: Any) -> dict[str, Tensor]:
    """The base layer's parameters."""
    return {name: tensor for name, tensor in layer.get_base_layer()._parameters.items() if tensor is not None}


def _written(layer: Any, added: list[str]) -> tuple[str, ...]:
    return ("weight", "bias") if any(layer.lora_bias[name] for name in added) else ("weight",)


def _oriented(layer: Any, weight: Tensor) -> Tensor:
    """The weight as (N, K)."""
    return weight.t() if layer.fan_in_fan_out else weight
