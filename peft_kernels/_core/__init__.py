"""What every kernel family stands on. Nothing here knows a family.

operator.py      one declaration makes an operator: the eager route, and what a backward pass is given
plans.py         what a call does, remembered for all calls that are like it
registration.py  the same operator for torch.library: schema, fake, autograd of compiled calls
signature.py     an operator's arguments in the forms that torch asks for
graph.py         what torch does around a call: transforms, tracers, modes; batched.py, several gradients at once
checks.py        what arguments must be: a table of tensors whose letters bind sizes
arguments.py     what modules may be made of
encoder_layer.py torch's fused encoder layer, which calls no submodule
dispatch.py      which backend runs, and why not another; use_backend; block.py, what it returns
invariance.py    use_row_invariant: a row has the same bits in any batch
candidates.py    what may run a call, made into something to time; timing.py, which of it is fastest here
qualification.py what a family gives for a machine to check its kernels
verdicts.py      which kernels are right on this machine, and when to find it out; child.py, the processes that do
records.py       what was found out, in a file for each machine
explain.py       what a call does, in words
autocast.py      what F.linear does under autocast
rows.py          which adapter each row of a batch uses; row_parts.py, the rows of one slot; slots.py, numbers of each
torch_products.py  products of the torch backends, where BLAS would lose bits
row_products.py  products on a CPU whose rows have the same bits in any batch
errors.py        UnsupportedError
device.py        facts of a device that configs are chosen from
triton_tools.py, triton_math.py  host-side questions about Triton; device functions that several families share
triton_rows.py   the plan of rows within a kernel
launch.py        launches of Triton kernels that pass its binder by, once it has compiled for them
cuda_tools.py, tma.py, extension.py   the CUDA extension: launches, alignment, what TMA reads, loading
"""

import torch

_OLDEST_TORCH = (2, 6)

if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST_TORCH:
    oldest = ".".join(map(str, _OLDEST_TORCH))
    raise ImportError(f"peft_kernels needs torch {oldest} or newer, {torch.__version__} is installed", name="torch")
