"""What the files of every library owe: read, check, then write; and both files or none. No other library is needed."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

safetensors_torch = pytest.importorskip("safetensors.torch")

from peft_kernels import (
    FusedLoRALinear,
    ParallelAdapter,
    PrefixEncoder,
    PromptEmbedding,
    SerialAdapter,
    insert_adapters,
)
from peft_kernels.integrations import adapterhub, peft

WHERE = {"attention": "somewhere"}


def _lora(value: float) -> nn.Module:
    # The alpha is in the configuration, so that the files of two values are no pair.
    return _filled(
        nn.ModuleDict({"a": FusedLoRALinear(4, 6, r=2, lora_alpha=value), "b": FusedLoRALinear(6, 4, r=3)}), value
    )


def _prompt(value: float) -> nn.Module:
    return _filled(PromptEmbedding(3, 4), value)


def _prefix(value: float) -> nn.Module:
    return _filled(PrefixEncoder(2, 2, 4, 3), value)


def _bottleneck(adapter: type[nn.Module]) -> Callable[[float], nn.Module]:
    def make(value: float) -> nn.Module:
        blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0) for _ in range(2))
        for block in blocks:
            insert_adapters(block, {"attention": adapter(8, 3, "tanh", scale=value)})
        return _filled(nn.ModuleDict({"blocks": blocks}), value)

    return make


def _filled(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


class Format(NamedTuple):
    """How one library's files are written and read.

    Attributes:
        options: where the adapter's options stand in the configuration.
        numbers: options that must be numbers.
    """

    make: Callable[[float], nn.Module]
    save: Callable[..., None]
    load: Callable[..., None]
    safe: str
    pickled: str
    numbers: tuple[str, ...]
    options: tuple[str, ...] = ()

    def edit(self, folder: Path, **changes: object) -> None:
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        inner = config
        for key in self.options:
            inner = inner[key]
        inner.update(changes)
        path.write_text(json.dumps(config))

    def pickle(self, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
        """Change the tensors, in a file that can hold any."""
        safe, pickled = folder / self.safe, folder / self.pickled
        tensors = safetensors_torch.load_file(safe) if safe.exists() else torch.load(pickled)
        safe.unlink(missing_ok=True)
        change(tensors)
        torch.save(tensors, pickled)


PEFT = ("adapter_model.safetensors", "adapter_model.bin")
HUB = ("adapter.safetensors", "pytorch_adapter.bin")


def _hub(make: Callable[[float], nn.Module], safe: bool) -> Format:
    def save(model: nn.Module, folder: Any) -> None:
        adapterhub.save_adapter(model, folder, "task", locations=WHERE, use_safetensors=safe)

    def load(model: nn.Module, folder: Any, **options: Any) -> None:
        adapterhub.load_adapter(model, folder, locations=WHERE, **options)

    return Format(make, save, load, *HUB, ("scaling", "reduction_factor"), ("config",))


def _rows(model: nn.Module, folder: Any) -> None:
    peft.save_adapter(model, folder, task_type="CAUSAL_LM")


FORMATS = {
    "lora": Format(_lora, peft.save_adapter, peft.load_adapter, *PEFT, ("r", "lora_alpha", "lora_dropout")),
    "prompt": Format(_prompt, _rows, peft.load_adapter, *PEFT, ("num_virtual_tokens", "token_dim")),
    "prefix": Format(
        _prefix, _rows, peft.load_adapter, *PEFT, ("num_virtual_tokens", "num_layers", "num_attention_heads")
    ),
    "serial": _hub(_bottleneck(SerialAdapter), safe=False),
    "parallel": _hub(_bottleneck(ParallelAdapter), safe=True),
}


@pytest.fixture(params=FORMATS)
def files(request: pytest.FixtureRequest) -> Format:
    return FORMATS[request.param]


def _state(model: nn.Module) -> dict[str, Any]:
    scalings = {name: dict(m.scaling) for name, m in model.named_modules() if isinstance(m, FusedLoRALinear)}
    scales = {
        n: (m.scale, m.activation) for n, m in model.named_modules() if isinstance(m, SerialAdapter | ParallelAdapter)
    }
    tensors = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    return {"tensors": tensors, "numbers": (scalings, scales)}


def _assert_as_before(model: nn.Module, before: dict[str, Any]) -> None:
    after = _state(model)
    assert after["numbers"] == before["numbers"]
    assert list(after["tensors"]) == list(before["tensors"])
    for name, (parameter, value) in after["tensors"].items():
        assert parameter is before["tensors"][name][0] and torch.equal(value, before["tensors"][name][1]), name


def _assert_refused(files: Format, folder: Any, message: str = "", error: type[Exception] = ValueError) -> None:
    model = files.make(9.0)
    before = _state(model)
    with pytest.raises(error, match=message) as raised:
        files.load(model, folder)
    assert raised.type is error and str(folder) in str(raised.value)
    _assert_as_before(model, before)


TEXTS = {
    "nothing": b"",
    "no UTF-8": b'{"peft_type": "\xff"}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "a list": b"[]",
    "a number": b"1e999",
    "cut off": b'{"r": 4, ',
    "a key twice": b'{"r": 4, "x": {"y": 1, "y": 2}}',
    "nested": b'{"z": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "digits": b'{"r": ' + b"9" * 5000 + b"}",
    "null": b"null",
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_configuration_that_is_none(files: Format, text: str, tmp_path: Path) -> None:
    files.save(files.make(1.0), tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(TEXTS[text])
    _assert_refused(files, tmp_path, "adapter_config.json")


GARBAGE = [None, True, "4", [4], {"a": None}, -1, 0, 2.5, 10**9, 10**400, float("nan"), float("inf"), -float("inf"), {}]


def test_numbers_that_are_none(files: Format, tmp_path: Path) -> None:
    files.save(files.make(1.0), tmp_path)
    config = tmp_path / "adapter_config.json"
    sound = config.read_text()
    # What is a number, but not one that the tensors or the model contradict.
    fine = {
        "lora_alpha": (-1, 0, 2.5, 10**9),
        "lora_dropout": (0,),
        "scaling": (-1, 0, 2.5, 10**9),
        "reduction_factor": (2.5, 10**9),
    }
    for option in files.numbers:
        for value in GARBAGE:
            if not any(type(value) is type(right) and value == right for right in fine.get(option, ())):
                files.edit(tmp_path, **{option: value})
                _assert_refused(files, tmp_path, option)
                config.write_text(sound)


@pytest.mark.parametrize("value", [True, 0.5, "x", [1], {"a": 1}])
def test_options_that_nobody_knows(files: Format, value: object, tmp_path: Path) -> None:
    files.save(files.make(1.0), tmp_path)
    files.edit(tmp_path, a_later_option=value)
    _assert_refused(files, tmp_path, "must not set a_later_option")
    files.edit(tmp_path, a_later_option=None)
    files.load(files.make(9.0), tmp_path)


def _header(header: object, size: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text


WEIGHTS = {
    "nothing": b"",
    "zeros": bytes(64),
    "a header that is too long": _header({}, 2**62),
    "an unknown dtype": _header({"x": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}) + bytes(4),
    "offsets past the end": _header({"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}) + bytes(4),
    "a shape that lies": _header({"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}) + bytes(4),
    "a header that is a list": _header([]),
}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_that_are_none(files: Format, weights: str, tmp_path: Path) -> None:
    files.save(files.make(1.0), tmp_path)
    for name in (files.safe, files.pickled):
        (tmp_path / name).unlink(missing_ok=True)
    for name in (files.safe, files.pickled):
        (tmp_path / name).write_bytes(WEIGHTS[weights])
        _assert_refused(files, tmp_path, name)
        (tmp_path / name).unlink()


TENSORS = {
    "meta": lambda t: torch.empty(t.shape, device="meta"),
    "sparse": lambda t: t.to_sparse(),
    "rows compressed": lambda t: t[None].flatten(0, -2).to_sparse_csr(),
    "nested": lambda t: torch.nested.nested_tensor([t]),
    "integers": lambda t: t.long(),
    "complex": lambda t: t.to(torch.complex64),
    "booleans": lambda t: t.bool(),
    "another shape": lambda t: t[..., :-1],
    "another rank": lambda t: t[None],
    "no tensor": lambda t: 1.0,
}
if hasattr(torch, "float4_e2m1fn_x2"):
    TENSORS["packed"] = lambda t: torch.zeros(t.shape, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", TENSORS)
def test_the_last_tensor_does_not_fit(files: Format, kind: str, tmp_path: Path) -> None:
    """The others do, and are not written."""
    files.save(files.make(1.0), tmp_path)
    files.pickle(tmp_path, lambda t: t.update({list(t)[-1]: TENSORS[kind](t[list(t)[-1]])}))
    _assert_refused(files, tmp_path, files.pickled)


def test_a_parameter_without_values(files: Format, tmp_path: Path) -> None:
    files.save(files.make(1.0), tmp_path)
    with pytest.raises(ValueError, match="must be a dense tensor with values"):
        files.load(files.make(9.0).to("meta"), tmp_path)
    with pytest.raises(ValueError, match="must be a dense tensor with values"):
        files.save(files.make(9.0).to("meta"), tmp_path)
    files.load(files.make(9.0), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e5m2])
def test_tensors_of_another_dtype(files: Format, dtype: torch.dtype, tmp_path: Path) -> None:
    files.save(files.make(1.0), tmp_path)
    files.pickle(tmp_path, lambda t: t.update({key: value.to(dtype) for key, value in t.items()}))
    model = files.make(9.0)
    held = dict(model.named_parameters())
    files.load(model, tmp_path)
    written = [name for name, p in model.named_parameters() if bool((p == 1.0).all())]
    assert written and all(p is held[name] and p.dtype == torch.float32 for name, p in model.named_parameters())


class TestPaths:
    @pytest.mark.parametrize("path", ["user/my-adapter", "adapter", "no/such/folder\0"])
    def test_no_folder(self, files: Format, path: str) -> None:
        _assert_refused(
            files, path, "must be a local folder.*snapshot_download makes one of a hub id", FileNotFoundError
        )

    def test_a_file(self, files: Format, tmp_path: Path) -> None:
        files.save(files.make(1.0), tmp_path)
        _assert_refused(files, tmp_path / "adapter_config.json", "folder must be the folder that holds adapter_config")

    def test_home(self, files: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        _assert_refused(files, "~/adapter", "'~' is not expanded", FileNotFoundError)
        with pytest.raises(ValueError, match="'~' in ~/adapter is not expanded"):
            files.save(files.make(1.0), "~/adapter")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("path", [None, 3, ["x"], b"x"])
    def test_no_path(self, files: Format, path: object) -> None:
        for call in (files.load, files.save):
            with pytest.raises(ValueError, match=f"folder must be a path, got a {type(path).__name__}"):
                call(files.make(1.0), path)

    def test_a_folder_of_adapters(self, files: Format, tmp_path: Path) -> None:
        files.save(files.make(1.0), tmp_path / "task")
        _assert_refused(files, tmp_path, "must hold adapter_config.json; its folders task do", FileNotFoundError)

    def test_folders_for_files(self, files: Format, tmp_path: Path) -> None:
        files.save(files.make(1.0), tmp_path)
        for name in ("adapter_config.json", files.safe):
            content = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else b""
            (tmp_path / name).unlink(missing_ok=True)
            (tmp_path / name).mkdir()
            _assert_refused(files, tmp_path, name)
            with pytest.raises(ValueError, match=f"{name} must be a file, is a folder"):
                files.save(files.make(1.0), tmp_path)
            (tmp_path / name).rmdir()
            (tmp_path / name).write_bytes(content)

    def test_a_file_for_the_folder(self, files: Format, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("kept")
        with pytest.raises(ValueError, match=r"must be a folder, got the file .*file"):
            files.save(files.make(1.0), tmp_path / "file")
        assert (tmp_path / "file").read_text() == "kept"


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
    return next(
        v
        for v in (1.0, 2.0)
        if all(bool((p == v).all()) or bool((p == 9.0).all()) for p in model.parameters())
        and all(n == v for n in _numbers(model))
    )


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

        for owner, name in ((safetensors_torch, "save_file"), (torch, "save")):
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
        files.save(_filled(model, 2.0), tmp_path)
        assert len(steps) == 1 and not [path for path in tmp_path.iterdir() if path.is_dir()]

    def test_replaced_while_it_is_read(self, files: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        files.save(files.make(1.0), tmp_path)
        for owner, name in ((safetensors_torch, "load_file"), (torch, "load")):
            load = getattr(owner, name)

            def during(*args: object, load: Any = load, **options: object) -> object:
                files.edit(tmp_path, init_weights="x")
                return load(*args, **options)

            monkeypatch.setattr(owner, name, during)
        _assert_refused(files, tmp_path, "was replaced while .* was read; load it again")

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
    lora = _lora(1.0)
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
    model = _lora(1.0)
    model["c"] = FusedLoRALinear(4, 6, r=2, lora_alpha=1.0)
    model["c"].lora_A["default"] = model["a"].lora_A["default"]
    peft.save_adapter(model, tmp_path)
    peft.load_adapter(model, tmp_path)
