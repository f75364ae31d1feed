"""On a GPU the clock decides between AdapterHub's forward and ours; here the clock is the tests'."""

from __future__ import annotations

import pytest

pytest.importorskip("adapters", reason="AdapterHub needs an older transformers; `make test-adapterhub` runs these")

from typing import Any

from adapters.methods.modeling import Adapter, ParallelAdapter

from peft_kernels._core import plans
from peft_kernels.integrations import faster
from peft_kernels.integrations.adapterhub import layers
from tests.adapterhub.parity import assert_same, pair
from tests.clock import Clock


@pytest.mark.parametrize("kind", ["seq", "parallel"])
@pytest.mark.parametrize(("ours", "theirs", "expected"), [(90.0, 100.0, "ours"), (100.0, 90.0, "theirs")])
def test_the_faster_one_runs(
    ours: float, theirs: float, expected: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, plain, report = pair("bert", kind)
    clock = Clock(ours=ours, theirs=theirs)
    clock.install(monkeypatch)
    monkeypatch.setattr(faster, "_decided", plans.Cache())
    monkeypatch.setattr(layers, "_bottleneck", clock.takes("ours", layers._bottleneck))
    for cls in (Adapter, ParallelAdapter):
        monkeypatch.setattr(cls, "forward", clock.takes("theirs", cls.forward))
    monkeypatch.setattr(layers._OWN, "replaced", lambda: None)
    assert_same(fused, plain)
    library: Any = {"seq": Adapter, "parallel": ParallelAdapter}[kind]
    assert set(clock.winners.values()) == {"peft_kernels" if expected == "ours" else "library"}
    assert all(f"library={library.__qualname__} " in key for key in clock.winners)
    reasons = set() if expected == "ours" else {"the library's own forward is faster on this machine"}
    assert set(report.fallback_calls) == reasons
