"""When AdapterHub's adapters are not fused: the reasons, and what the table in docs/integrations.md says of them.

Apart from the layers, which need AdapterHub: the table is written where it is not installed.
"""

from __future__ import annotations

from peft_kernels.integrations.rules import Rule, Support

OTHER_METHOD = Rule(
    "LoRA, prefix tuning, prompt tuning, ReFT, invertible adapters", "it is AdapterHub's {layer}, not a bottleneck"
)
OTHER_CLASS = Rule(
    "a class derived from AdapterHub's", "it is a {adapter}, not AdapterHub's Adapter or ParallelAdapter"
)
GATE = Rule("`use_gating`", "it has a gate")
NORM = Rule("`ln_before`, `ln_after`", "it has a layer norm of its own")
STOCHASTIC_DEPTH = Rule("`stochastic_depth`", "it has stochastic depth")
LEARNED_SCALING = Rule('`scaling` of "learned" or "channel"', "its scaling is learned")
OTHER_PARTS = Rule(
    "`phm_layer` (Compacter), and parts that were replaced, by parametrized ones too", "it is made of {parts}"
)
OTHER_ACTIVATION = Rule(
    "activations such as mish, quick_gelu, relu6, prelu", "its activation is {activation}, which has no equivalent"
)
HOOKED = Rule(
    "hooks on the adapter or inside it: offloading, FSDP of the adapter", "there are hooks on it or on its parts"
)
NO_PLAIN_PARAMETER = Rule(
    "a parameter that is a tensor subclass, or no bias", "a parameter of it is a {parameter}, not a plain tensor"
)
GATING_SCORES = Rule("a call with `output_adapter_gating_scores`", "the call asks for gating scores")
DROPOUT = Rule("a call in training with `dropout`", "its dropout is active")
NO_RESIDUAL = Rule("a call without a residual", "the residual is a {residual}")
SEVERAL_DEVICES = Rule("tensors on several devices", "its tensors are on several devices")
DEVICE = Rule('tensors on a device without autocast, such as "meta"', "x is on {device}")
SHAPES = Rule(
    "a residual of another shape than x, as AdapterHub would broadcast it",
    "x is {x}, the residual {residual}, the adapter {width} wide",
)
DTYPES = Rule("parameters in another dtype than x outside autocast", "x is {x}, its parameters are {parameters}")
RESIDUAL_DTYPE = Rule("a residual neither in x's dtype nor in float32", "x is {x}, the residual {residual}")

SUPPORT = Support(
    "AdapterHub: bottleneck adapters",
    (
        "`SeqBnConfig`, `DoubleSeqBnConfig`, `ParBnConfig`, and others with the same parts wherever they are placed",
        "relu, all forms of gelu, swish, tanh, sigmoid, leakyrelu, linear; any `reduction_factor`; constant `scaling`",
        "Stack, Parallel, BatchSplit, Split, Average and Fuse, nested too; gradient checkpointing; autocast",
    ),
    (
        OTHER_METHOD,
        OTHER_CLASS,
        GATE,
        NORM,
        STOCHASTIC_DEPTH,
        LEARNED_SCALING,
        OTHER_PARTS,
        OTHER_ACTIVATION,
        HOOKED,
        NO_PLAIN_PARAMETER,
        GATING_SCORES,
        DROPOUT,
        NO_RESIDUAL,
        SEVERAL_DEVICES,
        DEVICE,
        SHAPES,
        DTYPES,
        RESIDUAL_DTYPE,
    ),
)
