"""FusedLoRALinear: a drop-in for nn.Linear that carries named LoRA adapters."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_kernels.lora.linear.op import lora_linear

_HALF = (torch.bfloat16, torch.float16)
_MERGE_ROWS = 1024


class FusedLoRALinear(nn.Module):
    """Hold a frozen linear layer and train low-rank adapters beside it.

    Semantics: ``y = x @ weight.T + bias + scaling[active] * (drop(x) @ lora_A[active].T) @ lora_B[active].T``, with
    dropout in training mode only; with no active adapter, or merged, ``y = F.linear(x, weight, bias)`` on the base or
    merged weight.

    Args:
        in_features, out_features: K and N.
        r: rank of the adapter "default", at least 1.
        lora_alpha: scaling is ``lora_alpha / r`` (Hu et al. 2021, arXiv:2106.09685, section 4.1).
        lora_dropout: probability in [0, 1) of dropping an element of the low-rank branch's input.
        bias: whether the layer has a (frozen) bias.
        use_rslora: scaling is ``lora_alpha / sqrt(r)`` (Kalajdzievski 2023, arXiv:2312.03732).
        device, dtype: of the base layer.
        adapter_dtype: of the adapters; None is float32 on a half-precision base, else the base's.

    Attributes:
        weight, bias: frozen parameters under nn.Linear's own names; a checkpoint of nn.Linear loads with strict=False.
        lora_A, lora_B: nn.ParameterDict by adapter name: A (r, K) Kaiming-uniform, B (N, r) zero.
        scaling: dict by adapter name.

    Raises:
        ValueError: a rank below 1, a dropout outside [0, 1), a bad adapter name, an operation on a merged layer.
        KeyError: an adapter name is unknown.

    Example:
        >>> layer = FusedLoRALinear(4, 3, r=2)
        >>> layer(torch.ones(5, 4)).shape
        torch.Size([5, 3])
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    _merged_weight: Tensor | None

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
    ) -> None:
        base = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._setup(base, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        lora_alpha: float = 16,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> FusedLoRALinear:
        """Wrap a linear layer: its weight and bias are shared, not copied, and frozen.

        Raises:
            ValueError: ``linear`` is not an nn.Linear.
        """
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"FusedLoRALinear: linear must be an nn.Linear, got {type(linear).__name__}")
        layer = cls.__new__(cls)
        layer._setup(linear, r, lora_alpha, lora_dropout, use_rslora, adapter_dtype)
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
    ) -> None:
        nn.Module.__init__(self)
        if not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"FusedLoRALinear: lora_dropout must be in [0, 1), got {lora_dropout}")
        _check_adapter("default", r)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_dropout, self.use_rslora = lora_dropout, use_rslora
        self.adapter_dtype = adapter_dtype
        self.weight, self.bias = cast("nn.Parameter", base.weight), cast("nn.Parameter | None", base.bias)
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                parameter.requires_grad = False
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.register_buffer("_merged_weight", None, persistent=False)
        self._overwritten = False
        self._active: str | None = None
        self.add_adapter("default", r, lora_alpha)
        self.set_adapter("default")

    @property
    def active_adapter(self) -> str | None:
        """Name of the adapter that the forward pass uses, or None."""
        return self._active

    @property
    def merged(self) -> bool:
        """Whether the forward pass uses a weight that holds the active adapter."""
        return self._overwritten or self._merged_weight is not None

    def add_adapter(self, name: str, r: int = 8, lora_alpha: float = 16) -> None:
        """Add an adapter that changes nothing yet (B is zero), without making it active.

        Raises:
            ValueError: the name is taken, empty or has a dot; r is below 1.
        """
        _check_adapter(name, r)
        if name in self.scaling:
            raise ValueError(f"FusedLoRALinear: there is an adapter {name!r} already")
        device, dtype = self.weight.device, self._adapter_dtype()
        lora_a = torch.empty(r, self.in_features, device=device, dtype=dtype)
        # The initialisation of the LoRA reference code and of PEFT: nn.Linear's own for A, zero for B.
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
        self.lora_A[name] = nn.Parameter(lora_a)
        self.lora_B[name] = nn.Parameter(torch.zeros(self.out_features, r, device=device, dtype=dtype))
        self.scaling[name] = lora_alpha / (math.sqrt(r) if self.use_rslora else r)

    def set_adapter(self, name: str | None) -> None:
        """Make an adapter active, or none; copies nothing and leaves ``requires_grad`` as it is.

        Raises:
            KeyError: there is no such adapter.
            ValueError: the layer is merged.
        """
        if name is not None:
            self._check_known(name)
        if self.merged and name != self._active:
            raise ValueError(
                f"FusedLoRALinear: {self._active!r} is merged; call unmerge() before set_adapter({name!r})"
            )
        self._active = name

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter that is not active.

        Raises:
            KeyError: there is no such adapter.
            ValueError: it is active.
        """
        self._check_known(name)
        if name == self._active:
            raise ValueError(
                f"FusedLoRALinear: adapter {name!r} is active; call set_adapter() with another or None first"
            )
        del self.lora_A[name], self.lora_B[name], self.scaling[name]

    @torch.no_grad()
    def merge(self, keep_base: bool = True) -> None:
        """Put the active adapter into the weight that the forward pass uses: W + scaling B A, accumulated in float32.

        Args:
            keep_base: True keeps W beside the merged weight (W's memory twice), and ``weight`` and the state dict stay
                W's; False overwrites W in place, also for a linear layer that shares it, and cannot be undone.

        Raises:
            ValueError: the layer is merged already, or no adapter is active.
        """
        if self.merged:
            raise ValueError(f"FusedLoRALinear: adapter {self._active!r} is merged already")
        if self._active is None:
            raise ValueError("FusedLoRALinear: there is no active adapter to merge")
        target = torch.empty_like(self.weight) if keep_base else self.weight.data
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        lora_a = self.lora_A[self._active].to(wide)
        lora_b = self.lora_B[self._active].to(wide)
        for start in range(0, self.out_features, _MERGE_ROWS):
            rows = slice(start, start + _MERGE_ROWS)
            update = torch.addmm(self.weight[rows].to(wide), lora_b[rows], lora_a, alpha=self.scaling[self._active])
            target[rows].copy_(update)
        if keep_base:
            self._merged_weight = target
        else:
            self._overwritten = True

    def unmerge(self) -> None:
        """Go back to W and the adapter apart; W has its exact bits.

        Raises:
            ValueError: the layer is not merged, or was merged with keep_base=False.
        """
        if not self.merged:
            raise ValueError("FusedLoRALinear: the layer is not merged")
        if self._overwritten:
            raise ValueError("FusedLoRALinear: merge(keep_base=False) overwrote the base weight; it cannot be restored")
        self._merged_weight = None

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., K) to y (..., N)."""
        name = self._active
        if self._merged_weight is not None:
            return F.linear(x, self._merged_weight, self.bias)
        if name is None or self._overwritten:
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

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{name}: r={a.shape[0]} scaling={self.scaling[name]:g}" for name, a in self.lora_A.items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"lora_dropout={self.lora_dropout}, adapters={{{ranks}}}, active={self._active!r}, merged={self.merged}"
        )

    def _adapter_dtype(self) -> torch.dtype:
        if self.adapter_dtype is not None:
            return self.adapter_dtype
        return torch.float32 if self.weight.dtype in _HALF else self.weight.dtype

    def _check_known(self, name: str) -> None:
        if name not in self.scaling:
            raise KeyError(f"FusedLoRALinear: there is no adapter {name!r}; there are {sorted(self.scaling)}")


def _check_adapter(name: str, r: int) -> None:
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"FusedLoRALinear: an adapter's name must be a non-empty string without dots, got {name!r}")
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"FusedLoRALinear: r must be an int of at least 1, got {r!r}")
