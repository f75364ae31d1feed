"""Bottleneck adapter: two small projections with an activation between, added to a residual, as one operation.

    y = residual + scale * (act(x Wd^T + bd) Wu^T + bu)     x (..., K), Wd (r, K), Wu (N, r), residual and y (..., N)

Serial, residual = x: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv:1902.00751.
Parallel, residual = sublayer(x): He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning",
arXiv:2110.04366.

| backend | runs where            | dtypes                 | r   | status                                              |
| torch   | any device            | fp32, bf16, fp16, fp64 | any | tested on CPU                                       |
| triton  | CUDA, sm_80 and newer | fp32, bf16, fp16       | any | tested in Triton's interpreter, compiled for sm_80, |
|         |                       |                        |     | 89, 90 and 100; in `auto` where a machine's own     |
|         |                       |                        |     | check finds it right                                |
| cuda    | CUDA, sm_90           | bf16, fp16             | 128 | forward only, backward is torch's; tested in a      |
|         |                       |                        |     | host emulator; in `auto` as Triton is               |

Map, bottom to top:
    kernels/                   tensors and a config in, tensors out
        activations.py         the activations by name, in torch
        config.py              tile sizes and paths, chosen by pure functions
        triton_activations.py  the activations and their derivatives in a kernel's registers
        triton_products.py     the two products as device functions: into the bottleneck and out of it
        triton_fwd.py          `bottleneck`, `narrow_product`, `wide_product`                   (z, y; also dz, dx)
        triton_bwd.py          `bottleneck_grad`, `reduce_rows`                                 (dz, dx; dW, db)
        triton_rows.py         `bottleneck_by_slot`, `bottleneck_grad_by_slot`, `reduce_by_slot`, `copy_others`  (rows)
        cuda_bottleneck.py     the launch of csrc/adapter/forward_sm90.cuh                      (z, y)
    problem.py                 the arguments of a call, the facts that backends decide on, every check
    torch_wide.py              torch's products in a wider dtype than x's
    torch_impl.py              the torch backend
    native.py                  the same by torch's operators, recorded one by one, where a call is tiny
    composite.py               the same by torch's differentiable operations, where torch must see inside
    triton_impl.py             what Triton can run, and the order of its launches
    cuda_impl.py               what the CUDA kernel can run
    op.py                      the public function, and the declaration that makes it an operator
    rows/                      an adapter for each row, as an operator of its own: problem, op, implementations
    qualification.py           the problems by which a machine checks the kernels
    module.py                  SerialAdapter, ParallelAdapter
    insertion.py               adapters in a transformer block
"""

from peft_kernels.adapter.insertion import insert_adapters
from peft_kernels.adapter.module import ParallelAdapter, SerialAdapter
from peft_kernels.adapter.op import bottleneck_adapter

__all__ = ["ParallelAdapter", "SerialAdapter", "bottleneck_adapter", "insert_adapters"]
