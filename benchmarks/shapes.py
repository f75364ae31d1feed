"""Linear layers of real models. Numbers are those of each model's published config.json, named in ``source``."""

from __future__ import annotations

from dataclasses import dataclass

TOKENS_DECODE = (1, 16)
TOKENS_TRAINING = (512, 2048, 8192, 16384)
TOKENS = (*TOKENS_DECODE, *TOKENS_TRAINING)
RANKS = (8, 16, 64)
DROPOUTS = (0.0, 0.1)


@dataclass(frozen=True)
class Model:
    """Sizes of a decoder's layers.

    Attributes:
        hidden, intermediate: widths of the residual stream and of the gated feed-forward layer.
        heads, kv_heads, head_dim: attention; fewer kv_heads than heads is grouped-query attention.
        source: whose config.json.
    """

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    source: str


@dataclass(frozen=True)
class Projection:
    """One linear layer, K to N."""

    model: str
    name: str
    k: int
    n: int


@dataclass(frozen=True)
class Group:
    """Linear layers of one input, K to each of N."""

    model: str
    name: str
    k: int
    n: tuple[int, ...]


LLAMA_3_8B = Model("Llama-3-8B", 4096, 14336, 32, 8, 128, "meta-llama/Meta-Llama-3-8B")
LLAMA_3_70B = Model("Llama-3-70B", 8192, 28672, 64, 8, 128, "meta-llama/Meta-Llama-3-70B")
QWEN_25_7B = Model("Qwen2.5-7B", 3584, 18944, 28, 4, 128, "Qwen/Qwen2.5-7B")
LLAMA_32_1B = Model("Llama-3.2-1B", 2048, 8192, 32, 8, 64, "meta-llama/Llama-3.2-1B")
QWEN_25_32B = Model("Qwen2.5-32B", 5120, 27648, 40, 8, 128, "Qwen/Qwen2.5-32B")

# The most used size first: a run that is cut short has measured it.
MODELS = (LLAMA_3_8B, LLAMA_3_70B, QWEN_25_7B, LLAMA_32_1B)
# A model has fewer groups than layers, so there is time for one more.
GROUPED = (*MODELS, QWEN_25_32B)


def projections(model: Model) -> tuple[Projection, ...]:
    """The distinct linear shapes of one decoder layer.

    q and o agree wherever heads * head_dim is the hidden size, as in all models here; k and v, gate and up always do.
    """
    q_width, kv_width = model.heads * model.head_dim, model.kv_heads * model.head_dim
    attention = (
        (Projection(model.name, "q,o", model.hidden, q_width),)
        if q_width == model.hidden
        else (
            Projection(model.name, "q", model.hidden, q_width),
            Projection(model.name, "o", q_width, model.hidden),
        )
    )
    return (
        *attention,
        Projection(model.name, "k,v", model.hidden, kv_width),
        Projection(model.name, "gate,up", model.hidden, model.intermediate),
        Projection(model.name, "down", model.intermediate, model.hidden),
    )


def groups(model: Model) -> tuple[Group, ...]:
    """The layers of one decoder layer that share their input."""
    q_width, kv_width = model.heads * model.head_dim, model.kv_heads * model.head_dim
    return (
        Group(model.name, "q,k,v", model.hidden, (q_width, kv_width, kv_width)),
        Group(model.name, "gate,up", model.hidden, (model.intermediate, model.intermediate)),
    )
