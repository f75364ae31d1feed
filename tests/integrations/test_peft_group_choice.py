"""On a GPU the clock decides about a group; here the clock is the tests'."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import peft_kernels as pk
from peft_kernels.integrations import faster
from peft_kernels.integrations.peft import eligibility, grouped, groups, layers
from peft_kernels.integrations.peft.layers import PeftLinear
from tests.clock import Clock
from tests.integrations.siblings import build, given, inner


class TestClock:
    """ "auto": a group runs where the clock finds it faster than the calls of its members, whatever these run."""

    @staticmethod
    def _applied(monkeypatch: pytest.MonkeyPatch, **costs: float) -> tuple[Any, Any, Clock]:
        monkeypatch.setattr(groups, "_is_worth_it", lambda layers: True)
        fused = build()
        plain = copy.deepcopy(fused)
        pk.apply(fused)
        fused(given())
        clock = Clock(**costs)
        clock.install(monkeypatch)
        monkeypatch.setattr(faster, "_decided", faster.Cache())
        call = grouped.group_call
        monkeypatch.setattr(grouped, "group_call", clock.takes("group", call))
        monkeypatch.setattr(layers, "_fused", clock.takes("ours", layers._fused))
        monkeypatch.setattr(PeftLinear, "forward", clock.takes("theirs", PeftLinear.forward))
        monkeypatch.setattr(eligibility.OWN, "replaced", lambda: None)
        return inner(fused).first, inner(plain).first, clock

    @pytest.mark.parametrize(
        ("costs", "expected"),
        [
            ({"group": 250.0, "ours": 100.0, "theirs": 120.0}, ["group", "ours"]),
            ({"group": 350.0, "ours": 100.0, "theirs": 120.0}, ["ours"] * 4),
            ({"group": 250.0, "ours": 120.0, "theirs": 80.0}, ["theirs"] * 4),
            ({"group": 200.0, "ours": 120.0, "theirs": 80.0}, ["group", "theirs"]),
        ],
        ids=str,
    )
    def test_what_is_faster_runs(
        self, costs: dict[str, float], expected: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fused, plain, clock = self._applied(monkeypatch, **costs)
        x = given()
        fused(x)
        assert clock.ran(lambda: fused(x)) == expected
        torch.testing.assert_close(fused(x), plain(x))

    def test_forced_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fused, _, clock = self._applied(monkeypatch, group=1000.0, ours=1.0, theirs=1.0)
        place = grouped.place_of(fused.q)[0]
        place.is_forced = True
        assert clock.ran(lambda: fused(given()))[0] == "group"

    def test_masks_that_peft_draws_stay_peft_s(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A layer that the clock leaves to PEFT draws other masks alone: it is in no group while it draws any."""
        fused, _, clock = self._applied(monkeypatch, group=1.0, ours=120.0, theirs=80.0)
        for layer in fused.children():
            layer.lora_dropout["default"] = nn.Dropout(0.5)
        fused(given())
        assert clock.ran(lambda: fused(given())) == ["theirs"] * 4

    @pytest.mark.parametrize(
        ("name", "expected"),
        [("q", ["theirs", "group", "group"]), ("k", ["group", "theirs", "group"]), ("v", ["group", "theirs", "group"])],
    )
    def test_one_member_s_masks_are_peft_s(
        self, name: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The other two are a group; o draws its own mask in the lane of its place."""
        fused, _, clock = self._applied(monkeypatch, group=1.0, ours=120.0, theirs=80.0)
        for layer in fused.children():
            layer.lora_dropout["default"] = nn.Dropout(0.5)
        monkeypatch.setattr(layers, "is_faster_by_peft", lambda layer, call: layer is getattr(fused, name))
        fused(given())
        assert clock.ran(lambda: fused(given())) == expected
