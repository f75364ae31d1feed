"""Prompt tuning: learned prompts in front of token embeddings, for one prompt or an ensemble, as one write.

    y[n B + b] = [prompts[n]; tokens[b]]          prompts (N, P, D), tokens (B, L, D), y (N B, P + L, D)

Source: Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv:2104.08691.

| backend | runs where           | dtypes                | status                                                    |
| torch   | any device           | fp32, bf16, fp16, fp64 | tested on CPU                                             |
| triton  | CUDA, sm_80 and newer | fp32, bf16, fp16      | tested in Triton's interpreter and compiled for sm_80, 89, |
|        |                      |                       | 90, 100; in `auto` where a machine's own check finds it   |
|        |                      |                       | right                                                     |

Map, bottom to top:
    kernels/            tensors and a config in, tensors out
        config.py       block sizes, chosen by pure functions
        triton_fwd.py   `concatenate`                                                        (y)
        triton_bwd.py   `sum_terms`                                                          (both gradients)
    problem.py          the arguments of a call, the facts that backends decide on, every check
    torch_impl.py       the torch backend
    native.py           the same by torch's operators, recorded one by one, where these cost less
    composite.py        the same by torch's differentiable operations, where torch must see inside
    triton_impl.py      what Triton can run, and the order of its launches
    op.py               the public function, and the declaration that makes it an operator
    qualification.py    the problems by which a machine checks the kernels
    module.py           PromptEmbedding, PromptEnsemble
"""

from peft_kernels.prompt.module import PromptEmbedding, PromptEnsemble
from peft_kernels.prompt.op import prompt_tuning

__all__ = ["PromptEmbedding", "PromptEnsemble", "prompt_tuning"]
