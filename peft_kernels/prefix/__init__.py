"""Prefix attention: attention to a learned prefix and a sequence, as one operation on two pieces.

    y = softmax(scale q [prefix_k; k]^T + mask) [prefix_v; v]
    q, y (B, H, S, D), k, v (B, H_kv, L, D), prefix (H_kv, P, D) or (B, H_kv, P, D)

Source: Li & Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv:2101.00190.

| backend | runs where            | dtypes                 | D        | status                                         |
| torch   | any device            | fp32, bf16, fp16, fp64 | any      | tested on CPU, its path for CUDA in half       |
|         |                       |                        |          | precision too; joins keys and values for the   |
|         |                       |                        |          | length of a pass                               |
| triton  | CUDA, sm_80 and newer | fp32, bf16, fp16       | 1 to 256 | tested in Triton's interpreter and compiled    |
|         |                       |                        |          | for sm_80, 89, 90, 100; in `auto` where a      |
|         |                       |                        |          | machine's own check finds it right             |

Map, bottom to top:
    kernels/            tensors and a config in, tensors out
        attention.py    what kernels compute: sizes, masks, scale; a segment of keys and values
        config.py       block sizes, chosen by pure functions
        triton_rows.py  how kernels address queries and keys, and what masks
        triton_fwd.py   `attend`, and `merge` of its parts                                   (y, stats)
        triton_bwd.py   `delta`, `grad_q`, `grad_kv`, `grad_prefix`                          (all gradients)
        triton_pieces.py    the prefix's part of y and dq, beside another operator's of the sequence
        fused_operators.py  torch's fused operators for that, what they cannot do, and the paths made of them
    problem.py          the arguments of a call, the facts that backends decide on, every check
    torch_config.py     what the torch backend runs, and in which blocks; chosen by pure functions
    torch_blocks.py     exact softmax by blocks of queries
    torch_fused.py      torch's fused attention behind a concatenation, in one call: a GPU's
    torch_ranges.py     the same over ranges of queries: a CPU's
    torch_impl.py       the torch backend: one of these for each pass
    native.py           the same by torch's operators, recorded one by one, where these cost less
    composite.py        the same by torch's differentiable operations, where torch must see inside
    pieces.py           which of the paths through torch's fused operators is right on this machine
    triton_impl.py      what Triton can run, and the order of its launches
    op.py               the public function, and the declaration that makes it an operator
    qualification.py    the problems by which a machine checks the kernels
    module.py           PrefixEncoder
"""

from peft_kernels.prefix.module import PrefixEncoder
from peft_kernels.prefix.op import prefix_attention

__all__ = ["PrefixEncoder", "prefix_attention"]
