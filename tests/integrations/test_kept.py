"""What is kept of a merged layer: what tells its weight from another, and where it lies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from peft_kernels.integrations import kept
from peft_kernels.integrations.kept import Kept, fingerprint

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _weight(dtype: torch.dtype = torch.float32, rows: int = 37, columns: int = 24) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)


def _flipped(weight: Tensor, *places: tuple[int, int]) -> Tensor:
    changed = weight.clone()
    for place in places:
        changed[place] = -changed[place]
    return changed


def _bit(weight: Tensor) -> Tensor:
    changed = weight.clone()
    changed.view(torch.int16)[-1, -1] ^= 1
    return changed


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "lowest bit of the last word": _bit,
    "a sign": lambda weight: _flipped(weight, (5, 3)),
    "two signs in a row": lambda weight: _flipped(weight, (5, 3), (5, 4)),
    "two signs in a column": lambda weight: _flipped(weight, (5, 3), (6, 3)),
    "four signs": lambda weight: _flipped(weight, (5, 3), (6, 3), (5, 4), (6, 4)),
    "rows swapped": lambda weight: weight[[1, 0, *range(2, 37)]],
    "columns swapped": lambda weight: weight[:, [1, 0, *range(2, 24)]],
    "all signs": torch.neg,
    "a row less": lambda weight: weight[:-1],
    "another shape": lambda weight: weight.reshape(24, 37),
}


@pytest.mark.parametrize("chunk", [1, 100, 1 << 22])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change: str, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_CHUNK", chunk)
    weight = _weight(dtype)
    assert fingerprint(CHANGES[change](weight)) != fingerprint(weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_alone_count(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory, strides, chunks and torch's own random numbers do not; two zeros and two nans are told apart."""
    weight = _weight(dtype)
    usual, state = fingerprint(weight), torch.get_rng_state()
    assert fingerprint(weight.clone()) == usual == fingerprint(weight.t().contiguous().t())
    assert fingerprint(nn.Parameter(weight)) == usual
    monkeypatch.setattr(kept, "_CHUNK", 100)
    assert fingerprint(weight) == usual and torch.equal(torch.get_rng_state(), state)
    with torch.device("meta"), torch.inference_mode():
        assert fingerprint(weight) == usual
    weight[3, 3] = 0.0
    assert fingerprint(weight) != fingerprint(torch.where(weight == 0, -weight, weight))
    weight[3, 3] = torch.nan
    assert fingerprint(weight) == fingerprint(weight.clone()) != fingerprint(_bit(weight))


def test_a_cast_is_noticed_where_bits_are_the_same() -> None:
    zeros = torch.zeros(3, 4)
    assert len({fingerprint(zeros.to(dtype)) for dtype in DTYPES} | {fingerprint(zeros.t())}) == 5


@pytest.mark.parametrize("shape", [(5,), (0,), (0, 3), (3, 0), (1, 1)])
def test_shapes(shape: tuple[int, ...]) -> None:
    assert fingerprint(torch.zeros(shape)) == fingerprint(torch.zeros(shape))


def test_nothing_to_read() -> None:
    class Sub(Tensor):
        pass

    assert fingerprint(None) is fingerprint(_weight().to("meta")) is fingerprint(_weight().as_subclass(Sub)) is None
    unread = Kept(("a",), {}, {"weight": None}, "device")
    assert not unread.is_of(["a"], {"weight": _weight().to("meta")})


def test_copies_lie_where_they_are_asked_to() -> None:
    weight = nn.Parameter(_weight()).t()
    for where in ("device", "host"):
        copy = kept.copied(weight, where)
        assert torch.equal(copy, weight) and copy.stride() == weight.stride() and not copy.requires_grad
        assert copy.data_ptr() != weight.data_ptr() and not copy.is_pinned()


def test_a_gpu_s_weight_is_asked_to_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(Tensor):
        is_cuda = True

    asked: list[dict[str, object]] = []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda tensor, **how: (asked.append(how), empty_like(tensor))[1])
    assert torch.equal(kept.copied(_weight().as_subclass(OnGpu), "host"), _weight())
    kept.copied(_weight(), "host")
    assert [(how["device"], how["pin_memory"]) for how in asked] == [("cpu", True), ("cpu", False)]


@pytest.mark.gpu
def test_a_gpu_s_weight_is_kept_in_pinned_memory() -> None:
    weight = _weight(torch.bfloat16).cuda()
    copy = kept.copied(weight, "host")
    assert copy.is_pinned() and torch.equal(copy, weight.cpu())
    assert fingerprint(copy) == fingerprint(weight) and kept.copied(weight, "device").is_cuda


def test_it_follows_its_weight() -> None:
    """The weight's device is asked, and what is kept on the host stays there."""
    for where, device in (("device", "meta"), ("host", "cpu")):
        module = nn.Linear(1, 1)
        kept.put(module, Kept(("a",), {"weight": torch.ones(1, 1)}, {}, where))
        kept.follow(module, None)
        kept.follow(module, _Elsewhere())
        assert kept.of(module).originals["weight"].device.type == device
        kept.follow(module, torch.ones(1, 1, device="meta"))
        assert kept.of(module) is None


class _Elsewhere:
    """A tensor on another device, which has memory."""

    device, is_meta = torch.device("meta"), False


def test_what_is_kept_goes_with_its_module() -> None:
    module, kept_before, chosen_before = nn.Linear(1, 1), len(kept._kept), len(kept._chosen)
    kept.put(module, Kept((), {}, {}, "host"))
    kept.choose(module, "host")
    kept.choose(module, None)
    assert kept.chosen(module) == "host" and kept.chosen(nn.Linear(1, 1)) == "device"
    del module
    assert (len(kept._kept), len(kept._chosen)) == (kept_before, chosen_before)


@pytest.mark.parametrize("choice", ["gpu", True, 0, 1, ("host",), torch.ones(2)])
def test_a_wrong_choice(choice: object) -> None:
    with pytest.raises(ValueError, match='f: keep_base must be "device", "host" or False, got'):
        kept.check_choice("f", choice)
    for right in ("device", "host", False, None):
        kept.check_choice("f", right)
