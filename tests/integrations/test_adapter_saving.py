"""Saving leaves the old files or the new ones, in every format."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("safetensors")

import safetensors.torch

from peft_kernels import FusedLoRALinear, ParallelAdapter, SerialAdapter
from peft_kernels.integrations import adapterhub, peft
from tests.integrations.adapter_formats import FORMATS, WHERE, Format, assert_refused, filled


@pytest.fixture(params=FORMATS)
def files(request: pytest.FixtureRequest) -> Format:
    return FORMATS[request.param]


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _fails(monkeypatch: pytest.MonkeyPatch, after: int, for_ever: bool) -> None:
    """Renaming fails once, or from then on: that is what a crash leaves, which undoes nothing."""
    replace, calls = os.replace, []

    def failing(source: Any, target: Any) -> None:
        calls.append(source)
        if len(calls) > after and (for_ever or len(calls) == after + 1):
            raise OSError("no more")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)


def _read(files: Format, folder: Path) -> float | None:
    """The value of the model whose files these are, or None where none are."""
    model = files.make(9.0)
    try:
        files.load(model, folder)
    except FileNotFoundError:
        return None
    found = {float(p.detach().flatten()[0]) for p in model.parameters()} | set(_numbers(model))
    # One value, beside what no file holds.
    assert len(found - {9.0}) == 1
    return (found - {9.0}).pop()


def _numbers(model: nn.Module) -> list[float]:
    layers = [m.scaling["default"] * 2 for n, m in model.named_modules() if n == "a" and isinstance(m, FusedLoRALinear)]
    return layers + [m.scale for m in model.modules() if isinstance(m, SerialAdapter | ParallelAdapter)]


class TestSaving:
    @pytest.mark.parametrize("after", range(5))
    def test_an_error_leaves_the_old_files(
        self, files: Format, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files.save(files.make(1.0), tmp_path)
        (tmp_path / "other").write_text("kept")
        before = _contents(tmp_path)
        with monkeypatch.context() as patched:
            _fails(patched, after, for_ever=False)
            try:
                files.save(files.make(2.0), tmp_path)
            except OSError:
                assert _contents(tmp_path) == before
                return
        # There were fewer steps.
        assert after >= 1 and _read(files, tmp_path) == 2.0 and _contents(tmp_path).keys() == before.keys()

    @pytest.mark.parametrize("after", range(5))
    def test_a_crash_leaves_a_pair_or_nothing(
        self, files: Format, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files.save(files.make(1.0), tmp_path)
        old = set(_contents(tmp_path).values())
        with monkeypatch.context() as patched:
            _fails(patched, after, for_ever=True)
            try:
                files.save(files.make(2.0), tmp_path)
            except OSError:
                assert old <= set(_contents(tmp_path).values())
        _read(files, tmp_path)
        files.save(files.make(2.0), tmp_path)
        assert _read(files, tmp_path) == 2.0

    def test_a_full_disk(self, files: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        files.save(files.make(1.0), tmp_path)
        before = _contents(tmp_path)

        def full(*args: object, **options: object) -> None:
            Path(args[1] if isinstance(args[1], str | Path) else args[0]).write_bytes(b"half")
            raise OSError("no space")

        for owner, name in ((safetensors.torch, "save_file"), (torch, "save")):
            monkeypatch.setattr(owner, name, full)
        with pytest.raises(OSError, match="no space"):
            files.save(files.make(2.0), tmp_path)
        assert _contents(tmp_path) == before

    def test_the_same_configuration_is_one_step(
        self, files: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A training that saves again and again leaves a pair at any moment."""
        model = files.make(1.0)
        files.save(model, tmp_path)
        steps, replace = [], os.replace
        monkeypatch.setattr(os, "replace", lambda a, b: (steps.append(b), replace(a, b)))
        files.save(filled(model, 2.0), tmp_path)
        assert len(steps) == 1 and not [path for path in tmp_path.iterdir() if path.is_dir()]

    def test_replaced_while_it_is_read(self, files: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        files.save(files.make(1.0), tmp_path)
        for owner, name in ((safetensors.torch, "load_file"), (torch, "load")):
            load = getattr(owner, name)

            def during(*args: object, load: Any = load, **options: object) -> object:
                files.edit(tmp_path, init_weights="x")
                return load(*args, **options)

            monkeypatch.setattr(owner, name, during)
        assert_refused(files, tmp_path, "was replaced while .* was read; load it again")

    def test_links_are_replaced_not_followed(self, files: Format, tmp_path: Path) -> None:
        """A snapshot of the hub's is made of links to blobs that other snapshots share."""
        files.save(files.make(1.0), tmp_path / "a")
        (tmp_path / "b").mkdir()
        for path in (tmp_path / "a").iterdir():
            (tmp_path / "b" / path.name).symlink_to(path)
        before = _contents(tmp_path / "a")
        files.save(files.make(2.0), tmp_path / "b")
        assert _contents(tmp_path / "a") == before and _read(files, tmp_path / "b") == 2.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_cannot_be_saved(value: float, tmp_path: Path) -> None:
    lora = FORMATS["lora"].make(1.0)
    lora["b"].scaling["default"] = value
    with pytest.raises(ValueError, match=r"b\.scaling"):
        peft.save_adapter(lora, tmp_path / "new")
    for kind in ("serial", "parallel"):
        with pytest.raises(ValueError, match="finite number as scale"):
            FORMATS[kind].save(_rescaled(FORMATS[kind].make(1.0), value), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def _rescaled(model: nn.Module, value: float) -> nn.Module:
    for module in model.modules():
        if isinstance(module, SerialAdapter | ParallelAdapter):
            module.scale = value
    return model


def test_sharded_parameters_are_not_saved(tmp_path: Path) -> None:
    """As ZeRO-3 and FSDP leave them outside of their gathering contexts."""
    for files in FORMATS.values():
        model = files.make(1.0)
        for parameter in model.parameters():
            parameter.data = parameter.data.new_empty(0)
        with pytest.raises(ValueError, match="gather one that is sharded"):
            files.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["", "a.b", "train", "keys", 3])
def test_names_that_adapterhub_cannot_have(name: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter_name must be a name"):
        adapterhub.save_adapter(FORMATS["serial"].make(1.0), tmp_path, name, locations=WHERE)


def test_shared_parameters(tmp_path: Path) -> None:
    model = FORMATS["lora"].make(1.0)
    model["c"] = FusedLoRALinear(4, 6, r=2, lora_alpha=1.0)
    model["c"].lora_A["default"] = model["a"].lora_A["default"]
    peft.save_adapter(model, tmp_path)
    peft.load_adapter(model, tmp_path)
