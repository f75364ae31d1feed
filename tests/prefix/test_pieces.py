"""Two pieces: torch's fused operators are called as their schemas say, refused where they cannot, and checked first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.aot import HARDWARE
from peft_kernels._core import verdicts
from peft_kernels.judge import check_case
from peft_kernels.prefix import pieces, qualification, triton_impl
from peft_kernels.prefix.kernels import config, fused_operators
from peft_kernels.prefix.kernels.fused_operators import CUDNN, EFFICIENT, FLASH, PATHS, FusedOperator, Sequence
from peft_kernels.prefix.problem import Inputs, Needs, PrefixAttentionProblem, make_problem
from tests.prefix import stand_in
from tests.prefix.cases import OPERATOR, Case, arguments, make

CUDA = torch.device("cuda")
HOPPER = HARDWARE[90]


def _problem(**changes: Any) -> PrefixAttentionProblem:
    problem = PrefixAttentionProblem(
        b=2, h=4, h_kv=2, s=48, l=48, p=5, d=64, dtype=torch.bfloat16, prefix_dtype=torch.bfloat16, causal=True,
        scale=0.125, shared=True, padded=False, device=CUDA,
    )  # fmt: skip
    return replace(problem, **changes)


def _sequence(problem: PrefixAttentionProblem) -> Sequence:
    """As a model has it: heads in the last dimension but one of memory."""

    def rows(tokens: int, heads: int) -> Tensor:
        shape = problem.b, tokens, heads, problem.d
        return torch.empty(shape, dtype=problem.dtype, device=problem.device).transpose(1, 2)

    mask = torch.empty((problem.b, problem.l), dtype=torch.bool, device=problem.device) if problem.padded else None
    keys = (rows(problem.l, problem.h_kv) for _ in range(2))
    return Sequence(rows(problem.s, problem.h), *keys, mask)


CALLED = (
    (FLASH, _problem()),
    (FLASH, _problem(s=20, causal=True)),
    (FLASH, _problem(causal=False, h_kv=4, dtype=torch.float16)),
    (CUDNN, _problem()),
    (CUDNN, _problem(s=20, causal=False)),
    (EFFICIENT, _problem(padded=True, s=20)),
    (EFFICIENT, _problem(padded=True, causal=False, h_kv=4)),
)


@pytest.fixture(autouse=True)
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)


@pytest.fixture
def without_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have none; what reads one is tested on its own."""
    monkeypatch.setattr(fused_operators, "_aligned", lambda x: x)


@pytest.mark.usefixtures("without_addresses")
@pytest.mark.parametrize(("operator", "problem"), CALLED)
def test_forward_operators_take_the_call(operator: FusedOperator, problem: PrefixAttentionProblem) -> None:
    """Against torch's schema and its own idea of the results' shapes, on a device that need not be there."""
    assert fused_operators.why_not_pieces(problem) is operator.why_not(problem, HOPPER) is None
    with FakeTensorMode():
        y, lse = operator.forward(problem, _sequence(problem))
        assert (y.shape, y.dtype, y.stride(-1)) == ((2, 4, problem.s, 64), problem.dtype, 1)
        assert (lse.shape, lse.dtype, lse.is_contiguous()) == ((2, 4, problem.s), torch.float32, True)


@pytest.mark.usefixtures("without_addresses")
@pytest.mark.parametrize(("operator", "problem"), [(each, problem) for each, problem in CALLED if each is FLASH])
def test_backward_operators_take_the_call(operator: FusedOperator, problem: PrefixAttentionProblem) -> None:
    with FakeTensorMode():
        sequence = _sequence(problem)
        lse = torch.empty((2, 4, problem.s), device=CUDA)
        gradients = operator.backward(problem, sequence, sequence.q, lse, sequence.q)
        for gradient, like in zip(gradients, (sequence.q, sequence.k, sequence.v), strict=True):
            assert (gradient.shape, gradient.dtype) == (like.shape, like.dtype)


@pytest.mark.parametrize(("operator", "problem"), [(each, problem) for each, problem in CALLED if each is EFFICIENT])
def test_efficient_backward_takes_the_call(operator: FusedOperator, problem: PrefixAttentionProblem) -> None:
    """Torch's own idea of its shapes has other arguments than the operator: the schema is asked, and then results made.

    Its kernel needs lse up to a multiple of 32 queries, and rows of the bias that begin at multiples of 16.
    """
    problem = replace(problem, device=torch.device("cpu"))
    sequence, seen = _sequence(problem), []

    def run(*given: Any, **named: Any) -> tuple[Tensor, ...]:
        with pytest.raises(NotImplementedError, match="CPU"):
            actual(*given, **named)
        seen.append((given, named))
        q, k, v = given[1:4]
        return torch.empty_like(q), torch.ones_like(k), torch.ones_like(v), torch.empty(0)

    actual = torch.ops.aten._efficient_attention_backward.default
    lse = torch.zeros((2, 4, problem.s))
    with mock.patch.object(fused_operators, "_aten") as aten:
        aten._efficient_attention_backward.default = run
        dq, dk, dv = operator.backward(problem, sequence, sequence.q, lse, sequence.q)
    assert dq.shape == sequence.q.shape
    assert dk.shape == dv.shape == sequence.k.shape
    # Summed over the heads that read a key head.
    assert torch.equal(dk, torch.full_like(dk, problem.group))
    ((given, named),) = seen
    bias, saved = given[4], given[10]
    assert named == {"scale": problem.scale, "num_splits_key": 1}
    assert bias.shape == (2, 4, problem.s, problem.l)
    assert bias.stride()[1:] == (0, 0, 1)
    assert bias.stride(0) % 16 == 0
    assert torch.isfinite(bias).all()
    assert saved.shape == (2, 4, -(-problem.s // 32) * 32)
    assert (saved[..., problem.s :] == torch.inf).all()


@pytest.mark.parametrize(
    ("path", "change", "reason"),
    [
        ("flash", {"dtype": torch.float32}, "half precision"),
        ("flash", {"p": 0}, "no prefix"),
        ("flash", {"l": 0, "causal": False}, "no sequence"),
        ("flash", {"s": 49}, "see no key"),
        ("flash", {"scale": -0.1}, "positive"),
        ("flash", {"d": 264}, "at most 256"),
        ("flash", {"d": 60}, "multiple of 8"),
        ("flash", {"padded": True}, "padding"),
        ("flash both", {}, "use_deterministic_algorithms"),
        ("cudnn", {"s": 47}, "upper left"),
        ("cudnn", {"d": 136}, "at most 128"),
        ("cudnn", {"padded": True}, "padding"),
        ("efficient", {}, "padding"),
        ("efficient", {"padded": True, "d": 60}, "multiple of 8"),
        ("wide", {"d": 128, "s": 256, "l": 256, "dtype": torch.float32}, "fit"),
        ("wide", {"d": 128, "s": 60, "l": 256}, "filled"),
        ("wide", {"d": 128, "s": 256, "l": 255}, "filled"),
        ("wide", {"s": 256, "l": 256}, "fit"),
        ("wide", {"d": 124, "s": 256, "l": 256}, "TMA"),
    ],
)
def test_what_operators_cannot_do_is_refused(path: str, change: dict[str, Any], reason: str) -> None:
    with mock.patch.object(pieces, "hardware", return_value=HOPPER):
        assert reason in (pieces.why_not_possible(path, _problem(**change)) or "")


def test_cudnn_makes_no_gradients() -> None:
    """Torch asks it for none that are the same twice."""
    assert not any(taken.both for taken in PATHS.values() if taken.operator is CUDNN)
    assert not CUDNN.gives_same_bits()


def test_flash_gradients_need_determinism() -> None:
    """It is read when a backward pass runs, as its operator reads it; a warning is not enough."""
    both = PATHS["flash both"]
    assert not both.gives_gradients()
    assert fused_operators.deterministic(both.gives_gradients)()
    assert not both.gives_gradients()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert not both.gives_gradients()
        assert fused_operators.deterministic(both.gives_gradients)()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    with mock.patch.object(pieces, "hardware", return_value=HOPPER):
        assert pieces.why_not_possible("flash both", _problem(deterministic=True)) is None


@pytest.mark.parametrize("asked", [False, True])
def test_problems_say_what_torch_was_asked_for(asked: bool) -> None:
    case = Case()
    call = OPERATOR.op.Inputs(**arguments(case, make(case, torch.device("cpu"))) | {"scale": 1.0})
    torch.use_deterministic_algorithms(asked)
    try:
        assert make_problem(call).deterministic is asked
    finally:
        torch.use_deterministic_algorithms(False)


def test_only_paths_that_are_right_here_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def why_not(name: str, checked: object, problem: object) -> str | None:
        asked.append((name, checked))
        return None if name == "flash path" else "it was wrong"

    monkeypatch.setattr(verdicts, "why_not", why_not)
    monkeypatch.setattr(pieces, "hardware", lambda device: HOPPER)
    assert pieces.paths(_problem()) == ("own", "flash")
    assert asked == [(f"{path} path", qualification.OF_PATH[path]) for path in ("flash", "cudnn")]


def test_on_a_cpu_there_is_one_path() -> None:
    assert pieces.paths(_problem(device=torch.device("cpu"))) == ("own",)


def test_every_path_has_its_check() -> None:
    names = {each.name for each in triton_impl.CHECKED}
    assert names == {pieces.name_of(path) for path in (pieces.WIDE, *PATHS)}
    assert set(triton_impl.CHECKED) <= set(OPERATOR.op.OPERATOR.checked)


@pytest.mark.parametrize("path", PATHS)
def test_problems_of_a_check_are_its_path_s(path: str) -> None:
    """A part whose problems were refused would say nothing of the path."""
    (checked,) = (each for each in triton_impl.CHECKED if each.name == pieces.name_of(path))
    operator, _ = PATHS[path]
    for part in checked.qualification.parts:
        for case in checked.qualification.cases(part, HOPPER):
            problem = _problem(
                b=case.b, h=case.h, h_kv=case.h_kv, s=case.s, l=case.l, p=case.p, d=case.d, dtype=case.dtype,
                causal=case.causal, padded=case.padded, deterministic=True,
            )  # fmt: skip
            assert (fused_operators.why_not_pieces(problem) or operator.why_not(problem, HOPPER)) is None, str(case)
            assert part in qualification.OF_PATH[path].touched(replace(problem, prefix_dtype=case.prefix_dtype))


def test_wide_blocks_are_checked_where_they_are_taken() -> None:
    """A problem of theirs has several blocks of rows and keys, and one is split where there are multiprocessors."""
    checked, splits = qualification.OF_PATH["wide"], []
    for part in checked.parts:
        for case in checked.cases(part, HOPPER):
            problem = _problem(
                b=case.b, h=case.h, h_kv=case.h_kv, s=case.s, l=case.l, p=case.p, d=case.d, dtype=case.dtype,
                prefix_dtype=case.prefix_dtype, causal=case.causal, padded=case.padded,
            )  # fmt: skip
            assert config.takes_wide_blocks(problem, HOPPER), str(case)
            assert part in checked.touched(problem)
            splits.append(config.wide_forward_config(problem, HOPPER).splits)
    assert {1, 2} <= set(splits)


def test_wide_blocks_attend_as_the_others_do() -> None:
    if reason := triton_impl.IMPLEMENTATION.why_not_environment():
        pytest.skip(reason)
    (checked,) = (each for each in triton_impl.CHECKED if each.name == pieces.name_of(pieces.WIDE))
    # Blocks of 128 keys: one that every row sees, the causal border's, and a part of one.
    case = replace(checked.qualification.cases("bfloat16 d128", HOPPER)[0], b=1, h=1, h_kv=1, s=130, l=300, p=5, d=72)
    with _descriptors() as made:
        assert check_case(OPERATOR.op.OPERATOR, checked, case, torch.device("cpu")) <= 1.0
    assert made.call_args.args[1] == [1, 1, 128, 128]


def _descriptors() -> Any:
    """Sees what is described to TMA."""
    fwd, _ = triton_impl._kernels()
    return mock.patch.object(fwd, "descriptor", side_effect=fwd.descriptor)


def _inputs(problem: PrefixAttentionProblem) -> Inputs:
    """Heads in the last dimension but one of memory, where nan is between rows and after the last one."""

    def keys() -> Tensor:
        memory = torch.full((problem.b, problem.l + 20, problem.h_kv, problem.d + 8), torch.nan, dtype=problem.dtype)
        view = memory[:, : problem.l, :, : problem.d]
        return view.copy_(torch.randn(view.shape)).transpose(1, 2)

    torch.manual_seed(0)
    q = torch.randn(problem.b, problem.h, problem.s, problem.d).to(problem.dtype)
    prefix = torch.randn(2, problem.h_kv, problem.p, problem.d).to(problem.dtype)
    mask = torch.rand(problem.b, problem.l) < 0.7 if problem.padded else None
    return Inputs(q, keys(), keys(), *prefix, problem.causal, problem.scale, mask)


@pytest.mark.parametrize(("splits", "padded"), [(1, False), (2, True)])
def test_descriptors_bring_what_pointers_do(splits: int, padded: bool) -> None:
    """Bit for bit, with blocks past the last key and the last column."""
    if reason := triton_impl.IMPLEMENTATION.why_not_environment():
        pytest.skip(reason)
    problem = _problem(l=300, d=72, padded=padded, device=torch.device("cpu"))
    inputs, fwd = _inputs(problem), triton_impl._kernels()[0]
    wide = replace(config.wide_forward_config(problem, HOPPER), splits=splits)
    merge = config.merge_config(problem.d, splits)
    by_tma, by_pointers = (
        fwd.attend(
            problem,
            inputs.q,
            fwd.Segment(inputs.prefix_k, inputs.prefix_v),
            fwd.Segment(inputs.k, inputs.v, inputs.key_padding_mask),
            replace(wide, USE_TMA=use_tma),
            merge,
        )
        for use_tma in (wide.USE_TMA, False)
    )
    for tma_s, pointers_s in zip(by_tma, by_pointers, strict=True):
        assert torch.isfinite(tma_s).all()
        assert torch.equal(tma_s, pointers_s)


@pytest.mark.parametrize("shift", [1, 8])
def test_keys_that_tma_cannot_read_take_the_first_path(shift: int) -> None:
    if reason := triton_impl.IMPLEMENTATION.why_not_environment():
        pytest.skip(reason)
    problem = _problem(b=1, s=64, l=256, d=72, causal=False, device=torch.device("cpu"))
    assert config.takes_wide_blocks(problem, HOPPER)
    inputs = _inputs(problem)
    moved = torch.empty(inputs.v.numel() + shift, dtype=problem.dtype)[shift:].view(inputs.v.shape).copy_(inputs.v)
    inputs = inputs._replace(v=moved)
    with _descriptors() as made:
        wide = triton_impl.forward(problem, inputs, pieces.WIDE)
    assert made.called is (shift == 8)
    if shift == 1:
        assert torch.equal(wide[0], triton_impl.forward(problem, inputs)[0])


@pytest.mark.thorough
@pytest.mark.parametrize("path", ["flash", "flash both", "cudnn", "efficient both"])
def test_a_check_runs_its_path(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an operator of a CPU in the place of a GPU's: what it is given in the backward pass decides the verdict."""
    if reason := triton_impl.IMPLEMENTATION.why_not_environment():
        pytest.skip(reason)
    ran: list[str] = []
    operator, both = PATHS[path]

    def noted(name: str, run: Any) -> Any:
        return lambda *given: (ran.append(name), run(*given))[1]

    replaced = replace(
        operator, forward=noted("forward", stand_in.forward), backward=noted("backward", stand_in.backward)
    )
    monkeypatch.setitem(PATHS, path, fused_operators.Pieces(replaced, both))
    (checked,) = (each for each in triton_impl.CHECKED if each.name == pieces.name_of(path))
    case = checked.qualification.cases("bfloat16 d16", HOPPER)[0]
    case = replace(case, s=20, l=20 if path == "cudnn" else 24)
    assert check_case(OPERATOR.op.OPERATOR, checked, case, torch.device("cpu")) <= 1.0
    assert set(ran) == ({"forward", "backward"} if both else {"forward"})

    def of_the_sequence_alone(attention: Any, sequence: Any, y: Tensor, lse: Tensor, dy: Tensor) -> Any:
        return stand_in.backward(attention, sequence, *stand_in.forward(attention, sequence), dy)

    if both:
        monkeypatch.setitem(
            PATHS, path, fused_operators.Pieces(replace(replaced, backward=of_the_sequence_alone), both)
        )
        with pytest.raises(AssertionError, match=r"exceeds|finite"):
            check_case(OPERATOR.op.OPERATOR, checked, case, torch.device("cpu"))


@pytest.mark.parametrize("needed", ["q", "k", "prefix_v"])
def test_what_is_not_asked_for_is_none(needed: str) -> None:
    if reason := triton_impl.IMPLEMENTATION.why_not_environment():
        pytest.skip(reason)
    case = Case(dtype=torch.bfloat16)
    with OPERATOR.using("triton-both"):
        call = OPERATOR.op.Inputs(**arguments(case, make(case, torch.device("cpu"))) | {"scale": 1.0})
        problem = make_problem(call)
        y, stats = triton_impl.forward(problem, call)
        needs = Needs(*(name == needed for name in Needs._fields))
        gradients = triton_impl.backward(problem, call, y, stats, y, needs)
    assert {name for name, gradient in gradients._asdict().items() if gradient is not None} == {needed}


def test_rows_that_kernels_cannot_load_are_copied() -> None:
    base = torch.arange(4 * 64 + 8, dtype=torch.float32).to(torch.bfloat16)
    whole, shifted = base[: 4 * 64].view(1, 1, 4, 64), base[1 : 4 * 64 + 1].view(1, 1, 4, 64)
    narrow = base[:256].view(1, 1, 4, 64)[..., :60]
    ragged = base[:240].view(1, 1, 4, 60)[..., :56]
    assert fused_operators._aligned(whole) is whole
    assert fused_operators._aligned(narrow) is narrow
    for x in (shifted, ragged):
        copied = fused_operators._aligned(x)
        assert copied.data_ptr() % 16 == 0
        assert torch.equal(copied, x)
