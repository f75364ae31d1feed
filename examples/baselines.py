"""What fine-tuning has to beat: guessing the commoner class, and a linear classifier on the encoder as it comes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.model import HIDDEN, Texts, mean_token
from examples.task import CLASSES

# Weight decays of the probe; the validation split chooses one, so that the probe is as good as it can be.
DECAYS = (1e-2, 1e-1, 1.0, 10.0)
_ITERATIONS = 200
_BATCH = 256


@dataclass(frozen=True)
class Baseline:
    """A baseline's numbers on the training and on the held-out split."""

    name: str
    parameters: int
    loss: float
    accuracy: float
    settings: dict[str, object]
    train_loss: float


def accuracy(answers: Tensor, labels: Tensor) -> float:
    """Return the share of texts whose answer is their label."""
    return (answers == labels).double().mean().item()


def majority(train: Texts, test: Texts) -> Baseline:
    """Guess the class that is commoner in training, with the probability that it has there."""
    shares = torch.bincount(train.labels, minlength=len(CLASSES)).double() / len(train)
    logits, commoner = shares.log(), shares.argmax()
    return Baseline(
        name="majority guess",
        parameters=0,
        loss=F.cross_entropy(logits.expand(len(test), -1), test.labels).item(),
        accuracy=accuracy(commoner, test.labels),
        settings={"class": int(commoner)},
        train_loss=F.cross_entropy(logits.expand(len(train), -1), train.labels).item(),
    )


def linear_probe(encoder: nn.Module, train: Texts, validation: Texts, test: Texts) -> Baseline:
    """Fit logistic regression on the frozen encoder's mean tokens, standardised, until it has converged."""
    raw = {name: _features(encoder, texts) for name, texts in (("train", train), ("val", validation), ("test", test))}
    mean, deviation = raw["train"].mean(dim=0), raw["train"].std(dim=0)
    features = {name: (values - mean) / deviation for name, values in raw.items()}
    probes = {decay: _fit(features["train"], train.labels, decay) for decay in DECAYS}
    best = max(DECAYS, key=lambda decay: accuracy(probes[decay](features["val"]).argmax(dim=1), validation.labels))
    with torch.no_grad():
        logits, train_logits = probes[best](features["test"]), probes[best](features["train"])
    return Baseline(
        name="linear probe, encoder frozen",
        parameters=sum(parameter.numel() for parameter in probes[best].parameters()),
        loss=F.cross_entropy(logits, test.labels).item(),
        accuracy=accuracy(logits.argmax(dim=1), test.labels),
        settings={"weight decay": best},
        train_loss=F.cross_entropy(train_logits, train.labels).item(),
    )


@torch.no_grad()
def _features(encoder: nn.Module, texts: Texts) -> Tensor:
    encoder.eval()
    parts = []
    for rows in torch.arange(len(texts)).split(_BATCH):
        ids, mask, _ = texts.take(rows)
        parts.append(mean_token(encoder(input_ids=ids, attention_mask=mask).last_hidden_state, mask))
    return torch.cat(parts)


def _fit(features: Tensor, labels: Tensor, decay: float) -> nn.Linear:
    probe = nn.Linear(HIDDEN, len(CLASSES), device=features.device)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(features), labels) + decay / 2 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return probe
