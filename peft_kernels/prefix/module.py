"""PrefixEncoder: the trainable prefixes of all layers of a model, with or without a reparametrization."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peft_kernels._core import arguments


class PrefixEncoder(nn.Module):
    """Hold one prefix of keys and values for each layer of a model (Li & Liang 2021, arXiv:2101.00190).

    Semantics: a table of P rows, each the keys and values of all layers; with ``reparam_hidden`` the rows are
    ``W2 tanh(W1 e_i + b1) + b2`` of a smaller table e, which trains more steadily, and ``fold()`` drops that again.

    Args:
        num_layers: of the model.
        num_kv_heads, head_dim: H_kv and D of each layer.
        prefix_length: P; 0 is no prefix.
        reparam_hidden: width of the table and of the hidden layer of the MLP; None trains the rows themselves.
        device, dtype: of the parameters.

    Attributes:
        embedding: (P, 2 * num_layers * num_kv_heads * head_dim), or (P, reparam_hidden) before the MLP. A row is laid
            out as PEFT stores it: layer by layer the key of every head, then the value of every head.

    Raises:
        ValueError: a size is no int or below 1, the length below 0, or the dtype not floating.

    Example:
        >>> encoder = PrefixEncoder(num_layers=2, num_kv_heads=4, head_dim=8, prefix_length=3, reparam_hidden=16)
        >>> prefix_k, prefix_v = encoder()[0]
        >>> prefix_k.shape
        torch.Size([4, 3, 8])
        >>> torch.equal(encoder.fold()()[0][0], prefix_k)
        True
    """

    embedding: nn.Parameter

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        prefix_length: int,
        reparam_hidden: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        for name, value in (sizes | ({} if reparam_hidden is None else {"reparam_hidden": reparam_hidden})).items():
            arguments.integer("PrefixEncoder", name, value, 1)
        arguments.integer("PrefixEncoder", "prefix_length", prefix_length, 0)
        arguments.floating("PrefixEncoder", "dtype", dtype)
        self.num_layers, self.num_kv_heads, self.head_dim = num_layers, num_kv_heads, head_dim
        self.prefix_length, self.reparam_hidden = prefix_length, reparam_hidden
        width = 2 * num_layers * num_kv_heads * head_dim
        columns = width if reparam_hidden is None else reparam_hidden
        self.embedding = nn.Parameter(torch.empty(prefix_length, columns, device=device, dtype=dtype))
        # nn.Embedding's own initialisation, which PEFT's prefix encoder starts from too.
        nn.init.normal_(self.embedding)
        self.mlp: nn.Sequential | None = None
        if reparam_hidden is not None:
            self.mlp = nn.Sequential(
                nn.Linear(reparam_hidden, reparam_hidden, device=device, dtype=dtype),
                nn.Tanh(),
                nn.Linear(reparam_hidden, width, device=device, dtype=dtype),
            )

    def reset_parameters(self) -> None:
        """Draw everything anew, such as after ``to_empty``: normal rows, the MLP as nn.Linear does."""
        nn.init.normal_(self.embedding)
        for layer in self.mlp or ():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()

    def forward(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return (prefix_k, prefix_v) of each layer, parts of one table, each (H_kv, P, D)."""
        rows = self._rows()
        table = rows.view(self.prefix_length, 2 * self.num_layers, self.num_kv_heads, self.head_dim)
        # A copy, not views of the parameter: FSDP frees that when forward returns.
        copy = table.permute(1, 2, 0, 3).clone(memory_format=torch.contiguous_format)
        # Pieces that are no views, which autograd lets nobody change in place where one call returned several.
        pieces = torch.unsafe_split(copy.flatten(0, 1), self.num_kv_heads)
        return tuple(zip(pieces[::2], pieces[1::2], strict=True))

    @torch.no_grad()
    def fold(self) -> PrefixEncoder:
        """Return an encoder without the MLP whose prefixes have the same bits (in autocast: those of this context)."""
        rows = self._rows()
        folded = PrefixEncoder(
            self.num_layers,
            self.num_kv_heads,
            self.head_dim,
            self.prefix_length,
            device=rows.device,
            dtype=rows.dtype,
        )
        folded.embedding.copy_(rows)
        return folded.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"num_layers={self.num_layers}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"prefix_length={self.prefix_length}, reparam_hidden={self.reparam_hidden}"
        )

    def _rows(self) -> Tensor:
        """(P, 2 * num_layers * H_kv * D)."""
        return self.embedding if self.mlp is None else self.mlp(self.embedding)
