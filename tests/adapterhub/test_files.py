"""Adapter files: written here and read by AdapterHub, the other way round, and every fault named without a change."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("adapters", reason="AdapterHub needs an older transformers; `make test-adapterhub` runs these")

import adapters
import safetensors.torch
import torch
from torch import Tensor, nn

import peft_kernels as pk
from peft_kernels import ParallelAdapter, SerialAdapter, insert_adapters
from peft_kernels.bottleneck_adapter.activations import ACTIVATIONS
from peft_kernels.integrations.adapterhub import load_adapter, save_adapter
from peft_kernels.integrations.adapterhub_activations import ACTIVATIONS as THEIR_ACTIVATIONS
from tests.adapterhub.models import HIDDEN, KINDS, base, randomize, run, tokens
from tests.adapterhub.parity import assert_bitwise, assert_close

BOTH = ("attention", "feed_forward")
# Where AdapterHub taps these blocks; insert_adapters knows BERT's.
SUBLAYERS = {
    "bert": None,
    "llama": {
        "attention": ("input_layernorm", "self_attn.o_proj"),
        "feed_forward": ("post_attention_layernorm", "mlp"),
    },
    "gpt2": {"attention": ("ln_1", "attn.resid_dropout"), "feed_forward": ("ln_2", "mlp")},
}
BLOCKS = {"bert": "encoder.layer", "llama": "layers", "gpt2": "h"}
TYPES = {"double": SerialAdapter, "parallel": ParallelAdapter}


def _insert(
    model: nn.Module,
    kind: str = "double",
    architecture: str = "bert",
    names: tuple[str, ...] = BOTH,
    layers: tuple[int, ...] = (0, 1),
    widths: tuple[int, int] = (5, 5),
    **options: object,
) -> nn.Module:
    """Adapters of this package's that all do something, in a model without any."""
    blocks = model.base_model.get_submodule(BLOCKS[architecture])
    for index in layers:
        inserted = {name: TYPES[kind](HIDDEN, widths[index], **options) for name in names}
        insert_adapters(blocks[index], inserted, SUBLAYERS[architecture])
    randomize(model, 3)
    return model


def _ours(kind: str = "double", architecture: str = "bert", **options: object) -> nn.Module:
    return _insert(base(architecture), kind, architecture, **options)


def _theirs(kind: str, architecture: str = "bert", width: int = 5, **options: object) -> nn.Module:
    """AdapterHub's adapters in the same places."""
    model = base(architecture)
    adapters.init(model)
    factor = HIDDEN / (width + 0.5)
    model.add_adapter("task", config=KINDS[kind](**{"mh_adapter": True, "reduction_factor": factor, **options}))
    randomize(model, 4)
    model.set_active_adapters("task")
    return model


def _read_by_adapterhub(folder: Path, architecture: str = "bert", safe: bool = False) -> nn.Module:
    model = base(architecture)
    adapters.init(model)
    missing: dict[str, list[str]] = {}
    name = model.load_adapter(str(folder), use_safetensors=safe, loading_info=missing, with_head=False)
    assert missing == {"missing_keys": [], "unexpected_keys": []}
    model.set_active_adapters(name)
    return model


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens())[0]


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("architecture", SUBLAYERS)
def test_adapterhub_reads_what_is_written_here(architecture: str, kind: str, safe: bool, tmp_path: Path) -> None:
    model = _ours(kind, architecture, scale=0.5)
    assert (_logits(model) - _logits(base(architecture))).abs().max() > 0.01
    save_adapter(model, tmp_path / "new", "task", use_safetensors=safe)
    assert_close("logits", _logits(_read_by_adapterhub(tmp_path / "new", architecture, safe)), _logits(model))


@pytest.mark.parametrize(
    "options",
    [
        {"names": ("attention",)},
        {"names": ("feed_forward",), "kind": "parallel"},
        {"layers": (1,)},
        {"widths": (3, 9)},
        {"widths": (1, 32)},
        {"bias": False},
        *({"activation": name} for name in ACTIVATIONS),
    ],
    ids=str,
)
def test_adapterhub_reads(options: dict[str, object], tmp_path: Path) -> None:
    model = _ours(**options)
    save_adapter(model, tmp_path)
    assert_close("logits", _logits(_read_by_adapterhub(tmp_path)), _logits(model))


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("architecture", SUBLAYERS)
def test_what_adapterhub_wrote_is_read_here(architecture: str, kind: str, safe: bool, tmp_path: Path) -> None:
    theirs = _theirs(kind, architecture, scaling=0.5)
    theirs.save_adapter(str(tmp_path), "task", use_safetensors=safe, with_head=False)
    ours = _ours(kind, architecture)
    load_adapter(ours, tmp_path)
    assert_close("logits", _logits(ours), _logits(theirs))


@pytest.mark.parametrize("name", THEIR_ACTIVATIONS)
def test_activations_are_read(name: str, tmp_path: Path) -> None:
    theirs = _theirs("double", non_linearity=name)
    theirs.save_adapter(str(tmp_path), "task")
    ours = _ours()
    load_adapter(ours, tmp_path)
    assert_close("logits", _logits(ours), _logits(theirs))


@pytest.mark.parametrize("name", ["gelu", "gelu_orig", "relu"])
def test_names_before_versions(name: str, tmp_path: Path) -> None:
    """AdapterHub translates them where a file has no version."""
    _theirs("double").save_adapter(str(tmp_path), "task")
    _edit(tmp_path, "non_linearity", name)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "version"}))
    ours = _ours()
    load_adapter(ours, tmp_path)
    assert_close("logits", _logits(ours), _logits(_read_by_adapterhub(tmp_path)))


@pytest.mark.parametrize("written_by_the_base", [False, True])
def test_the_base_model_alone(written_by_the_base: bool, tmp_path: Path) -> None:
    """A model with a head and its base call the same adapters by two names."""
    whole, other = _ours(), _ours(activation="tanh")
    randomize(other, 9)
    writer, reader = (whole.bert, other) if written_by_the_base else (whole, other.bert)
    save_adapter(writer, tmp_path)
    load_adapter(reader, tmp_path)
    assert_bitwise("logits", _logits(other), _logits(whole))
    assert_close("logits", _logits(_read_by_adapterhub(tmp_path)), _logits(whole))


def test_locations_of_an_unknown_block(tmp_path: Path) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(HIDDEN, HIDDEN)

    model = nn.Sequential(Block())
    insert_adapters(model[0], {"attention": SerialAdapter(HIDDEN, 3)}, {"attention": ("linear", "linear")})
    with pytest.raises(ValueError, match="must be one of BertLayer, GPT2Block, LlamaDecoderLayer unless locations"):
        save_adapter(model, tmp_path)
    save_adapter(model, tmp_path, "n", locations={"attention": "somewhere"})
    keys = torch.load(tmp_path / "pytorch_adapter.bin", weights_only=True)
    assert set(keys) == {
        f"0.somewhere.adapters.n.{end}"
        for end in ("adapter_down.0.weight", "adapter_down.0.bias", "adapter_up.weight", "adapter_up.bias")
    }


def test_round_trip_is_exact_and_keeps_parameters(tmp_path: Path) -> None:
    model, other = _ours(scale=0.3, activation="gelu_tanh"), _ours()
    save_adapter(model, tmp_path, use_safetensors=True)
    save_adapter(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "pytorch_adapter.bin"]
    randomize(other, 9)
    held = dict(other.named_parameters())
    load_adapter(other, tmp_path)
    assert all(parameter is held[name] for name, parameter in other.named_parameters())
    assert_bitwise("logits", _logits(other), _logits(model))
    _, gradients = run(other)
    assert any("adapters.attention.down" in name for name in gradients)


def test_applied_models_write_the_same_file(tmp_path: Path) -> None:
    theirs = _theirs("double")
    theirs.save_adapter(str(tmp_path / "plain"), "task")
    pk.apply(theirs)
    theirs.save_adapter(str(tmp_path / "applied"), "task")
    plain, applied = (
        torch.load(tmp_path / name / "pytorch_adapter.bin", weights_only=True) for name in ("plain", "applied")
    )
    assert plain.keys() == applied.keys() and all(plain[key].equal(applied[key]) for key in plain)
    configs = [(tmp_path / name / "adapter_config.json").read_text() for name in ("plain", "applied")]
    assert configs[0] == configs[1]


def test_without_bias(tmp_path: Path) -> None:
    """A bias of zero is none."""
    model, other = _ours(bias=False), _ours(bias=False)
    save_adapter(model, tmp_path)
    randomize(other, 9)
    load_adapter(other, tmp_path)
    assert_bitwise("logits", _logits(other), _logits(model))
    save_adapter(_ours(), tmp_path)
    with pytest.raises(ValueError, match=r"adapter_down\.0\.bias must be zero, since the model's adapter has no bias"):
        load_adapter(other, tmp_path)


def _edit(folder: Path, key: str, value: object) -> None:
    path = folder / "adapter_config.json"
    outer = json.loads(path.read_text())
    outer["config"][key] = value
    path.write_text(json.dumps(outer))


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
    "another method": (lambda f: _edit(f, "architecture", "lora"), ValueError, "must not set architecture, got 'lora'"),
    **{
        option: (lambda f, option=option: _edit(f, option, True), ValueError, f"must not set {option}, got True")
        for option in ("ln_before", "ln_after", "use_gating", "phm_layer", "inv_adapter", "cross_adapter")
    },
    "stochastic depth": (
        lambda f: _edit(f, "stochastic_depth", 0.1),
        ValueError,
        r"must not set stochastic_depth, got 0\.1",
    ),
    "dropout": (lambda f: _edit(f, "dropout", 0.1), ValueError, r"must not set dropout, got 0\.1"),
    "no norm after": (
        lambda f: _edit(f, "original_ln_after", False),
        ValueError,
        "must set original_ln_after, got False",
    ),
    "norm before": (
        lambda f: _edit(f, "original_ln_before", True),
        ValueError,
        "must not set original_ln_before to True",
    ),
    "residual between": (
        lambda f: _edit(f, "residual_before_ln", "post_add"),
        ValueError,
        "must not set residual_before_ln to 'post_add'",
    ),
    "an activation": (lambda f: _edit(f, "non_linearity", "mish"), ValueError, "must have a non_linearity of .*'mish'"),
    "learned scaling": (
        lambda f: _edit(f, "scaling", "learned"),
        ValueError,
        "must have a number scaling, got 'learned'",
    ),
    "the other type": (
        lambda f: _edit(f, "is_parallel", True),
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
    save_adapter(_ours(scale=0.5, activation="gelu"), tmp_path, "task")
    damage(tmp_path)
    model = _ours()
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


def test_the_pickled_code_is_one_that_runs(tmp_path: Path) -> None:
    torch.save({FIRST: _Evil(tmp_path)}, tmp_path / "trusted")
    torch.load(tmp_path / "trusted", weights_only=False)
    assert (tmp_path / "made").exists()


def _mixed_types() -> nn.Module:
    model = _ours(layers=(0,))
    insert_adapters(model.bert.encoder.layer[1], {name: ParallelAdapter(HIDDEN, 5) for name in BOTH})
    return model


def _changed(change: Callable[[nn.ModuleDict], object]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = _ours()
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
        (lambda: _ours().bert.encoder.layer[0], "a block with adapters must be one of a list, got ''"),
    ],
)
def test_what_cannot_be_written(make: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        save_adapter(make(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_two_stacks_of_blocks(tmp_path: Path) -> None:
    model = nn.ModuleDict({"encoder": _ours(layers=(0,)), "decoder": _ours(layers=(1,))})
    with pytest.raises(ValueError, match=r"one blocks, got 'encoder\.bert\.encoder\.layer' and 'decoder\.bert"):
        save_adapter(model, tmp_path / "new")
