"""SerialAdapter and ParallelAdapter: bottleneck adapters as modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_kernels.adapter.kernels.activations import ACTIVATIONS
from peft_kernels.adapter.op import bottleneck_adapter


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
        for argument, value in (("hidden", hidden), ("bottleneck", bottleneck)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: {argument} must be an int of at least 1, got {value!r}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"{name}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.activation, self.scale = activation, scale
        self.down = nn.Linear(hidden, bottleneck, bias=bias, device=device, dtype=dtype)
        self.up = nn.Linear(bottleneck, hidden, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the down projection as nn.Linear does, and set the up projection to zero."""
        self.down.reset_parameters()
        nn.init.zeros_(self.up.weight)
        if self.up.bias is not None:
            nn.init.zeros_(self.up.bias)

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
        ValueError: a width below 1 or an unknown activation.

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
