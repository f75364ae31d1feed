"""Adapters in a transformer block: after a sublayer (Houlsby et al. 2019) or beside it (He et al. 2022).

A sublayer is what a block adds to its residual stream, the attention or the feed-forward layer. Its output is tapped
before that addition, by forward hooks, so that the block's own code, parameters and state-dict names stay.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from peft_kernels._core.encoder_layer import refuse_nested
from peft_kernels.adapter.module import ParallelAdapter, SerialAdapter

ATTRIBUTE = "adapters"


class Sublayer(NamedTuple):
    """Where a sublayer begins and ends, as paths of submodules within the block.

    Attributes:
        source: the module whose first argument is the sublayer's input.
        target: the module whose output is what the block adds to its residual stream.
    """

    source: str
    target: str


# By the name of the class, so that no library has to be imported. In both blocks the last step before the addition is
# dropout, of which the adapter sees the output.
SUBLAYERS: dict[str, dict[str, Sublayer]] = {
    "TransformerEncoderLayer": {
        "attention": Sublayer("self_attn", "dropout1"),
        "feed_forward": Sublayer("linear1", "dropout2"),
    },
    "BertLayer": {
        "attention": Sublayer("attention.self", "attention.output.dropout"),
        "feed_forward": Sublayer("intermediate", "output.dropout"),
    },
}


class _After:
    """Forward hook: the adapter maps the sublayer's output."""

    def __init__(self, adapter: SerialAdapter) -> None:
        self.adapter = adapter

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.adapter(output)


class _Kept(threading.local):
    """A sublayer's input, in the thread that runs the block."""

    x: Tensor | None = None

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


class _Beside:
    """Two hooks: one keeps the sublayer's input, the other gives it to the adapter with the sublayer's output."""

    def __init__(self, adapter: ParallelAdapter) -> None:
        self.adapter = adapter
        self.kept = _Kept()

    def keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.kept.x = args[0] if args else next(iter(kwargs.values()))

    def add(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x, self.kept.x = self.kept.x, None
        if x is None:
            raise RuntimeError("insert_adapters: the sublayer's target ran before its source; its paths are wrong")
        return self.adapter(x, output)


def insert_adapters(
    block: nn.Module,
    adapters: Mapping[str, SerialAdapter | ParallelAdapter],
    sublayers: Mapping[str, Sublayer | tuple[str, str]] | None = None,
) -> Callable[[], None]:
    """Insert adapters into a transformer block, in place; their type says where.

    Semantics: with ``f(x)`` the named sublayer, the block adds ``adapter(f(x))`` to its residual stream where the
    adapter is a SerialAdapter (Houlsby et al. 2019, arXiv:1902.00751), and ``adapter(x, f(x))`` where it is a
    ParallelAdapter (He et al. 2022, arXiv:2110.04366). Fresh adapters change nothing. The block's ``forward``,
    parameters and names stay; the adapters are its submodule ``adapters``, with names such as
    ``adapters.attention.down.weight``.

    Args:
        block: an nn.TransformerEncoderLayer, a BertLayer of transformers, or, with ``sublayers``, any module. Hooks
            take an nn.TransformerEncoderLayer off its fused inference path, which would not call the sublayers; an
            nn.TransformerEncoder around it needs ``enable_nested_tensor=False``, or raises an error that says so.
        adapters: by the sublayer's name; for the blocks named above "attention" and "feed_forward".
        sublayers: (source, target) by name: paths within the block of the module whose first argument is the sublayer's
            input, and of the module whose output is added to the residual stream. None takes those of the known blocks.

    Returns:
        A function that takes the adapters out again.

    Raises:
        ValueError: the block is of no known class and has no ``sublayers``, a name or path is unknown, an adapter is
            neither serial nor parallel, or the block has adapters already; from the block's forward: nested input.

    Example:
        >>> import torch
        >>> block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
        >>> x = torch.randn(5, 1, 8)
        >>> before = block(x)
        >>> remove = insert_adapters(block, {"attention": SerialAdapter(8, 2), "feed_forward": ParallelAdapter(8, 2)})
        >>> torch.equal(block(x), before)
        True
        >>> remove()
    """
    known = _sublayers(block, adapters, sublayers)
    if hasattr(block, ATTRIBUTE):
        raise ValueError(f"insert_adapters: {type(block).__name__} has an attribute {ATTRIBUTE!r} already")
    ends = {name: _ends(block, known[name]) for name in adapters}
    held = nn.ModuleDict(dict(adapters))
    hooks = [block.register_forward_pre_hook(refuse_nested)]
    for name, adapter in adapters.items():
        source, target = ends[name]
        if isinstance(adapter, SerialAdapter):
            hooks.append(target.register_forward_hook(_After(adapter)))
        else:
            beside = _Beside(adapter)
            hooks.append(source.register_forward_pre_hook(beside.keep, with_kwargs=True))
            hooks.append(target.register_forward_hook(beside.add))
    block.add_module(ATTRIBUTE, held)
    for adapter in adapters.values():
        adapter.train(block.training)

    def remove() -> None:
        for hook in hooks:
            hook.remove()
        delattr(block, ATTRIBUTE)

    return remove


def _sublayers(
    block: nn.Module,
    adapters: Mapping[str, SerialAdapter | ParallelAdapter],
    sublayers: Mapping[str, Sublayer | tuple[str, str]] | None,
) -> Mapping[str, Sublayer | tuple[str, str]]:
    """The sublayers that the adapters name, after every check but that of the paths."""
    if not isinstance(block, nn.Module) or isinstance(block, (nn.Sequential, nn.ModuleList)):
        raise ValueError(
            f"insert_adapters: block must be a module that calls its submodules by name, got {type(block).__name__}"
        )
    kind = next((cls.__name__ for cls in type(block).__mro__ if cls.__name__ in SUBLAYERS), None)
    known = sublayers if sublayers is not None else SUBLAYERS.get(kind or "")
    if known is None:
        raise ValueError(
            f"insert_adapters: block must be one of {', '.join(SUBLAYERS)} unless sublayers are given, "
            f"got {type(block).__name__}"
        )
    for name, adapter in adapters.items():
        if name not in known:
            raise ValueError(f"insert_adapters: adapters must be named after {', '.join(known)}, got {name!r}")
        if "." in name or not name or hasattr(nn.ModuleDict(), name):
            raise ValueError(
                "insert_adapters: a sublayer's name must be non-empty, without dots and no attribute of nn.ModuleDict, "
                f"got {name!r}"
            )
        if not isinstance(adapter, (SerialAdapter, ParallelAdapter)):
            raise ValueError(
                f"insert_adapters: adapter {name!r} must be a SerialAdapter or a ParallelAdapter, "
                f"got {type(adapter).__name__}"
            )
    return known


def _ends(block: nn.Module, paths: Sublayer | tuple[str, str]) -> list[nn.Module]:
    if not isinstance(paths, tuple) or len(paths) != 2:
        raise ValueError(f"insert_adapters: a sublayer must be a tuple (source, target), got {paths!r}")
    try:
        return [block.get_submodule(path) for path in paths]
    except AttributeError as error:
        raise ValueError(f"insert_adapters: {type(block).__name__} has no submodules {paths!r} ({error})") from None
