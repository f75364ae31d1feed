"""When AdapterHub's adapters are not fused: the reasons, and what the table in docs/integrations.md says of them.

Apart from the layers, which need AdapterHub: the table is written where it is not installed.
"""

from __future__ import annotations

from peft_kernels.integrations.rules import Support

SUPPORT = Support(
    "AdapterHub: bottleneck adapters",
    (
        "`SeqBnConfig`, `DoubleSeqBnConfig`, `ParBnConfig`, and others with the same parts wherever they are placed",
        "relu, all forms of gelu, swish, tanh, sigmoid, leakyrelu, linear; any `reduction_factor`; constant `scaling`",
        "Stack, Parallel, BatchSplit, Split, Average and Fuse, nested too; gradient checkpointing; autocast",
        "BatchSplit of adapters with one placement and activation, in eager mode: one operation for all of them, "
        "on a GPU where the clock finds it faster, on a CPU where a backend is forced",
    ),
)
OTHER_METHOD = SUPPORT.rule(
    "LoRA, prefix tuning, prompt tuning, ReFT, invertible adapters", "it is AdapterHub's {layer}, not a bottleneck"
)
OTHER_CLASS = SUPPORT.rule(
    "a class derived from AdapterHub's", "it is a {adapter}, not AdapterHub's Adapter or ParallelAdapter"
)
REPLACED = SUPPORT.rule(
    "methods of AdapterHub's or torch's classes that another tool replaced", "{method} was replaced"
)
GATE = SUPPORT.rule("`use_gating`", "it has a gate")
NORM = SUPPORT.rule("`ln_before`, `ln_after`", "it has a layer norm of its own")
STOCHASTIC_DEPTH = SUPPORT.rule("`stochastic_depth`", "it has stochastic depth")
SCALING = SUPPORT.rule(
    '`scaling` of "learned" or "channel", or any other tensor', "its scaling is a {scaling}, not a number"
)
OTHER_PARTS = SUPPORT.rule(
    "`phm_layer` (Compacter), and parts that were replaced, by parametrized ones too", "it is made of {parts}"
)
OTHER_ACTIVATION = SUPPORT.rule(
    "activations such as mish, quick_gelu, relu6, prelu", "its activation is {activation}, which has no equivalent"
)
HOOKED = SUPPORT.rule(
    "hooks on the adapter or inside it: offloading, FSDP of the adapter", "there are hooks on it or on its parts"
)
NO_PLAIN_PARAMETER = SUPPORT.rule(
    "a parameter that is a tensor subclass, or no bias", "a parameter of it is a {parameter}, not a plain tensor"
)
GATING_SCORES = SUPPORT.rule("a call with `output_adapter_gating_scores`", "the call asks for gating scores")
DROPOUT = SUPPORT.rule("a call in training with `dropout`", "its dropout is active")
NO_RESIDUAL = SUPPORT.rule(
    "a call without a residual, or with one that is no plain tensor", "the residual is a {residual}"
)
SEVERAL_DEVICES = SUPPORT.rule("tensors on several devices", "its tensors are on several devices")
SHAPES = SUPPORT.rule(
    "a residual of another shape than x, as AdapterHub would broadcast it",
    "x is {x}, the residual {residual}, the adapter {width} wide",
)
DTYPES = SUPPORT.rule(
    "parameters in another dtype than x outside autocast", "x is {x}, its parameters are {parameters}"
)
RESIDUAL_DTYPE = SUPPORT.rule("a residual neither in x's dtype nor in float32", "x is {x}, the residual {residual}")
BATCH_BLOCK = SUPPORT.rule(
    "BatchSplit of blocks, such as Stack: an operation for each adapter",
    "a child of BatchSplit is a {block}, so each adapter runs by itself",
)
BATCH_ABSENT = SUPPORT.rule(
    "BatchSplit with an adapter that a layer does not have: an operation for each other one",
    "the layer has no {adapter} of BatchSplit's, so each adapter runs by itself",
)
BATCH_OTHER = SUPPORT.rule(
    "BatchSplit with an adapter that is not fused: an operation for each that is",
    "of an adapter of BatchSplit's {reason}, so each adapter runs by itself",
)
BATCH_REPLACED = SUPPORT.rule(
    "BatchSplit where another tool replaced a method that composes it",
    "{method} was replaced, so each adapter of BatchSplit's runs by itself",
)
BATCH_UNLIKE = SUPPORT.rule(
    "BatchSplit of adapters of several kinds, activations or dtypes: an operation for each",
    "BatchSplit's adapters are {kinds}, so each runs by itself",
)
