"""nn.TransformerEncoderLayer's fused inference path, which reads its submodules' weights and calls none of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def refuse_nested(block: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook: torch leaves that path where a hook is, but may have made nested tensors for it by then.

    Raises:
        ValueError: the block's input is nested; says how to avoid it.
    """
    if args and isinstance(args[0], Tensor) and args[0].is_nested:
        raise ValueError(
            f"{type(block).__name__} with adapters or LoRA layers takes no nested tensors; "
            "set use_nested_tensor = False on the nn.TransformerEncoder, or build it with enable_nested_tensor=False"
        )
