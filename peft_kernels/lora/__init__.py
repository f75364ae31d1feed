"""LoRA linear: a frozen linear layer and its low-rank update, as one operation.

    y = x W^T + bias + scale * (drop(x) A^T) B^T          x (..., K), W (N, K), A (r, K), B (N, r), y (..., N)

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.

| backend | runs where            | dtypes                 | rank | status                                          |
| torch   | any device            | fp32, bf16, fp16, fp64 | any  | tested on CPU                                   |
| triton  | CUDA, sm_80 and newer | fp32, bf16, fp16       | any  | tested in Triton's interpreter and compiled for |
|         |                       |                        |      | sm_80, 89, 90, 100; in `auto` where a machine's |
|         |                       |                        |      | own check finds it right                        |
| cuda    | CUDA, sm_80 and newer | bf16, fp16; adapters   | any  | decode: M <= 16, no dropout; dX by cuBLAS.      |
|         |                       | likewise or fp32       |      | Device body tested in the emulator; in `auto`   |
|         |                       |                        |      | as Triton is                                    |
|         | CUDA, sm_90           | bf16, fp16; adapters   | 128  | gemm: N and K multiples of 8; dX and dS in one  |
|         |                       | likewise               |      | launch, dA and dB in one, dropout in both. As   |
|         |                       |                        |      | above: emulator, and in `auto` after a check    |

Map, bottom to top:
    kernels/               tensors and a config in, tensors out
        dropout.py         which elements are dropped: one recipe of bits for all backends
        masks.py           the mask at work: drop(x) and a dropped sum, by C++, Triton, CUDA or torch
        config.py          tile sizes and orders, chosen by pure functions
        triton_fwd.py      `narrow_product`, `rank_product`, `add_rank_product`            (S, update of y; dS, of dX)
        triton_bwd.py      `narrow_and_reduce`, `reduce_rows`                              (dS, dB, dbias; dA)
        triton_rows.py     `narrow_product`, `add_rank_product` where a row has an adapter of its own
        triton_rows_bwd.py `narrow_and_reduce`, `reduce_rows` likewise
        triton_gain.py     `gain_rank_product`, `gain_narrow_and_reduce`                   (y; dS, T, dbias, of dgain)
        triton_product.py  `product`, `add_product`: base products under use_row_invariant (y, dX)
        triton_dropout.py  the mask, recomputed in a kernel's registers; `drop` and `add_dropped` alone
        cuda_workspace.py  memory and nonces of launches whose blocks hand each other results
        cuda_decode.py     the launches of csrc/lora/decode.cuh and decode_rows.cuh        (S, y; M <= 16)
        cuda_decode_four_bit.py  the launch of csrc/lora/decode_four_bit.cuh               (S, y; M <= 16, NF4 or FP4)
        cuda_gemm.py       the launches of csrc/lora/gemm_sm90.cuh                         (S, y; dS, dX)
        cuda_reduce.py     the launch of csrc/lora/reduce.cuh                              (dA, dB, dbias; also dS)
    linear/                the operator `lora_linear`
        problem.py         the arguments of a call, the facts that backends decide on, every check
        torch_impl.py      the torch backend
        torch_steps.py     its products, one by one, which the group's has too
        mask_choice.py     who computes its masks: on a GPU a kernel that is right there
        native.py          the same by torch's operators, recorded one by one, where a call is tiny
        composite.py       the same by torch's differentiable operations, where torch must see inside
        triton_impl.py     what Triton can run, and the order of its launches
        cuda_impl.py       what the CUDA kernels can run, in the order in which they are tried
        op.py              the public function, and the declaration that makes it an operator
    group/                 the operator `lora_group`: several frozen weights that share x, in the same files
    four_bit/              the operator `lora_four_bit`: the group's implementations on 4-bit weights, in the same files
        decoding.py        each weight decoded when its base product asks for it, by `four_bit_weight`'s implementations
    gain/                  the operator `lora_gain`: what `gain=` of `lora_linear` runs, in the same files
        dora.py            `dora_gain`: magnitudes over norms of rows
        qualification.py   the problems by which a machine checks its kernels
    gain_alone/            the operator `lora_gain_alone`: a gain and no update, (IA)^3, in the same files
    gain_four_bit/         the operator `lora_gain_four_bit`: the gain's implementations on a 4-bit weight, likewise
    rows/                  the operator `lora_rows`: adapters by row, what `rows=` of the others runs
    members.py             what these have in common
    update/                the operator `lora_update`: the update of a y that another module made
        qualification.py   the problems by which a machine checks it; its other files are as linear's
    update_rows/           the operator `lora_update_rows`: what `rows=` of `lora_update` runs, by the steps of `rows`
    slots.py               a layer with slots for adapters, and its call
    bank.py                the adapters in them: which are in a slot, who makes room, what is copied when
    qualification.py       the problems by which a machine checks the kernels
    module.py              FusedLoRALinear
    merging.py             merged weights: what it and PEFT's layers sum
    named_adapters.py      its adapters: adding, switching, scaling, disabling
    peft_keys.py           PEFT's names in state dicts that it loads
    base_layer.py          which linear layers it can wrap, and what of torch's cannot hold it
    injection.py           `inject_lora`
    switching.py           the same for all layers of a model, and their adapters' parameters alone
"""

from peft_kernels.lora.gain.dora import dora_gain
from peft_kernels.lora.gain_alone import op as _gain_alone  # noqa: F401 (declares an operator that layers of others call)
from peft_kernels.lora.group.op import Member, lora_group
from peft_kernels.lora.injection import inject_lora
from peft_kernels.lora.linear.mask_choice import lora_linear_dropout_mask
from peft_kernels.lora.linear.op import lora_linear
from peft_kernels.lora.module import FusedLoRALinear
from peft_kernels.lora.switching import (
    add_adapter,
    delete_adapter,
    disable_adapters,
    enable_adapters,
    lora_parameters,
    lora_state_dict,
    set_adapter,
    set_scale,
)
from peft_kernels.lora.update.op import lora_update

__all__ = [
    "FusedLoRALinear",
    "Member",
    "add_adapter",
    "delete_adapter",
    "disable_adapters",
    "dora_gain",
    "enable_adapters",
    "inject_lora",
    "lora_group",
    "lora_linear",
    "lora_linear_dropout_mask",
    "lora_parameters",
    "lora_state_dict",
    "lora_update",
    "set_adapter",
    "set_scale",
]
