"""FusedLoRALinear: a drop-in for nn.Linear that carries named LoRA adapters."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels._core import arguments
from peft_kernels.lora.base_layer import guard_readers, why_not_base
from peft_kernels.lora.linear.op import lora_linear
from peft_kernels.lora.merging import Update, write_merged
from peft_kernels.lora.named_adapters import NamedAdapters
from peft_kernels.lora.peft_keys import take_peft_keys

_NAME = "FusedLoRALinear"


class _Source(NamedTuple):
    """A value that a merged weight is made from: where it stands, and autograd's counter of its changes in place."""

    place: Mapping[str, Any]
    key: str
    value: Any
    version: int | None


class FusedLoRALinear(NamedAdapters):
    """Hold a frozen linear layer and train low-rank adapters beside it.

    Semantics: ``y = x @ weight.T + bias + scaling[active] * (drop(x) @ lora_A[active].T) @ lora_B[active].T``, with
    dropout in training mode only; with no active adapter, disabled or merged, ``y = F.linear(x, weight, bias)`` on the
    base or merged weight. ``weight`` is the base's: code that reads it and does not call the layer sees no adapter. An
    nn.TransformerEncoderLayer that gets this layer is taken off its fused inference path, which would do that; an
    nn.MultiheadAttention refuses it.

    Args:
        in_features, out_features: K and N.
        r: rank of the adapter that it begins with, at least 1.
        lora_alpha: scaling is ``lora_alpha / r`` (Hu et al. 2021, arXiv:2106.09685, section 4.1).
        lora_dropout: probability in [0, 1) of dropping an element of the low-rank branch's input.
        bias: whether the layer has a (frozen) bias.
        use_rslora: scaling is ``lora_alpha / sqrt(r)`` (Kalajdzievski 2023, arXiv:2312.03732).
        device, dtype: of the base layer.
        adapter_dtype: of the adapters; None is float32 on a half-precision base, else the base's.
        adapter_name: of the adapter that it begins with.

    Attributes:
        weight, bias: frozen parameters under nn.Linear's own names; a checkpoint of nn.Linear loads with strict=False,
            one of PEFT's layer under PEFT's keys as it is, but for the scaling, which is in no state dict.
        lora_A, lora_B: nn.ParameterDict by adapter name: A (r, K) Kaiming-uniform, B (N, r) zero.
        scaling: dict by adapter name; full_scaling, what ``set_scale`` multiplies.

    Raises:
        ValueError: a size or rank that is no int or too small, an alpha that is no number, a dropout outside [0, 1), a
            dtype that is not floating, a bad adapter name, an operation on a merged layer.
        KeyError: an adapter name is unknown.

    Example:
        >>> layer = FusedLoRALinear(4, 3, r=2)
        >>> layer(torch.ones(5, 4)).shape
        torch.Size([5, 3])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
        adapter_name: str = "default",
    ) -> None:
        arguments.integer(_NAME, "in_features", in_features, 0)
        arguments.integer(_NAME, "out_features", out_features, 0)
        arguments.floating(_NAME, "dtype", dtype)
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._setup(base, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, adapter_name)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
        adapter_name: str = "default",
    ) -> FusedLoRALinear:
        """Wrap a linear layer: its weight and bias are shared, not copied, and frozen.

        Raises:
            ValueError: ``linear`` is not an nn.Linear, or does more than one: a forward of its own, hooks, a weight
                that is computed, quantized or lazy; or it is the output projection of an nn.MultiheadAttention.
        """
        reason = why_not_base(linear)
        if reason is not None:
            raise ValueError(f"{_NAME}: linear {reason}")
        layer = cls.__new__(cls)
        layer._setup(linear, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype, adapter_name)
        layer.train(linear.training)
        return layer

    def _setup(
        self,
        base: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        adapter_dtype: torch.dtype | None,
        adapter_name: str,
    ) -> None:
        nn.Module.__init__(self)
        guard_readers(FusedLoRALinear)
        arguments.probability(_NAME, "lora_dropout", lora_dropout)
        arguments.floating(_NAME, "adapter_dtype", adapter_dtype)
        self._setup_adapters()
        self._check_adapter(adapter_name, r, lora_alpha)
        self.weight, self.bias = cast("nn.Parameter", base.weight), cast("nn.Parameter | None", base.bias)
        self.out_features, self.in_features = self.weight.shape
        self.lora_dropout, self.use_rslora = lora_dropout, use_rslora
        self.adapter_dtype = adapter_dtype
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad = False
        self.register_buffer("_merged_weight", None, persistent=False)
        self._merged = False
        self._merged_from: tuple[_Source, ...] = ()
        self.register_load_state_dict_post_hook(_merge_what_was_loaded)
        self.register_state_dict_post_hook(_leave_out_what_was_merged)
        self.add_adapter(adapter_name, r, lora_alpha)
        self.set_adapter(adapter_name)

    def reset_parameters(self) -> None:
        """Draw everything anew, such as after ``to_empty``: the base as nn.Linear does, adapters as ``add_adapter``.

        The layer is not merged afterwards.
        """
        self._merged, self._merged_weight = False, None
        nn.Linear.reset_parameters(cast("nn.Linear", self))
        self.lora_A.reset_parameters()
        self.lora_B.reset_parameters()

    def merge(self, keep_base: bool = True) -> None:
        """Put the active adapter into the weight that the forward pass uses: W + scaling B A, accumulated in float32.

        Args:
            keep_base: True keeps W beside the merged weight (W's memory twice), and ``weight`` and the state dict stay
                W's. Where W, A, B or the scaling have changed, by an optimizer, ``load_state_dict`` or in place, the
                next call merges anew; what it cannot see are changes through ``.data``, and in a compiled graph all
                but ``load_state_dict``.
                False overwrites W in place, also for a linear layer that shares it, and cannot be undone; B is zero in
                its state dict, which so holds what the layer computes.

        Raises:
            ValueError: the layer is merged already, no adapter is active, or ``keep_base=False`` and adapters are
                disabled or the weight is computed from others (parametrized).
        """
        if self._merged:
            raise ValueError(f"{_NAME}: adapter {self._active!r} is merged already")
        if self._active is None:
            raise ValueError(f"{_NAME}: there is no active adapter to merge")
        if keep_base:
            self._merge_beside()
        elif self._disabled:
            raise ValueError(f"{_NAME}: adapters are disabled; call enable_adapters() before merge(keep_base=False)")
        elif "weight" in self._parameters:
            self._merge_into(self.weight)
        else:
            raise ValueError(f"{_NAME}: weight is computed, so that it cannot be overwritten; merge() keeps it")
        self._merged = True

    def _merge_beside(self) -> Tensor:
        sources = self._sources()
        # Not an inference tensor, so that calls outside of inference mode can use it too.
        with torch.inference_mode(False):
            merged = torch.empty_like(self.weight, requires_grad=False)
        self._merge_into(merged)
        # In this order: another thread that finds the new sources finds the new weight.
        self._merged_weight = merged
        self._merged_from = sources
        return merged

    def _merge_into(self, target: Tensor) -> None:
        name = cast("str", self._active)
        write_merged(target, self.weight, [Update(self.lora_B[name], self.lora_A[name], self.scaling[name])])

    def _sources(self) -> tuple[_Source, ...]:
        name = cast("str", self._active)
        found = [_Source(self.scaling, name, self.scaling[name], None)]
        for module, key in ((self, "weight"), (self.lora_A, name), (self.lora_B, name)):
            tensor = getattr(module, key)
            # An inference tensor has no counter.
            found.append(_Source(module._parameters, key, tensor, None if tensor.is_inference() else tensor._version))
        return tuple(found)

    def _is_stale(self) -> bool:
        for place, key, value, version in self._merged_from:
            if (version is not None and value._version != version) or place.get(key) is not value:
                return True
        return False

    def unmerge(self) -> None:
        """Go back to W and the adapter apart; W has its exact bits.

        Raises:
            ValueError: the layer is not merged, or was merged with keep_base=False.
        """
        if not self._merged:
            raise ValueError(f"{_NAME}: the layer is not merged")
        if self._merged_weight is None:
            raise ValueError(f"{_NAME}: merge(keep_base=False) overwrote the base weight; it cannot be restored")
        self._merged, self._merged_weight, self._merged_from = False, None, ()

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., K) to y (..., N); warns where a merged layer would train."""
        if self._disabled:
            return F.linear(x, self.weight, self.bias)
        if self._merged:
            return F.linear(x, self._weight_of_call(), self.bias)
        name = self._active
        if name is None:
            return F.linear(x, self.weight, self.bias)
        return lora_linear(
            x,
            self.weight,
            self.lora_A[name],
            self.lora_B[name],
            self.scaling[name],
            self.bias,
            dropout_p=self.lora_dropout if self.training else 0.0,
        )

    def _weight_of_call(self) -> Tensor:
        if not torch.compiler.is_compiling():
            if self.training and torch.is_grad_enabled() and self.lora_A[cast("str", self._active)].requires_grad:
                warnings.warn(
                    f"{_NAME}: adapter {self._active!r} is merged and gets no gradient; call unmerge() to train it, "
                    "eval() or requires_grad_(False) where it shall not train",
                    stacklevel=5,
                )
            if self._is_stale():
                return self._merge_beside()
        return self.weight if self._merged_weight is None else self._merged_weight

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        guard_readers(FusedLoRALinear)
        # Counters of changes do not survive a copy.
        if self._merged_weight is not None:
            self._merge_beside()

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{name}: r={a.shape[0]} scaling={self.scaling[name]:g}" for name, a in self.lora_A.items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"lora_dropout={self.lora_dropout}, adapters={{{ranks}}}, active={self._active!r}, merged={self.merged}"
            + (", disabled" if self._disabled else "")
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        *_, errors = args
        errors.extend(take_peft_keys(state_dict, prefix, list(self.scaling)))
        if self._merged and self._merged_weight is None:
            needed = {f"{prefix}{name}" for name in ("weight", f"lora_A.{self._active}", f"lora_B.{self._active}")}
            missing = needed - state_dict.keys()
            if missing and missing != needed:
                raise ValueError(
                    f"{_NAME}: merge(keep_base=False) overwrote the base weight; a state dict for this layer must have "
                    f"{', '.join(sorted(needed))}, got one without {', '.join(sorted(missing))}"
                )
            self._merged = bool(missing)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _merge_what_was_loaded(layer: FusedLoRALinear, incompatible_keys: Any) -> None:
    if layer._merged_weight is not None:
        layer._merge_beside()


def _leave_out_what_was_merged(layer: FusedLoRALinear, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    key = f"{prefix}lora_B.{layer._active}"
    if layer._merged and layer._merged_weight is None and key in state:
        state[key] = torch.zeros_like(state[key])
