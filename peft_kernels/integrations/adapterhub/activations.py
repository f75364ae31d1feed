"""AdapterHub's names for the activations that ``bottleneck_adapter`` has, and the name here for each."""

from __future__ import annotations

# As AdapterHub's configuration spells them, in lower case. The first name of a value is the one that files get. The
# variants of gelu differ in how they are computed, not in what.
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "swish": "silu",
    "silu": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "leakyrelu": "leaky_relu",
    "leaky_relu": "leaky_relu",
    "linear": "identity",
}

# Files that name no version: what a name meant then.
BEFORE_VERSIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
