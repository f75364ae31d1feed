"""Adapter files that are damaged or do not fit: every fault is named, and nothing is changed."""

from __future__ import annotations

import pytest

pytest.importorskip("adapters", reason="AdapterHub needs an older transformers; `make test-adapterhub` runs these")

import os
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from peft_kernels import ParallelAdapter, SerialAdapter, insert_adapters
from peft_kernels.integrations.adapterhub import load_adapter, save_adapter
from tests.adapterhub.inserted import BOTH, edit_config, with_adapters
from tests.adapterhub.models import HIDDEN, base, randomize
from tests.adapterhub.parity import assert_bitwise


def _write(folder: Path, text: str) -> None:
    (folder / "adapter_config.json").write_text(text)


def _tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "pytorch_adapter.bin"
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)


def _truncate(folder: Path) -> None:
    path = folder / "pytorch_adapter.bin"
    path.write_bytes(path.read_bytes()[:-500])


def _truncate_safe(folder: Path) -> None:
    path = folder / "adapter.safetensors"
    safetensors.torch.save_file({FIRST: torch.zeros(5, HIDDEN)}, path)
    path.write_bytes(path.read_bytes()[:-100])


def _rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    for key in [key for key in tensors if old in key]:
        tensors[key.replace(old, new)] = tensors.pop(key)


FIRST = "bert.encoder.layer.0.attention.output.adapters.task.adapter_down.0.weight"


class _Evil:
    """Makes a folder where pickles are trusted."""

    def __init__(self, folder: Path) -> None:
        self.made = str(folder / "made")

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.made,)


FAULTS: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "truncated": (_truncate, ValueError, r"pytorch_adapter\.bin cannot be read"),
    "truncated safetensors": (_truncate_safe, ValueError, r"adapter\.safetensors cannot be read"),
    "pickled code": (
        lambda f: torch.save({FIRST: _Evil(f)}, f / "pytorch_adapter.bin"),
        ValueError,
        r"pytorch_adapter\.bin cannot be read",
    ),
    "a list": (
        lambda f: torch.save([torch.ones(1)], f / "pytorch_adapter.bin"),
        ValueError,
        r"pytorch_adapter\.bin must hold tensors by name, got a list",
    ),
    "a number": (
        lambda f: _tensors(f, lambda t: t.update({FIRST: 1})),
        ValueError,
        r"down\.0\.weight' must be a tensor's name, holds a int",
    ),
    "no weights": (
        lambda f: (f / "pytorch_adapter.bin").unlink(),
        FileNotFoundError,
        r"must hold adapter\.safetensors or pytorch_adapter\.bin",
    ),
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), FileNotFoundError, "adapter_config.json"),
    "no JSON": (lambda f: _write(f, "{"), ValueError, r"adapter_config\.json must be JSON"),
    "no object": (lambda f: _write(f, "[]"), ValueError, "must hold an object, got a list"),
    "no name": (lambda f: _write(f, '{"config": {}}'), ValueError, "must have a name and an object config, got None"),
    "a named configuration": (
        lambda f: _write(f, '{"config": "double_seq_bn", "name": "task"}'),
        ValueError,
        "an object config, got 'task' and a str",
    ),
    "another method": (
        lambda f: edit_config(f, "architecture", "lora"),
        ValueError,
        "must not set architecture, got 'lora'",
    ),
    **{
        option: (lambda f, option=option: edit_config(f, option, True), ValueError, f"must not set {option}, got True")
        for option in ("ln_before", "ln_after", "use_gating", "phm_layer", "inv_adapter", "cross_adapter")
    },
    "stochastic depth": (
        lambda f: edit_config(f, "stochastic_depth", 0.1),
        ValueError,
        r"must not set stochastic_depth, got 0\.1",
    ),
    "dropout": (lambda f: edit_config(f, "dropout", 0.1), ValueError, r"must not set dropout, got 0\.1"),
    "no norm after": (
        lambda f: edit_config(f, "original_ln_after", False),
        ValueError,
        "must set original_ln_after, got False",
    ),
    "norm before": (
        lambda f: edit_config(f, "original_ln_before", True),
        ValueError,
        "must not set original_ln_before to True",
    ),
    "residual between": (
        lambda f: edit_config(f, "residual_before_ln", "post_add"),
        ValueError,
        "must not set residual_before_ln to 'post_add'",
    ),
    "an activation": (
        lambda f: edit_config(f, "non_linearity", "mish"),
        ValueError,
        "must have a non_linearity of .*'mish'",
    ),
    "learned scaling": (
        lambda f: edit_config(f, "scaling", "learned"),
        ValueError,
        "must have a finite number as scaling, got 'learned'",
    ),
    "a sublayer without adapters": (
        lambda f: edit_config(f, "mh_adapter", False),
        ValueError,
        r"must set mh_adapter and not leave out layer 0, since .* at bert\.encoder\.layer\.0\.attention\.output",
    ),
    "a layer that is left out": (
        lambda f: edit_config(f, "leave_out", [1]),
        ValueError,
        r"not leave out layer 1, since pytorch_adapter\.bin holds an adapter",
    ),
    **{
        f"{option} of another type": (
            lambda f, option=option, value=value: edit_config(f, option, value),
            ValueError,
            rf"adapter_config\.json must .*{option}",
        )
        for option, value in {
            "is_parallel": "no",
            "mh_adapter": 1,
            "output_adapter": None,
            "leave_out": {"0": True},
            "original_ln_after": 1,
            "original_ln_before": "no",
            "residual_before_ln": 0,
            "non_linearity": ["relu"],
            "reduction_factor": {"0": "x"},
        }.items()
    },
    "the other type": (
        lambda f: edit_config(f, "is_parallel", True),
        ValueError,
        r"is of ParallelAdapters, the model has a SerialAdapter at bert\.encoder\.layer\.0\.attention\.output",
    ),
    "a tensor less": (
        lambda f: _tensors(f, lambda t: t.pop(FIRST)),
        ValueError,
        r"must hold 'bert\.encoder\.layer\.0\..*task\.adapter_down\.0\.weight', which it lacks",
    ),
    "a tensor more": (
        lambda f: _tensors(f, lambda t: t.update({FIRST.replace("layer.0", "layer.7"): t[FIRST]})),
        ValueError,
        r"key 'bert\.encoder\.layer\.7\..*' must name an adapter of the model",
    ),
    "another name": (
        lambda f: _tensors(f, lambda t: _rename(t, ".task.", ".other.")),
        ValueError,
        r"key 'bert\.encoder\.layer\.0\.attention\.output\.adapters\.other",
    ),
    "a tensor twice": (
        lambda f: _tensors(f, lambda t: t.update({FIRST.removeprefix("bert."): t[FIRST]})),
        ValueError,
        r"must hold each tensor once, holds some with and without 'bert\.'",
    ),
    "another width": (
        lambda f: _tensors(f, lambda t: t.update({FIRST: torch.ones(6, HIDDEN)})),
        ValueError,
        r"0\.weight must be floating \(5, 32\), got torch\.float32 \(6, 32\)",
    ),
    "integers": (
        lambda f: _tensors(f, lambda t: t.update({FIRST: torch.ones(5, HIDDEN, dtype=torch.int64)})),
        ValueError,
        "got torch.int64",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_and_change_nothing(fault: str, tmp_path: Path) -> None:
    damage, error, message = FAULTS[fault]
    save_adapter(with_adapters(scale=0.5, activation="gelu"), tmp_path, "task")
    damage(tmp_path)
    model = with_adapters()
    randomize(model, 9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        load_adapter(model, tmp_path)
    assert not (tmp_path / "made").exists()
    assert list(model.state_dict()) == list(before)
    for name, tensor in model.state_dict().items():
        assert_bitwise(name, tensor, before[name])
    inserted = [module for module in model.modules() if isinstance(module, SerialAdapter)]
    assert {(module.scale, module.activation) for module in inserted} == {(1.0, "relu")}


def test_what_only_one_side_has(tmp_path: Path) -> None:
    """It is left out, or as it is, where that is asked for."""
    save_adapter(with_adapters(layers=(0,)), tmp_path, "task")
    model = with_adapters(layers=(0, 1))
    randomize(model, 9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"must hold 'bert\.encoder\.layer\.1\..*', which it lacks"):
        load_adapter(model, tmp_path)
    load_adapter(model, tmp_path, strict=False)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if ".adapters." in name and ".layer.0." in name}
    with pytest.raises(ValueError, match="must hold an adapter that the model has, holds none"):
        load_adapter(with_adapters(layers=(1,)), tmp_path, strict=False)


def test_the_pickled_code_is_one_that_runs(tmp_path: Path) -> None:
    torch.save({FIRST: _Evil(tmp_path)}, tmp_path / "trusted")
    torch.load(tmp_path / "trusted", weights_only=False)
    assert (tmp_path / "made").exists()


def _mixed_types() -> nn.Module:
    model = with_adapters(layers=(0,))
    insert_adapters(model.bert.encoder.layer[1], {name: ParallelAdapter(HIDDEN, 5) for name in BOTH})
    return model


def _changed(change: Callable[[nn.ModuleDict], object]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = with_adapters()
        change(model.bert.encoder.layer[1].adapters)
        return model

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (base, "BertForMaskedLM must have adapters of insert_adapters, has none"),
        (_mixed_types, "must have one type, got 'SerialAdapter' and 'ParallelAdapter'"),
        (_changed(lambda a: setattr(a["attention"], "scale", 2.0)), r"must have one scale, got 1\.0 and 2\.0"),
        (
            _changed(lambda a: setattr(a["attention"], "activation", "tanh")),
            "must have one activation, got 'relu' and 'tanh'",
        ),
        (
            _changed(lambda a: a.pop("attention")),
            "at the same sublayers, got layer 0: attention, feed_forward; layer 1: feed_forward",
        ),
        (
            _changed(lambda a: a.update({"attention": SerialAdapter(HIDDEN, 4)})),
            "one width, got layer 0: 5; layer 1: 4, 5",
        ),
        (
            _changed(lambda a: a.update({"other": a.pop("attention")})),
            r"must be named after attention, feed_forward, bert\.encoder\.layer\.1 has 'other'",
        ),
        (lambda: with_adapters().bert.encoder.layer[0], "a block with adapters must be one of a list, got ''"),
    ],
)
def test_what_cannot_be_written(make: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        save_adapter(make(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_two_stacks_of_blocks(tmp_path: Path) -> None:
    model = nn.ModuleDict({"encoder": with_adapters(layers=(0,)), "decoder": with_adapters(layers=(1,))})
    with pytest.raises(ValueError, match=r"one blocks, got 'encoder\.bert\.encoder\.layer' and 'decoder\.bert"):
        save_adapter(model, tmp_path / "new")
