"""Named adapters of a layer: adding, switching, scaling, disabling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from peft_kernels._core import arguments

_NAME = "FusedLoRALinear"
_HALF = (torch.bfloat16, torch.float16)


class _DownFactors(nn.ParameterDict):
    """A by adapter name."""

    def reset_parameters(self) -> None:
        """Draw every A as nn.Linear draws its weight, as the reference code of LoRA and PEFT do."""
        for parameter in self.values():
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))


class _UpFactors(nn.ParameterDict):
    """B by adapter name."""

    def reset_parameters(self) -> None:
        """Set every B to zero."""
        for parameter in self.values():
            nn.init.zeros_(parameter)


class Disabled:
    """What ``disable_adapters`` returns: as a ``with`` block it enables at its end what it has disabled."""

    def __init__(self, layers: Sequence[NamedAdapters]) -> None:
        self._layers = layers

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer in self._layers:
            layer.enable_adapters()


class NamedAdapters(nn.Module):
    """The part of FusedLoRALinear that concerns adapters and not the product; its attributes are described there."""

    weight: nn.Parameter
    in_features: int
    out_features: int
    use_rslora: bool
    adapter_dtype: torch.dtype | None
    lora_A: _DownFactors
    lora_B: _UpFactors
    _merged: bool
    _merged_weight: Tensor | None

    def _setup_adapters(self) -> None:
        self.lora_A, self.lora_B = _DownFactors(), _UpFactors()
        self.scaling: dict[str, float] = {}
        self.full_scaling: dict[str, float] = {}
        self._active: str | None = None
        self._disabled = False

    @property
    def active_adapter(self) -> str | None:
        """Name of the adapter that the forward pass uses unless adapters are disabled, or None."""
        return self._active

    @property
    def active_adapters(self) -> list[str]:
        """The same as a list of none or one, as PEFT's layers have it."""
        return [] if self._active is None else [self._active]

    @property
    def enabled(self) -> bool:
        """Whether the forward pass uses the active adapter; False after ``disable_adapters``."""
        return not self._disabled

    @property
    def merged(self) -> bool:
        """Whether the forward pass uses a weight that holds the active adapter."""
        return self._merged

    @property
    def is_overwritten(self) -> bool:
        """Whether ``merge(keep_base=False)`` has put the active adapter into the base weight."""
        return self._merged and self._merged_weight is None

    def add_adapter(self, name: str, r: int = 8, lora_alpha: float = 16) -> None:
        """Add an adapter that changes nothing yet (B is zero), without making it active.

        Raises:
            ValueError: the name is taken, empty, has a dot, or is an attribute of nn.ParameterDict; r is below 1, or
                ``lora_alpha`` is no number.
        """
        self._check_adapter(name, r, lora_alpha)
        if name in self.scaling:
            raise ValueError(f"{_NAME}: there is an adapter {name!r} already")
        device, dtype = self.weight.device, self._adapter_dtype()
        down = _DownFactors({name: torch.empty(r, self.in_features, device=device, dtype=dtype)})
        down.reset_parameters()
        self.lora_A[name] = down[name]
        self.lora_B[name] = nn.Parameter(torch.zeros(self.out_features, r, device=device, dtype=dtype))
        self.scaling[name] = self.full_scaling[name] = lora_alpha / (math.sqrt(r) if self.use_rslora else r)

    def set_adapter(self, name: str | None) -> None:
        """Make an adapter active, or none; copies nothing and leaves ``requires_grad`` as it is.

        Raises:
            KeyError: there is no such adapter.
            ValueError: the layer is merged.
        """
        if name is not None:
            self._check_known(name)
        if self.merged and name != self._active:
            raise ValueError(f"{_NAME}: {self._active!r} is merged; call unmerge() before set_adapter({name!r})")
        self._active = name

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter that is not active.

        Raises:
            KeyError: there is no such adapter.
            ValueError: it is active.
        """
        self._check_known(name)
        if name == self._active:
            raise ValueError(f"{_NAME}: adapter {name!r} is active; call set_adapter() with another or None first")
        del self.lora_A[name], self.lora_B[name], self.scaling[name], self.full_scaling[name]

    def set_scale(self, name: str, scale: float) -> None:
        """Make an adapter's scaling ``scale`` times what it was added or loaded with, as PEFT's layers do.

        Raises:
            KeyError: there is no such adapter.
            ValueError: ``scale`` is no number, or the weight was overwritten with this adapter.
        """
        self._check_known(name)
        arguments.number(_NAME, "scale", scale)
        if self.is_overwritten and name == self._active:
            raise ValueError(
                f"{_NAME}: merge(keep_base=False) overwrote the base weight with {name!r} as it was scaled"
            )
        self.scaling[name] = scale * self.full_scaling[name]

    def disable_adapters(self) -> Disabled:
        """Make the forward pass that of the base until ``enable_adapters``, merged or not; the active one stays active.

        Returns:
            For a ``with`` block, at whose end adapters are enabled again if they were before.

        Raises:
            ValueError: the base weight was overwritten.
        """
        if self.is_overwritten:
            raise ValueError(f"{_NAME}: merge(keep_base=False) overwrote the base weight; adapters cannot be disabled")
        changed = [] if self._disabled else [self]
        self._disabled = True
        return Disabled(changed)

    def enable_adapters(self) -> None:
        """Undo ``disable_adapters``."""
        self._disabled = False

    def get_delta_weight(self, name: str) -> Tensor:
        """What a merge with an adapter adds to the weight: scaling * B @ A, (N, K), in float32 or what is wider.

        Raises:
            KeyError: there is no such adapter.
        """
        self._check_known(name)
        lora_a, lora_b = self.lora_A[name], self.lora_B[name]
        wide = torch.promote_types(torch.promote_types(lora_a.dtype, self.weight.dtype), torch.float32)
        return self.scaling[name] * (lora_b.to(wide) @ lora_a.to(wide))

    def _adapter_dtype(self) -> torch.dtype:
        if self.adapter_dtype is not None:
            return self.adapter_dtype
        return torch.float32 if self.weight.dtype in _HALF else self.weight.dtype

    def _check_known(self, name: str) -> None:
        if name not in self.scaling:
            raise KeyError(f"{_NAME}: there is no adapter {name!r}; there are {sorted(self.scaling)}")

    def _check_adapter(self, name: str, r: int, lora_alpha: float) -> None:
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"{_NAME}: an adapter's name must be a non-empty string without dots, got {name!r}")
        if name not in self.lora_A and hasattr(self.lora_A, name):
            raise ValueError(f"{_NAME}: an adapter's name must be no attribute of nn.ParameterDict, got {name!r}")
        arguments.integer(_NAME, "r", r, 1)
        arguments.number(_NAME, "lora_alpha", lora_alpha)
