"""4-bit weights: NF4 and FP4 of bitsandbytes, MXFP4 and NVFP4, decoded to a dtype. ``peft_kernels.four_bit`` is this.

    W[i] = table[nibble i] * scale[i // block]                        i in the flattened weight

| backend | runs where            | dtypes                 | status                                                   |
| torch   | any device            | fp32, bf16, fp16, fp64 | tested on CPU                                            |
| triton  | CUDA, sm_80 and newer | fp32, bf16, fp16       | tested in Triton's interpreter and compiled for sm_80,   |
|         |                       |                        | 89, 90, 100; in `auto` where a machine's own check finds |
|         |                       |                        | it right                                                 |

Map, bottom to top:
    kernels/            tensors and a config in, tensors out
        formats.py      the four formats as data
        config.py       block sizes, chosen by pure functions
        triton_fwd.py   `decode`                                                             (W)
    problem.py          the arguments of a call, the facts that backends decide on, every check
    torch_impl.py       the torch backend
    composite.py        the same by torch's own operations, where torch must see inside
    triton_impl.py      what Triton can run
    op.py               the public function, and the declaration that makes it an operator
    qualification.py    the problems by which a machine checks the kernel
    quant_state.py      bitsandbytes' weights as arguments
"""

from peft_kernels.four_bit_weight.op import dequantize
from peft_kernels.four_bit_weight.quant_state import QuantizedWeight, from_quant_state

__all__ = ["QuantizedWeight", "dequantize", "from_quant_state"]
