"""The mode of `use_row_invariant`: where it holds, what it chooses, what it refuses; blocks of rows on a CPU."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import peft_kernels as pk
from peft_kernels import testing
from peft_kernels._core import dispatch, row_products
from peft_kernels._core.device import Hardware
from peft_kernels._core.dispatch import Implementation, requested_backend
from peft_kernels._core.row_products import SIZES, aligned, block_sizes, row_product
from peft_kernels.lora.kernels import config
from peft_kernels.lora.linear.op import OPERATOR
from peft_kernels.lora.linear.problem import Inputs

MODE = dispatch.ROW_INVARIANT


def _call(m: int = 40, k: int = 333, n: int = 157) -> Inputs:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))

    return Inputs(draw(m, k), draw(n, k), draw(8, k), draw(n, 8), 0.7, None, 0.0, None)


def _run(call: Inputs, **options: str) -> Tensor:
    return pk.lora_linear(*call[:6], **options)  # type: ignore[arg-type]


class TestWhatIsInForce:
    def test_beside_backends_in_any_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
        with pk.use_row_invariant():
            assert requested_backend(None) == "auto" + MODE
            assert requested_backend("torch") == "torch" + MODE
            with pk.use_backend("triton"):
                assert requested_backend(None) == "triton" + MODE
                with pk.use_row_invariant(False):
                    assert requested_backend(None) == "triton"
                    assert requested_backend("torch") == "torch"
            monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "cuda")
            assert requested_backend(None) == "cuda" + MODE
            monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE)
            with pk.use_row_invariant(False):
                assert requested_backend(None) == "auto"
        with pk.use_backend("triton"), pk.use_row_invariant():
            assert requested_backend(None) == "triton" + MODE
        assert requested_backend(None) == "auto"

    def test_in_threads_that_the_block_starts(self) -> None:
        seen: list[str] = []
        thread = threading.Thread(target=lambda: seen.append(requested_backend(None)))
        with pk.use_row_invariant():
            thread.start()
            thread.join()
        assert seen == ["auto" + MODE] and requested_backend(None) == "auto"

    def test_decorator(self) -> None:
        @pk.use_row_invariant()
        def ask() -> str:
            return requested_backend(None)

        assert ask() == "auto" + MODE and requested_backend(None) == "auto"

    def test_a_call_alone_warns(self) -> None:
        with pytest.warns(
            UserWarning, match=r"use_row_invariant\(\) forced nothing; with use_row_invariant\(\): \.\.\."
        ):
            pk.use_row_invariant()

    def test_names_of_users_have_no_mode(self) -> None:
        with pytest.raises(ValueError, match="backend must be one of"):
            requested_backend("torch" + MODE)


@pytest.fixture
def row() -> Iterator[tuple[Inputs, Tensor, Tensor]]:
    """A call whose first row has other bits alone without the mode; its y with the mode and without."""
    call = _call()
    with pk.use_row_invariant():
        pinned = _run(call)[:1]
    free = _run(call._replace(x=call.x[:1]))
    assert not torch.equal(pinned, free), "on this machine the tests of this class cannot fail"
    yield call._replace(x=call.x[:1]), pinned, free


class TestWhatRuns:
    def test_plans_know_the_mode(self, row: tuple[Inputs, Tensor, Tensor]) -> None:
        """Of two calls that differ in the mode alone, whichever comes first."""
        call, pinned, free = row
        for _ in range(2):
            with pk.use_row_invariant():
                testing.assert_bitwise_equal("y", _run(call), pinned)
            testing.assert_bitwise_equal("y", _run(call), free)

    def test_backward_is_in_the_mode_of_its_forward_pass(self) -> None:
        call, dy = _call(), torch.randn(40, 157, generator=torch.Generator().manual_seed(1))

        def gradient(rows: int, forward: bool, backward: bool) -> Tensor:
            x = call.x[:rows].clone().requires_grad_()
            with pk.use_row_invariant(forward):
                y = _run(call._replace(x=x))
            with pk.use_row_invariant(backward):
                return torch.autograd.grad(y, x, dy[:rows])[0][:1]

        testing.assert_bitwise_equal("dx", gradient(1, True, False), gradient(40, True, True))
        assert not torch.equal(gradient(1, False, True), gradient(40, False, True))

    def test_compiled_calls_are_traced_again(self, row: tuple[Inputs, Tensor, Tensor]) -> None:
        call, pinned, _ = row
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: _run(call._replace(x=x)), fullgraph=True, backend="aot_eager")
        for _ in range(2):
            with pk.use_row_invariant():
                testing.assert_bitwise_equal("y", compiled(call.x), pinned)
            assert not torch.equal(compiled(call.x), pinned)

    def test_a_block_inside_of_compiled_code(self, row: tuple[Inputs, Tensor, Tensor]) -> None:
        call, pinned, _ = row
        torch._dynamo.reset()

        @torch.compile(backend="aot_eager")
        def compiled(x: Tensor) -> Tensor:
            with pk.use_row_invariant():
                return _run(call._replace(x=x))

        testing.assert_bitwise_equal("y", compiled(call.x), pinned)

    def test_compiled_backward(self) -> None:
        call, dy = _call(), torch.randn(40, 157, generator=torch.Generator().manual_seed(1))
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: _run(call._replace(x=x)), fullgraph=True, backend="aot_eager")
        found = []
        for rows in (1, 40):
            x = call.x[:rows].clone().requires_grad_()
            with pk.use_row_invariant():
                y = compiled(x)
            found.append(torch.autograd.grad(y, x, dy[:rows])[0][:1])
        testing.assert_bitwise_equal("dx", *found)

    def test_explain(self) -> None:
        with pk.use_row_invariant():
            text = pk.explain(_run, _call())
        assert text.startswith("lora_linear: torch row-invariant\n  use_row_invariant() is in force")
        assert "cuda row-invariant: the order of its sums depends on the number of rows" in text

    def test_other_operators_run_as_without_it(self) -> None:
        x = torch.ones(1, 2, 3)
        with pk.use_row_invariant():
            text = pk.explain(pk.prompt_tuning, x, x)
        assert text == pk.explain(pk.prompt_tuning, x, x)

    @pytest.mark.parametrize("sizes", [(0, 5, 4), (3, 0, 4), (3, 5, 0)])
    def test_nothing_to_compute(self, sizes: tuple[int, int, int]) -> None:
        m, k, n = sizes
        x, bias = torch.ones(m, k, requires_grad=True), torch.ones(n)
        with pk.use_row_invariant():
            y = pk.lora_linear(x, torch.ones(n, k), torch.ones(2, k), torch.ones(n, 2), 1.0, bias)
        y.sum().backward()
        assert y.shape == (m, n) and x.grad is not None and x.grad.eq(0).all()
        assert y.eq(1).all()


class TestWhatIsRefused:
    def test_the_cuda_backend(self) -> None:
        with (
            pk.use_row_invariant(),
            pytest.raises(pk.UnsupportedError, match=r"cuda.*order of its sums.*outside of use"),
        ):
            _run(_call(), backend="cuda")

    def test_torch_on_a_gpu(self) -> None:
        """Nothing of it runs there: only what it is told of the problem counts."""
        problem = dataclasses.replace(OPERATOR.make_problem(_call()), device=torch.device("cuda", 0))
        torch_form = dispatch.row_invariant_forms(OPERATOR.implementations)[-1]
        assert "promises no order of a row's sums; the Triton kernels keep one" in str(torch_form.why_not(problem))

    def test_auto_takes_no_cuda_kernel_and_no_clock(self) -> None:
        """Even where both could run."""
        able = [dataclasses.replace(each, why_not=lambda problem: None) for each in OPERATOR.implementations]
        problem = OPERATOR.make_problem(_call())
        for backend, expected in (("auto", "cuda"), ("auto" + MODE, "torch" + MODE)):
            able[0] = dataclasses.replace(able[0], qualification=None, slower=lambda problem: None)
            assert dispatch.select_backend("family", able, problem, backend).name == expected

    def test_transforms(self) -> None:
        call = _call()
        with pk.use_row_invariant(), pytest.raises(pk.UnsupportedError, match="outside of use_row_invariant"):
            torch.func.vmap(lambda x: _run(call._replace(x=x)))(call.x.unsqueeze(1))

    def test_an_operator_without_a_form(self) -> None:
        plain = Implementation("torch", lambda: None, lambda: None)
        (form,) = dispatch.row_invariant_forms((plain,))
        assert form.name == "torch" + MODE and form.why_not(None)


class TestBlocksOfRows:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("k, n", [(1, 1), (3, 70), (80, 96), (333, 5), (2000, 31)])
    def test_products(self, k: int, n: int, dtype: torch.dtype) -> None:
        """Right, and the same for each row wherever it stands; what is behind a row's columns is not read."""
        draw = torch.Generator().manual_seed(k)
        left, right = torch.randn(450, k, generator=draw).to(dtype), torch.randn(k, n, generator=draw).to(dtype)
        bias = torch.randn(n, generator=draw).to(dtype)
        for factor in (right, right.t().contiguous().t(), torch.stack([right, right], 2)[:, :, 0]):
            for addend in (None, bias):
                y = row_product(left, factor, addend)
                exact = left.double() @ right.double() + (0 if addend is None else addend.double())
                if dtype == torch.float64:
                    # Sums of 2000 products, whose order is another one here.
                    assert testing.relative_error(y, exact) < 1e-14
                else:
                    eager = left @ right if addend is None else left @ right + addend
                    testing.assert_close("y", y, eager, exact)
                wide = torch.full((450, k + 9), float("nan"), dtype=dtype)
                wide[:, 4 : k + 4] = left
                for rows in (slice(0, 1), slice(7, 30), slice(50, 449)):
                    testing.assert_bitwise_equal("rows", row_product(wide[rows, 4 : k + 4], factor, addend), y[rows])

    def test_sizes_that_disagree_are_not_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As a processor would have it whose blocks of 96 and of 16 rows sum otherwise than the rest."""
        multiply = row_products._multiply

        def disagreeing(left: Tensor, right: Tensor, bias: Tensor | None, size: int, out: Tensor) -> None:
            multiply(left, right, bias, size, out)
            if size == 96:
                out[50:].mul_(1.5)
            elif size == 16:
                out.mul_(1.5)

        block_sizes.cache_clear()
        monkeypatch.setattr(row_products, "_multiply", disagreeing)
        found = block_sizes(64, 64, (64, 1), 0, torch.float32, False, 1)
        assert found and set(found) <= {*SIZES} - {96, 16}
        block_sizes.cache_clear()

    def test_where_no_size_agrees_each_row_is_a_product(self, monkeypatch: pytest.MonkeyPatch) -> None:
        multiply = row_products._multiply

        def by_place(left: Tensor, right: Tensor, bias: Tensor | None, size: int, out: Tensor) -> None:
            multiply(left, right, bias, size, out)
            out.mul_(torch.arange(1, len(out) + 1, dtype=out.dtype).unsqueeze(1))

        block_sizes.cache_clear()
        monkeypatch.setattr(row_products, "_multiply", by_place)
        assert block_sizes(64, 64, (64, 1), 0, torch.float32, False, 1) == (1,)
        left, right = torch.randn(5, 64), torch.randn(64, 64)
        testing.assert_bitwise_equal("y", row_product(left, right)[2:3], row_product(left[2:3], right))
        block_sizes.cache_clear()

    def test_products_that_cancel_leave_errors_alone(self) -> None:
        """Else sums of another order would look the same."""
        for dtype, eps in ((torch.float32, 2.0**-23), (torch.bfloat16, 2.0**-23), (torch.float64, 2.0**-52)):
            draw = torch.Generator().manual_seed(0)
            x, right, _ = row_products._cancelling(512, 64, (64, 1), 0, dtype, False, draw)
            left = (x.unsqueeze(0) @ right).abs()
            # Of 512 terms of up to 2^8 each.
            assert left.gt(0).float().mean() > 0.5 and left.max() < 512 * 2**10 * eps

    def test_behind_the_columns_are_zeros(self) -> None:
        """oneDNN may read them."""
        block = row_products._zeros(torch.empty(3, 5), 16)
        memory = block.as_strided((16, 16), (16, 1))
        assert block.shape == (16, 5) and block.stride() == (16, 1) and memory.eq(0).all()

    def test_aligned(self) -> None:
        stack = torch.randn(9, 64)
        assert aligned(stack) is stack
        for part in (stack[:, 3:7], stack.view(-1)[1:13].view(3, 4), torch.randn(5, 3).t()):
            copy = aligned(part)
            assert torch.equal(copy, part) and copy.data_ptr() % 64 == 0 and copy.stride() == (part.shape[1], 1)


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_configs_of_kernels_do_not_know_the_rows(arch: int) -> None:
    """One range of K, one tile."""
    hardware = Hardware(arch=arch, sm_count=132)
    for r in (1, 16, 40, 512):
        for dtype, exact in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)):
            found = {
                config.narrow_product_config(m, 4096, r, dtype, exact, hardware, None, True) for m in (1, 16, 17, 9999)
            }
            assert len(found) == 1 and found.pop().splits == 1
            free = {config.narrow_product_config(m, 4096, r, dtype, exact, hardware) for m in (1, 16, 17, 9999)}
            assert len(free) > 1
