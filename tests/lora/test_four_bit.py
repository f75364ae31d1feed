"""``lora_linear`` and ``lora_group`` on 4-bit weights beyond the contract: bits, what is decoded when, what is kept."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import peft_kernels as pk
from peft_kernels._core.triton_tools import why_not_environment
from peft_kernels.four_bit_weight import torch_impl as decoder
from python_ref import compare
from tests.contract import observe
from tests.contract.draw import Draw

SEED = 20240229
M, K, N, R = 28, 40, (24, 9, 18), (5, 16, 3)
each_backend = pytest.mark.parametrize(
    "backend",
    [
        "torch",
        pytest.param(
            "triton", marks=pytest.mark.skipif(why_not_environment() is not None, reason=str(why_not_environment()))
        ),
    ],
)


def _weight(n: int, k: int = K, nested: bool = True, seed: int = 0) -> pk.four_bit.QuantizedWeight:
    """NF4 in blocks of 64."""
    draw, blocks = Draw(seed + n), -(-n * k // 64)
    packed = torch.randint(0, 256, ((n * k + 1) // 2,), generator=draw.generator).to(torch.uint8)
    scales = torch.randint(0, 256, (blocks,), generator=draw.generator).to(torch.uint8)
    second = (draw.normal(256).float(), draw.normal(-(-blocks // 256)).float(), 256, 0.1)
    if not nested:
        scales, second = draw.normal(blocks).float(), None
    return pk.four_bit.QuantizedWeight(packed, "nf4", (n, k), torch.float32, scales, 64, second)


def _decoded(weight: pk.four_bit.QuantizedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    return pk.four_bit.dequantize(**weight._replace(dtype=dtype)._asdict())


def _members(dtype: torch.dtype = torch.float32) -> list[pk.Member]:
    """Of 4-bit weights; factors and biases want gradients, and the last has no bias."""
    draw = Draw(7)
    return [
        pk.Member(
            _weight(n),
            draw.normal(r, K, std=K**-0.5).to(dtype).requires_grad_(),
            draw.normal(n, r, std=r**-0.5).to(dtype).requires_grad_(),
            0.5 + j,
            draw.normal(n).to(dtype).requires_grad_() if j < 2 else None,
        )
        for j, (n, r) in enumerate(zip(N, R, strict=True))
    ]


def _x(dtype: torch.dtype = torch.float32) -> Tensor:
    return Draw(3).normal(2, M // 2, K).to(dtype).requires_grad_()


def _leaves(members: list[pk.Member]) -> list[Tensor]:
    return [each for member in members for each in member[1:] if isinstance(each, Tensor)]


def _loss(ys: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([y.float().sin().sum() for y in ys]).sum()


@pytest.mark.parametrize(("dtype", "p"), [(torch.float32, 0.0), (torch.float32, 0.3), (torch.bfloat16, 0.3)])
@each_backend
def test_bits_are_those_of_a_group_on_decoded_weights(dtype: torch.dtype, p: float, backend: str) -> None:
    """Masks too, which are ``lora_linear``'s in the first lane; and of all gradients."""
    x, members = _x(dtype), _members(dtype)
    plain = [member._replace(weight=_decoded(member.weight, dtype)) for member in members]
    leaves, results = [x, *_leaves(members)], []
    for given in (members, plain):
        ys = pk.lora_group(x, given, dropout_p=p, seed=SEED, backend=backend)
        results.append([*ys, *torch.autograd.grad(_loss(ys), leaves)])
    for got, expected in zip(*results, strict=True):
        compare.assert_bitwise_equal("result", got, expected)
    alone = pk.lora_linear(x, *members[0], dropout_p=p, seed=SEED, backend=backend)
    # Without masks all members' S is one product, whose bits another width may change.
    tolerance = 0.0 if p else 1e-5
    torch.testing.assert_close(alone, results[0][0], rtol=tolerance, atol=tolerance)


@contextlib.contextmanager
def _decodings() -> Iterator[list[weakref.ref[Tensor]]]:
    """Every decoded weight of the torch backend; at most one is there at a time."""
    made: list[weakref.ref[Tensor]] = []
    implementation, forward = decoder.IMPLEMENTATION, decoder.IMPLEMENTATION.forward

    def watched(*arguments: Any) -> Tensor:
        assert all(each() is None for each in made)
        weight = forward(*arguments)
        made.append(weakref.ref(weight))
        return weight

    object.__setattr__(implementation, "forward", watched)
    try:
        yield made
    finally:
        object.__setattr__(implementation, "forward", forward)


@pytest.mark.parametrize("m", [2, M])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_one_weight_is_there_at_a_time_and_none_between_the_passes(p: float, m: int) -> None:
    """And in a backward pass where x has a gradient: else there is nothing to decode for."""
    members = _members()
    for needs_x, used in itertools.product((True, False), ((0, 1, 2), (1,))):
        x = _x().flatten(0, 1)[:m].detach().requires_grad_(needs_x)
        with _decodings() as made:
            ys = pk.lora_group(x, members, dropout_p=p, seed=SEED, backend="torch")
            assert len(made) == 3 and made[-1]() is None
            _loss(tuple(ys[j] for j in used)).backward()
        assert len(made) == 3 + len(used) * needs_x and made[-1]() is None


def _saved(call: Any, members: list[pk.Member]) -> list[int]:
    """Elements of what autograd keeps, beside arguments."""
    known = [x for member in members for part in (*member, *member.weight, *member.weight.nested)
             for x in [part] if isinstance(x, Tensor)]  # fmt: skip
    with observe.saved(known) as (added, _):
        loss = call(_x())
    assert loss.grad_fn is not None
    return sorted(added.values())


def test_nothing_of_a_weight_s_size_is_kept() -> None:
    """Compiled too: its partitioner may not take what was decoded for the backward pass."""
    members, kept = _members(), []
    sizes = {4 * n * K for n in N}

    def call(x: Tensor) -> Tensor:
        return _loss(pk.lora_group(x, members, dropout_p=0.3, seed=SEED))

    assert not sizes.intersection(_saved(call, members))
    torch._dynamo.reset()

    def compiler(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        made = [node.meta["val"] for node in graph.graph.nodes if node.op == "call_function"]
        kept.extend(tuple(each.shape) for value in made for each in (value if isinstance(value, list) else [value])
                    if isinstance(each, Tensor))  # fmt: skip
        return observe.make_boxed_func(torch.fx.Interpreter(graph).run)

    compiled = torch.compile(call, fullgraph=True, backend=observe.aot_autograd(fw_compiler=compiler))
    x, leaves = _x(), _leaves(members)
    got, expected = (torch.autograd.grad(run(x), [x, *leaves]) for run in (compiled, call))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert kept and not {(n, K) for n in N}.intersection(kept)


@each_backend
def test_under_autocast_weights_are_decoded_to_its_dtype(backend: str) -> None:
    x, members = _x(), _members()
    plain = [member._replace(weight=_decoded(member.weight)) for member in members]
    with torch.autocast("cpu", torch.bfloat16):
        ys, expected = (pk.lora_group(x, given, backend=backend) for given in (members, plain))
    for y, wanted in zip(ys, expected, strict=True):
        assert y.dtype == torch.bfloat16
        compare.assert_bitwise_equal("y", y, wanted)
    (dx,) = torch.autograd.grad(_loss(ys), x)
    assert dx.dtype == torch.float32 and bool(dx.isfinite().all())


def test_rows_have_the_same_bits_in_any_batch_where_asked() -> None:
    x, (member, *_) = _x().flatten(0, 1), _members()
    with pk.use_row_invariant():
        whole, some = pk.lora_linear(x, *member), pk.lora_linear(x[5:7], *member)
    compare.assert_bitwise_equal("rows", some, whole[5:7])


def test_adapters_by_row_want_a_plain_weight() -> None:
    x, members = _x(), _members()
    rows = pk.Rows.of([0, -1], known=1, length=M // 2)
    with pytest.raises(ValueError, match="lora_linear: rows must be None where a weight is a QuantizedWeight"):
        pk.lora_linear(x, *members[0], rows=rows)
    with pytest.raises(ValueError, match="lora_group: rows must be None where a weight is a QuantizedWeight"):
        pk.lora_group(x, members, rows=rows)


@pytest.mark.parametrize("autocast", [False, True])
def test_plain_and_4_bit_weights_do_not_mix(autocast: bool) -> None:
    x, members = _x(), _members()
    plain = members[0]._replace(weight=_decoded(members[0].weight))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with pytest.raises(ValueError, match=r"members\[1\].weight must be a torch.Tensor, got QuantizedWeight"):
            pk.lora_group(x, [plain, members[1]])
        with pytest.raises(ValueError, match=r"members\[1\].weight must be a QuantizedWeight, as .*, got Tensor"):
            pk.lora_group(x, [members[1], plain])
