"""SerialAdapter and ParallelAdapter: bottleneck adapters as modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_kernels._core import arguments
from peft_kernels._core.checks import scalar
from peft_kernels.adapter.kernels.activations import ACTIVATIONS
from peft_kernels.adapter.op import bottleneck_adapter


class _Up(nn.Linear):
    """A linear layer that starts at zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class _Adapter(nn.Module):
    """What both adapters hold: two linear layers, of which the second starts at zero, so that the branch is zero."""

    def __init__(
        self,
        hidden: int,
        bottleneck: int,
        activation: str = "relu",
        scale: float = 1.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        arguments.integer(name, "hidden", hidden, 1)
        arguments.integer(name, "bottleneck", bottleneck, 1)
        scalar(name, "scale", scale)
        arguments.floating(name, "dtype", dtype)
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise ValueError(f"{name}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.activation, self.scale = activation, scale
        self.down = nn.Linear(hidden, bottleneck, bias=bias, device=device, dtype=dtype)
        self.up = _Up(bottleneck, hidden, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the down projection as nn.Linear does, and set the up projection to zero."""
        self.down.reset_parameters()
        self.up.reset_parameters()

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, scale={self.scale:g}"

    def _apply_to(self, x: Tensor, residual: Tensor) -> Tensor:
        return bottleneck_adapter(
            x,
            self.down.weight,
            self.up.weight,
            down_bias=self.down.bias,
            up_bias=self.up.bias,
            residual=residual,
            activation=self.activation,
            scale=self.scale,
        )


class SerialAdapter(_Adapter):
    """Add a bottleneck's output to its own input (Houlsby et al. 2019, arXiv:1902.00751).

    Semantics: ``y = x + scale * up(act(down(x)))``. A fresh adapter is the identity: ``up`` starts at zero.

    Args:
        hidden: width of x and y.
        bottleneck: width between the projections.
        activation: a name that ``bottleneck_adapter`` knows.
        scale: factor of the branch.
        bias: whether the projections have biases.
        device, dtype: of the parameters; float32 parameters beside half-precision x are never cast down.

    Attributes:
        down, up: nn.Linear, which hold the parameters; they are not called, so their hooks do not run.

    Raises:
        ValueError: a width that is no int or below 1, an unknown activation, a scale that is no number, or a dtype that
            is not floating.

    Example:
        >>> adapter = SerialAdapter(4, 2, activation="gelu")
        >>> x = torch.randn(3, 4)
        >>> torch.equal(adapter(x), x)
        True
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., hidden) to y (..., hidden)."""
        return self._apply_to(x, x)


class ParallelAdapter(_Adapter):
    """Add a bottleneck's output to what a sublayer made of the same input (He et al. 2022, arXiv:2110.04366).

    Semantics: ``y = sublayer_output + scale * up(act(down(x)))``. A fresh adapter returns the sublayer's output.

    Args, Attributes, Raises: as ``SerialAdapter``.

    Example:
        >>> adapter = ParallelAdapter(4, 2)
        >>> x, out = torch.randn(3, 4), torch.randn(3, 4)
        >>> torch.equal(adapter(x, out), out)
        True
    """

    def forward(self, x: Tensor, sublayer_output: Tensor) -> Tensor:
        """Map x (..., hidden) and a sublayer's output (..., hidden) to their sum (..., hidden)."""
        return self._apply_to(x, sublayer_output)
