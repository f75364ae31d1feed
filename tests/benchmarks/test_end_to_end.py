"""The benchmark of whole training steps: what it compares, what it refuses, what it writes."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import torch

import peft_kernels as pk
from benchmarks import decoders, end_to_end, harness, record, report
from benchmarks.decoders import Step, TorchSerialAdapter
from benchmarks.roofline import Ceilings

pytest.importorskip("peft")
pytest.importorskip("transformers")

pytestmark = pytest.mark.cpu_only


def small(method: str) -> Step:
    return Step("tiny", method, batch=1, sequence=16, layers=1, size=4, dtype="float32")


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> harness.Session:
    """Nothing of this asks how fast the machine is, or what a compiler makes of a model: capturing it is enough."""
    ceilings = Ceilings(1e10, {"float32": 1e11, "bfloat16": 1e11})
    monkeypatch.setattr(harness, "measure_ceilings", lambda *_: ceilings)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    return harness.start_session(torch.device("cpu"), quick=True, commit=None)


def only(session: harness.Session, *names: str) -> harness.Session:
    """Capturing a model for a variant that a test says nothing about takes seconds."""
    return dataclasses.replace(session, without=frozenset(end_to_end.VARIANTS[1:]) - set(names))


@pytest.mark.parametrize("method", decoders.METHODS)
def test_variants_agree_and_are_recorded(method: str, session: harness.Session) -> None:
    lines = end_to_end.measure(small(method), session)
    assert [line["provider"] for line in lines] == list(end_to_end.VARIANTS)
    for line in lines:
        record.check(line)
        assert line["problem"] == dataclasses.asdict(small(method))
        assert line["status"] == "ok", line["reason"]
        assert line["repetitions"] == end_to_end.QUICK_REPETITIONS
        assert line["peak_memory_bytes"] > 0
        if line["provider"] != end_to_end.REFERENCE:
            assert line["error"]["loss"] <= end_to_end.LOSS_BOUND["float32"]
            assert line["error"]["gradient"] <= end_to_end.GRADIENT_BOUND["float32"]


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_patched_model_runs_the_packages_layers_on_the_same_parameters(method: str) -> None:
    model = decoders.build(small(method), torch.device("cpu"))
    double, why_not = decoders.patched(model)
    assert why_not is None
    assert double is not None
    theirs, ours = list(model.named_parameters()), list(double.named_parameters())
    assert [name for name, _ in theirs] == [name for name, _ in ours]
    assert all(a is b for (_, a), (_, b) in zip(theirs, ours, strict=True))
    assert not any(isinstance(module, TorchSerialAdapter) for module in double.modules())
    changed = [type(a) for a, b in zip(double.modules(), model.modules(), strict=True) if type(a) is not type(b)]
    assert len(changed) == (7 if method == "lora" else 2)


@pytest.mark.parametrize("variant", ["compiled", "patched"])
def test_another_result_is_refused(variant: str, session: harness.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale that is wrong by a hundredth, in one layer of seven."""
    made = end_to_end.variants

    def one_off(model: torch.nn.Module, backend: str) -> list[end_to_end.Variant]:
        found = made(model, backend)
        off = next(one for one in found if one.name == variant)
        layer = next(module for module in off.model.modules() if isinstance(getattr(module, "scaling", None), dict))
        layer.scaling = {name: 1.01 * scale for name, scale in layer.scaling.items()}
        return found

    monkeypatch.setattr(end_to_end, "variants", one_off)
    status = {line["provider"]: line for line in end_to_end.measure(small("lora"), only(session, variant))}
    assert status[variant]["status"] == "failed"
    assert status[variant]["reason"].startswith("wrong result")
    assert "median_us" not in status[variant]
    assert status["unpatched"]["status"] == "ok"


def test_without_the_reference_nothing_is_called_right(
    session: harness.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken")

    monkeypatch.setattr(TorchSerialAdapter, "forward", broken)
    lines = end_to_end.measure(small("adapter"), only(session, "patched"))
    assert {line["provider"]: line["status"] for line in lines if line["status"] != "skipped"} == {
        "unpatched": "failed",
        "patched": "failed",
    }
    assert lines[0]["reason"] == "RuntimeError: broken"


def test_start_values_are_back_after_a_measurement(session: harness.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoders.build(small("adapter"), torch.device("cpu"))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    monkeypatch.setattr(decoders, "build", lambda *_: model)
    end_to_end.measure(small("adapter"), only(session, "patched"))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_records_stand_where_the_readmes_tables_do_not_look(
    session: harness.Session, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(end_to_end, "steps", lambda *_: [small("adapter")])
    arguments = ["--out", str(tmp_path), "--quick", "--without", "compiled", "--without", "patched, compiled"]
    assert end_to_end.main(arguments) == 0
    file = tmp_path / session.device_slug / "end_to_end" / "tiny.jsonl"
    statuses = {line["provider"]: line["status"] for line in record.load(file)}
    assert statuses == {"unpatched": "ok", "compiled": "skipped", "patched": "ok", "patched, compiled": "skipped"}
    assert report.load_results(tmp_path) == {}
    assert "tokens/s" in capsys.readouterr().out

    # Asked again, it has nothing left to do, but for another backend.
    assert end_to_end.main([*arguments, "--resume"]) == 0
    assert "tokens/s" not in capsys.readouterr().out
    options = end_to_end._parser().parse_args([*arguments, "--backend", "torch"])
    assert end_to_end._left([small("adapter")], session, options) == [small("adapter")]


def test_backend_is_forced_on_ours_alone(session: harness.Session, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    use = pk.use_backend
    monkeypatch.setattr(pk, "use_backend", lambda name: seen.append(name) or use(name))
    lines = end_to_end.measure(small("adapter"), only(session, "patched"), backend="torch")
    assert [line["provider"] for line in lines] == [
        "unpatched",
        "compiled",
        "patched (torch)",
        "patched, compiled (torch)",
    ]
    assert set(seen) == {"torch"}


def test_what_the_package_has_nothing_for_says_so() -> None:
    model, why_not = decoders.patched(torch.nn.Linear(2, 2))
    assert model is None
    assert why_not == "apply: 0 modules fused, 0 not: nothing of a known kind"


def test_layers_that_a_model_does_not_have() -> None:
    options = end_to_end._parser().parse_args(["--model", "tiny", "--layers", "9"])
    with pytest.raises(SystemExit, match="--layers must be from 1 to 4"):
        end_to_end.steps(options, torch.device("cpu"))
