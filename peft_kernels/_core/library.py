"""Registration of the package's operators with torch.library.

Eager calls never come here (an autograd.Function around a direct launch costs a third of a dispatched custom operator);
the operators exist for torch.compile, torch.export and opcheck.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "peft_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> str:
    """Register an operator for all devices and return its qualified name.

    ``Library.define`` takes the schema as text because ``custom_op`` infers none with optional returns.
    """
    name = schema.split("(", 1)[0]
    qualified = f"{NAMESPACE}::{name}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "default", lib=_LIBRARY)(kernel)
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    return qualified


def register_autograd(qualified: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give an operator of this library its backward formula."""
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
