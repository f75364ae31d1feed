"""What the decoder owes beside the contract: no graph, transforms, the compiler, memory, dtypes of bytes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import peft_kernels as pk
from benchmarks.memory import peak_bytes
from peft_kernels._core import registration
from peft_kernels.four_bit_weight import torch_impl, triton_impl
from peft_kernels.four_bit_weight.op import OPERATOR as CORE
from peft_kernels.four_bit_weight.problem import Inputs, make_problem
from tests.contract import observe
from tests.contract.operators import CPU
from tests.four_bit_weight.cases import BACKENDS, OPERATOR, Case, arguments, eager, fixed, make

each_kind = pytest.mark.parametrize("case", OPERATOR.kinds, ids=str)


def _wanting(case: Case) -> Any:
    """Tensors whose floats ask for gradients."""
    return make(case, CPU)._make(
        x if x is None or not x.is_floating_point() else x.requires_grad_() for x in make(case, CPU)
    )


def test_it_is_a_namespace() -> None:
    assert pk.four_bit.dequantize is OPERATOR.function
    assert set(pk.four_bit.__all__) == {"QuantizedWeight", "dequantize", "from_quant_state"}


@pytest.mark.parametrize("backend", BACKENDS)
@each_kind
def test_no_gradient_flows(case: Case, backend: str) -> None:
    """Not from what asks for one either, and nothing is saved."""
    with OPERATOR.using(backend) as name, observe.saved(()) as (added, _):
        y = OPERATOR.call(case, _wanting(case), name)
    assert not y.requires_grad and y.is_leaf and not added
    assert torch.equal(y, eager(case, make(case, CPU)))


@each_kind
def test_eager_calls_bypass_the_registered_operator(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CORE, "_operator", None)
    OPERATOR.call(case, make(case, CPU))


@each_kind
def test_compile_and_opcheck(case: Case) -> None:
    """No graph break, one operator, and no gradient there either; what comes after has its own."""
    torch._dynamo.reset()
    recorder, x = observe.Recorder(), torch.ones(case.shape, dtype=case.dtype, requires_grad=True)

    def call(x: Tensor, tensors: Any) -> Tensor:
        return x * OPERATOR.call(case, tensors)

    y = torch.compile(call, fullgraph=True, backend=recorder.compiler)(x, _wanting(case))
    expected = eager(case, make(case, CPU))
    assert torch.equal(y, expected)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)
    ((target, given),) = recorder.calls
    assert str(target) == "peft_kernels.four_bit_dequantize.default" and given[-1] == registration.revision()
    torch.library.opcheck(target, tuple(given))
    assert not hasattr(torch.ops.peft_kernels, "four_bit_dequantize_backward")


@pytest.mark.slow
@each_kind
def test_compile_by_inductor(case: Case) -> None:
    torch._dynamo.reset()
    tensors = make(case, CPU)
    compiled = torch.compile(lambda tensors: OPERATOR.call(case, tensors), fullgraph=True)
    assert torch.equal(compiled(tensors), eager(case, tensors))


@each_kind
def test_transforms(case: Case) -> None:
    """torch sees what is inside: the composite."""
    first, second = make(case, CPU, 0), make(case, CPU, 1)
    names = [name for name, value in first._asdict().items() if value is not None]

    def call(*given: Tensor) -> Tensor:
        return OPERATOR.call(case, first._replace(**dict(zip(names, given, strict=True))))

    tensors = [[value for value in each if value is not None] for each in (first, second)]
    expected = [eager(case, each) for each in (first, second)]
    both = [torch.stack(pair) for pair in zip(*tensors, strict=True)]
    assert torch.equal(torch.func.vmap(call)(*both), torch.stack(expected))
    assert torch.equal(make_fx(call)(*tensors[0])(*tensors[1]), expected[1])
    assert torch.equal(torch.jit.trace(call, tensors[0], check_trace=False)(*tensors[1]), expected[1])
    with observe.WrittenInPlace() as seen:
        y = call(*tensors[0])
    assert not seen.written and not seen.ours and torch.equal(y, expected[0])
    with OPERATOR.using("triton"), pytest.raises(pk.UnsupportedError, match=r"torch\.func.*'torch' or 'auto'"):
        torch.func.vmap(lambda packed: OPERATOR.call(case, first._replace(packed=packed), "triton"))(both[0])


@each_kind
def test_a_mode_sees_a_forced_backend_as_one_operator(case: Case) -> None:
    with OPERATOR.using("triton") as name, observe.WrittenInPlace() as seen:
        y = OPERATOR.call(case, _wanting(case), name)
    assert seen.ours == ["peft_kernels.four_bit_dequantize.default"]
    assert not y.requires_grad and torch.equal(y, eager(case, make(case, CPU)))


@each_kind
def test_meta_tensors_have_shapes_and_dtypes(case: Case) -> None:
    tensors = make(case, CPU)
    y = OPERATOR.call(case, tensors._make(x if x is None else x.to("meta") for x in tensors))
    assert (tuple(y.shape), y.dtype, y.device.type) == (case.shape, case.dtype, "meta")


def test_autocast_changes_nothing() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert OPERATOR.call(Case(), make(Case(), CPU)).dtype == torch.float32


@pytest.mark.parametrize("kind", ["mxfp4", "nvfp4"])
def test_scales_may_be_of_their_own_dtype(kind: str) -> None:
    own = getattr(torch, {"mxfp4": "float8_e8m0fnu", "nvfp4": "float8_e4m3fn"}[kind], None)
    if own is None:
        pytest.skip("torch has no float8_e8m0fnu before 2.7")
    case = fixed(kind, 3, 5)
    tensors = make(case, CPU)
    assert torch.equal(OPERATOR.call(case, tensors._replace(scales=tensors.scales.view(own))), eager(case, tensors))
    with pytest.raises(ValueError, match=r"scales must be uint8, got torch\.float8_e5m2"):
        OPERATOR.call(case, tensors._replace(scales=tensors.scales.view(torch.float8_e5m2)))


def test_blocks_have_the_formats_own_size_by_default() -> None:
    for case in (Case(), Case("fp4"), fixed("mxfp4", 2, 2), fixed("nvfp4", 2, 2)):
        given = arguments(case, make(case, CPU))
        assert torch.equal(pk.four_bit.dequantize(**given | {"block_size": None}), pk.four_bit.dequantize(**given))


def test_global_scale_is_one_by_default() -> None:
    case = fixed("nvfp4", 2, 2)
    given = arguments(case, make(case, CPU))
    plain, half = (pk.four_bit.dequantize(**given | {"global_scale": each}) for each in (None, 0.5))
    assert torch.equal(half, plain / 2)


def test_bytes_may_have_any_shape() -> None:
    case = Case(shape=(6, 32))
    tensors = make(case, CPU)
    expected = eager(case, tensors)
    for packed, scales in itertools.product(
        (tensors.packed.view(-1, 1), tensors.packed.view(1, -1), tensors.packed.view(6, 2, 8)),
        (tensors.scales.view(3, 1), tensors.scales[None]),
    ):
        assert torch.equal(OPERATOR.call(case, tensors._replace(packed=packed, scales=scales)), expected)


def test_sizes_may_come_from_a_tensor_s_shape() -> None:
    case = Case(shape=(6, 32))
    given = arguments(case, make(case, CPU))
    for shape in (torch.Size((6, 32)), [6, 32]):
        assert torch.equal(pk.four_bit.dequantize(**given | {"shape": shape}), pk.four_bit.dequantize(**given))


def test_triton_leaves_the_cpu_to_torch() -> None:
    tensors = make(Case(), CPU)
    call = Inputs(tensors.packed, tensors.scales, None, None, 0.0, 1.0, "nf4", (7, 33), torch.float32, 64, 0)
    with OPERATOR.using("triton"):
        assert "for tests" in triton_impl.IMPLEMENTATION.why_not_auto(make_problem(call))


@pytest.mark.cpu_only
@pytest.mark.parametrize("case", [Case(shape=(1024, 2048), dtype=torch.bfloat16, second=256)], ids=str)
def test_peak_memory_is_the_results_and_a_piece(case: Case) -> None:
    """Of two elements an index and two float32 values; of a block its scale, an index and what they are made of."""
    tensors = make(case, CPU)
    result = case.n * case.dtype.itemsize
    OPERATOR.call(case, tensors, "torch")
    peak = peak_bytes(lambda: OPERATOR.call(case, tensors, "torch"), CPU)
    assert result <= peak <= result + (6 + 16 / case.block) * torch_impl.PIECE + 8192
    assert peak_bytes(lambda: eager(case, tensors), CPU) > 4 * result
