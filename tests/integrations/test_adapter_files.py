"""What is read is checked before anything is written, in every format; every fault names the file."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")

from tests.integrations.adapter_formats import FORMATS, Format, assert_refused


@pytest.fixture(params=FORMATS)
def files(request: pytest.FixtureRequest) -> Format:
    return FORMATS[request.param]


# Changes of a sound configuration, which ends in a brace and a line break.
TEXTS = {
    "nothing": lambda text: b"",
    "no UTF-8": lambda text: text[:-2] + b', "revision": "\xff"}',
    "another encoding": lambda text: text.decode().encode("utf-16"),
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text,
    "a list": lambda text: b"[" + text + b"]",
    "a number": lambda text: b"1e999",
    "null": lambda text: b"null",
    "cut off": lambda text: text[:-2],
    "a key twice": lambda text: text[:-2] + b', "revision": null, "revision": null}',
    "a key twice inside": lambda text: text[:-2] + b', "revision": [{"y": 1, "y": 1}]}',
    "nested": lambda text: text[:-2] + b', "revision": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "digits": lambda text: text[:-2] + b', "revision": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_configuration_that_is_none(files: Format, text: str, tmp_path: Path) -> None:
    files.save(files.make(1.0), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_bytes(TEXTS[text](path.read_bytes()))
    assert_refused(files, tmp_path, r"adapter_config\.json must (be JSON|hold an object)")


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
                assert_refused(files, tmp_path, option)
                config.write_text(sound)


@pytest.mark.parametrize("value", [True, 0.5, "x", [1], {"a": 1}])
def test_options_that_nobody_knows(files: Format, value: object, tmp_path: Path) -> None:
    files.save(files.make(1.0), tmp_path)
    files.edit(tmp_path, a_later_option=value)
    assert_refused(files, tmp_path, "must not set a_later_option")
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
        assert_refused(files, tmp_path, name)
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
    assert_refused(files, tmp_path, files.pickled)


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
        assert_refused(
            files, path, "must be a local folder.*snapshot_download makes one of a hub id", FileNotFoundError
        )

    def test_a_file(self, files: Format, tmp_path: Path) -> None:
        files.save(files.make(1.0), tmp_path)
        assert_refused(files, tmp_path / "adapter_config.json", "folder must be the folder that holds adapter_config")

    def test_home(self, files: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert_refused(files, "~/adapter", "'~' is not expanded", FileNotFoundError)
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
        assert_refused(files, tmp_path, "must hold adapter_config.json; its folders task do", FileNotFoundError)

    def test_folders_for_files(self, files: Format, tmp_path: Path) -> None:
        files.save(files.make(1.0), tmp_path)
        for name in ("adapter_config.json", files.safe):
            content = (tmp_path / name).read_bytes() if (tmp_path / name).exists() else b""
            (tmp_path / name).unlink(missing_ok=True)
            (tmp_path / name).mkdir()
            assert_refused(files, tmp_path, name)
            with pytest.raises(ValueError, match=f"{name} must be a file, is a folder"):
                files.save(files.make(1.0), tmp_path)
            (tmp_path / name).rmdir()
            (tmp_path / name).write_bytes(content)

    def test_a_file_for_the_folder(self, files: Format, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("kept")
        with pytest.raises(ValueError, match=r"must be a folder, got the file .*file"):
            files.save(files.make(1.0), tmp_path / "file")
        assert (tmp_path / "file").read_text() == "kept"
