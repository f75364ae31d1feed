"""AdapterBank: PEFT's files on one model, each row with its own adapter; PEFT's adapter_names is what it is held to."""

from __future__ import annotations

import copy
import gc
import io
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from peft.tuners.lora.layer import Linear as PeftLinear
from transformers.pytorch_utils import Conv1D

import peft_kernels as pk
from python_ref import compare
from tests.integrations.adapter_banks import BASE, LLAMA, OPTIONS, base, filled, logits, peft_model
from tests.integrations.models import randomize, tokens
from tests.lora.banks import storage_bytes


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, dict[str, Path]]:
    """PEFT's model, and the folder of each of its adapters."""
    model = peft_model()
    model.save_pretrained(tmp_path)
    return model, {name: tmp_path / name for name in OPTIONS}


NAMES = ["few", BASE, "plain", "pattern", "few", "pattern of names"]


@pytest.mark.parametrize(
    "on", ["PEFT's model", "a plain model", "a plain model, by names", "a plain model, all linear"]
)
def test_rows_are_those_of_adapter_names(saved: tuple[nn.Module, dict[str, Path]], on: str) -> None:
    """To the last bits of float64."""
    theirs, folders = saved
    want = logits(theirs, tokens(6), adapter_names=NAMES)
    model = peft_model() if on == "PEFT's model" else base()
    targets = {"a plain model, by names": LLAMA, "a plain model, all linear": "all-linear"}.get(on)
    bank = filled(model, folders, target_modules=targets)
    bank.use(NAMES)
    got = logits(model, tokens(6))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    # What is compared differs from row to row.
    assert (want - logits(theirs, tokens(6), adapter_names=[BASE] * 6)).abs().amax((1, 2)).gt(1e-3).tolist() == [
        name != BASE for name in NAMES
    ]


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_half_precision_is_as_right_as_peft(tmp_path: Path, dtype: torch.dtype | None) -> None:
    """Factors rounded once to bfloat16 by default, as PEFT's without autocast_adapter_dtype, or in float32."""
    options = {"plain": OPTIONS["plain"], "few": OPTIONS["few"]}
    theirs = peft_model(dtype=torch.bfloat16, **options)
    theirs.save_pretrained(tmp_path)
    names, ids = ["few", BASE, "plain"] * 8, tokens(24, 16)
    oracle = copy.deepcopy(theirs)
    if dtype is None:
        # As the bank's default and PEFT's autocast_adapter_dtype=False have it.
        theirs, oracle = theirs.bfloat16(), oracle.bfloat16()
    want, exact = logits(theirs, ids, adapter_names=names), logits(oracle.double(), ids, adapter_names=names)
    model = base(dtype=torch.bfloat16)
    filled(model, {name: tmp_path / name for name in options}, dtype=dtype, target_modules=LLAMA).use(names)
    report = compare.assert_close("logits", logits(model, ids), want, exact)
    assert report.error > 1e-4


@pytest.mark.parametrize("architecture", ["gpt2", "t5", "bert", "qwen2"])
def test_other_architectures(tmp_path: Path, architecture: str) -> None:
    """Conv1D; an encoder beside its decoder; layers with a bias."""
    theirs = peft_model(architecture, a={"r": 2}, b={"r": 6})
    theirs.save_pretrained(tmp_path)
    names, ids = ["b", BASE, "a"], tokens(3)
    extra = {"decoder_input_ids": ids.flip(1)} if architecture == "t5" else {}
    want = logits(theirs, ids, adapter_names=names, **extra)
    model = base(architecture)
    filled(model, {"a": tmp_path / "a", "b": tmp_path / "b"}).use(names)
    torch.testing.assert_close(logits(model, ids, **extra), want, rtol=1e-12, atol=1e-12)


def test_a_hundred_adapters_in_three_slots(tmp_path: Path) -> None:
    """Random batches; each row is what the row alone is on PEFT's model with its adapter."""
    one = peft_model(x={"r": 2, "target_modules": ["q_proj", "up_proj"]})
    values: dict[str, dict[str, Tensor]] = {}
    model = base()
    bank = pk.AdapterBank(model, slots=3, max_rank=2, target_modules=["q_proj", "up_proj"])
    for number in range(100):
        randomize(one, number)
        one.save_pretrained(tmp_path / str(number))
        values[str(number)] = {name: value.clone() for name, value in one.state_dict().items() if "lora_" in name}
        bank.add(str(number), tmp_path / str(number) / "x")
    draw, ids = random.Random(0), tokens(1, 4)
    alone: dict[str, Tensor] = {}
    for name, given in values.items():
        one.load_state_dict(given, strict=False)
        alone[name] = logits(one, ids)[0]
    with one.disable_adapter():
        alone[BASE] = logits(one, ids)[0]
    for _ in range(300):
        names = draw.choices([*draw.sample(list(values), 3), BASE], k=draw.randint(1, 6))
        bank.use(names)
        got = logits(model, ids.expand(len(names), -1))
        torch.testing.assert_close(got, torch.stack([alone[name] for name in names]), rtol=1e-12, atol=1e-12)
    assert len(bank.resident) == 3


@pytest.mark.parametrize(("architecture", "beams"), [("llama", 1), ("llama", 3), ("t5", 2)])
def test_generate(tmp_path: Path, architecture: str, beams: int) -> None:
    """Each row's tokens are those of the row alone; beams have their row's, and an encoder rows without beams."""
    theirs = peft_model(architecture, few={"r": 5}, plain={"r": 2})
    theirs.save_pretrained(tmp_path)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    names, ids = ["few", BASE, "plain"], tokens(3, 5)
    want = theirs.generate(input_ids=ids, adapter_names=names, **options)
    model = base(architecture)
    bank = filled(model, {"few": tmp_path / "few", "plain": tmp_path / "plain"})
    with bank.use(names):
        got = model.generate(input_ids=ids, **options)
    assert torch.equal(got, want)
    assert not torch.equal(want, theirs.generate(input_ids=ids, adapter_names=[BASE] * 3, **options))


def test_outside_of_a_batch_the_model_is_what_it_was(saved: tuple[nn.Module, dict[str, Path]]) -> None:
    """PEFT's own adapter is active there, and nowhere else; blocks end with the batch of before."""
    model, folders = saved
    ids = tokens(2)
    plain, few, none = (logits(model, ids, adapter_names=[name] * 2) for name in ("plain", "few", BASE))
    own = logits(model, ids)
    assert torch.equal(own, plain)
    bank = filled(model, folders)
    assert torch.equal(logits(model, ids), own)
    with bank.use(["few", "few"]):
        torch.testing.assert_close(logits(model, ids), few, rtol=1e-12, atol=1e-12)
        with pytest.raises(RuntimeError, match="from inside"), bank.use([BASE, BASE]):
            torch.testing.assert_close(logits(model, ids), none, rtol=1e-12, atol=1e-12)
            with pytest.raises(ValueError, match=r"'few' is used again at the end of a with block"):
                bank.remove("few")
            raise RuntimeError("from inside")
        torch.testing.assert_close(logits(model, ids), few, rtol=1e-12, atol=1e-12)
        with model.disable_adapter():
            assert torch.equal(logits(model, ids), none)
    assert torch.equal(logits(model, ids), own)
    bank.remove("few")
    assert "few" not in bank.names


def test_close_gives_the_model_back(saved: tuple[nn.Module, dict[str, Path]]) -> None:
    for model in (saved[0], base(), base("gpt2")):
        classes = {name: type(module) for name, module in model.named_modules()}
        attributes = {name: set(vars(module)) for name, module in model.named_modules()}
        keys = list(model.state_dict())
        bank = pk.AdapterBank(model, slots=1, max_rank=1, target_modules="all-linear")
        assert list(model.state_dict()) == keys
        assert sum(type(module) is not classes[name] for name, module in model.named_modules()) > 5
        bank.close()
        bank.close()
        assert {name: type(module) for name, module in model.named_modules()} == classes
        assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
        copy.deepcopy(model)
        for call, arguments in ((bank.use, (None,)), (bank.add, ("a", saved[1]["few"])), (bank.remove, ("a",))):
            with pytest.raises(ValueError, match="the bank was closed"):
                call(*arguments)
        with pk.AdapterBank(model, slots=1, max_rank=1, target_modules="all-linear").use([BASE]):
            pass


def test_a_block_may_end_after_close(saved: tuple[nn.Module, dict[str, Path]]) -> None:
    bank = filled(saved[0], saved[1])
    with bank.use(["few"]):
        bank.close()
    assert type(saved[0].base_model.model.model.layers[0].self_attn.q_proj) is PeftLinear


def test_copies_are_refused(saved: tuple[nn.Module, dict[str, Path]]) -> None:
    model, folders = saved
    bank = filled(model, folders)
    for call in (lambda: copy.deepcopy(model), lambda: torch.save(model, io.BytesIO())):
        with pytest.raises(
            TypeError, match=r"a model with a bank is neither copied nor pickled; call the bank's close"
        ):
            call()
    with pytest.raises(TypeError, match="a bank is neither copied nor pickled"):
        copy.deepcopy(bank)


def test_apply_leaves_the_bank_s_layers_alone(saved: tuple[nn.Module, dict[str, Path]]) -> None:
    model, folders = saved
    bank = filled(model, folders)
    want = logits(model, tokens(2), adapter_names=None)
    with pytest.warns(UserWarning, match="nothing in PeftModel was put on these kernels"):
        report = pk.apply(model)
    assert set(report.fallbacks.values()) == {"an AdapterBank is on it; its close() comes before"}
    pk.revert(model)
    assert torch.equal(logits(model, tokens(2)), want)
    bank.close()
    pk.apply(model, strict=True)
    with pytest.raises(ValueError, match=r"q_proj is on apply's kernels, .*pk\.revert"):
        pk.AdapterBank(model)


def test_the_first_folder_says_which_layers(saved: tuple[nn.Module, dict[str, Path]]) -> None:
    model = base()
    bank = pk.AdapterBank(model, slots=2, max_rank=8)
    assert bank.nbytes == 0
    with pytest.raises(ValueError, match="add an adapter before"):
        bank.use([BASE])
    with pytest.raises(KeyError, match="none was added"):
        bank.remove("few")
    with pytest.raises(ValueError, match="rank of at most max_rank, 4, got 5"):
        pk.AdapterBank(model, slots=2, max_rank=4).add("few", saved[1]["few"])
    assert not any(type(module).__module__.startswith("peft_kernels") for module in model.modules())
    bank.add("few", saved[1]["few"])
    # q to 32 and v to 16 features from 32, in two layers, 2 slots of 8 ranks in float64.
    assert bank.nbytes == 2 * (64 + 48) * 2 * 8 * 8
    assert repr(bank) == (
        "AdapterBank(1 adapters, 0 of 2 slots taken, max_rank=8, 4 layers, 28,672 bytes on cpu, "
        f"{bank.host_nbytes:,} bytes on the host)"
    )
    with pytest.raises(ValueError, match="must be of a layer that is one of 4"):
        bank.add("plain", saved[1]["plain"])


def test_gradients_of_the_embeddings_are_peft_s(saved: tuple[nn.Module, dict[str, Path]]) -> None:
    """A frozen bank passes gradients on; PEFT trains through adapter_names only by a loop of this test's."""
    theirs, folders = saved
    model = base()
    filled(model, folders, target_modules=LLAMA).use(["few", BASE, "pattern"])
    x = torch.randn(3, 5, 32, dtype=torch.float64)
    weights = torch.randn(3, 5, 61, dtype=torch.float64)
    mine = x.clone().requires_grad_()
    (model(inputs_embeds=mine).logits * weights).sum().backward()
    for row, name in enumerate(["few", BASE, "pattern"]):
        alone = x[row : row + 1].clone().requires_grad_()
        if name == BASE:
            with theirs.disable_adapter():
                (theirs(inputs_embeds=alone).logits * weights[row]).sum().backward()
        else:
            theirs.set_adapter(name)
            (theirs(inputs_embeds=alone).logits * weights[row]).sum().backward()
        torch.testing.assert_close(mine.grad[row], alone.grad[0], rtol=1e-11, atol=1e-11)


def test_autocast(saved: tuple[nn.Module, dict[str, Path]]) -> None:
    model = base(dtype=torch.float32)
    filled(model, saved[1], target_modules=LLAMA).use(["few", "plain"])
    theirs = saved[0].float()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = logits(model, tokens(2, 32)), logits(theirs, tokens(2, 32), adapter_names=["few", "plain"])
    assert got.dtype == want.dtype
    exact = logits(copy.deepcopy(theirs).double(), tokens(2, 32), adapter_names=["few", "plain"])
    assert compare.relative_error(got, exact) < 1.1 * compare.relative_error(want, exact)


@pytest.mark.slow
def test_a_thousand_adapters_come_and_go(saved: tuple[nn.Module, dict[str, Path]]) -> None:
    """Read from their files; neither objects nor tensors are left of them."""
    model, folders = saved
    bank = filled(model, {"plain": folders["plain"]}, slots=2)

    def come_and_go(count: int) -> None:
        for number in range(count):
            bank.add(str(number), folders["pattern of names"])
            bank.use([str(number), "plain"])
            bank.use(["plain"])
            bank.remove(str(number))

    come_and_go(50)
    gc.collect()
    host, tensors, grown = bank.host_nbytes, storage_bytes(), []
    for _ in range(2):
        objects = len(gc.get_objects())
        come_and_go(500)
        gc.collect()
        grown.append(len(gc.get_objects()) - objects)
    # One that is left of each would be 500 both times; a process that runs other tests too makes some of its own once.
    assert min(grown) < 250, grown
    assert bank.host_nbytes == host
    assert storage_bytes() == tensors


def test_a_bank_goes_with_its_model(saved: tuple[nn.Module, dict[str, Path]]) -> None:
    """Nothing of the process's holds it."""
    import weakref

    model = base()
    bank = filled(model, {"few": saved[1]["few"]})
    seen = weakref.ref(bank._store)
    bank.use(["few"])
    logits(model, tokens(1))
    del model, bank
    gc.collect()
    assert seen() is None


@pytest.mark.slow
def test_other_adapters_do_not_recompile_the_model(saved: tuple[nn.Module, dict[str, Path]]) -> None:
    theirs, folders = saved
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = base()
    bank = filled(model, folders, slots=2, target_modules=LLAMA)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    ids = tokens(2)
    for names in (["few", "plain"], ["pattern", BASE], ["plain", "plain"], ["pattern of names", "few"], [BASE, BASE]):
        bank.use(names)
        want = logits(theirs, ids, adapter_names=names)
        with torch.no_grad():
            got = compiled(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        assert counter.frame_count == 1
    bank.remove("few")
    bank.add("few", folders["pattern"])
    bank.use(["few", "few"])
    with torch.no_grad():
        got = compiled(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, logits(theirs, ids, adapter_names=["pattern"] * 2), rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1


def test_conv1d_and_linear_are_told_apart() -> None:
    model = base("gpt2")
    assert isinstance(model.transformer.h[0].attn.c_attn, Conv1D)
    bank = pk.AdapterBank(model, slots=1, max_rank=1, target_modules="all-linear", dtype=torch.float32)
    assert "lm_head" not in bank._layers and len(bank._layers) == 8
    assert {shape.dtype for shape in bank._store.shapes} == {torch.float32}
    assert {(shape.k, shape.n) for shape in bank._store.shapes} == {(32, 96), (32, 32), (32, 128), (128, 32)}


@pytest.mark.gpu
def test_a_model_on_a_gpu(saved: tuple[nn.Module, dict[str, Path]]) -> None:
    """Batch after batch, so that adapters cross while the model computes."""
    theirs, folders = saved
    model = base(dtype=torch.float32).cuda()
    bank = filled(model, folders, slots=2, target_modules=LLAMA)
    theirs = theirs.float().cuda()
    ids = tokens(2).cuda()
    for names in (["few", "plain"], ["pattern", BASE], ["plain", "few"], ["pattern of names", "pattern"]) * 3:
        bank.use(names)
        got = logits(model, ids)
        want = logits(theirs, ids, adapter_names=names)
        exact = logits(copy.deepcopy(theirs).double(), ids, adapter_names=names)
        assert compare.relative_error(got, exact) < max(1e-6, 2 * compare.relative_error(want, exact))


@pytest.mark.cpu_only
def test_importing_the_package_imports_no_bank() -> None:
    import subprocess
    import sys

    probe = "import sys, peft_kernels; print('peft_kernels.integrations.peft' in sys.modules, peft_kernels.AdapterBank)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False <class 'peft_kernels.integrations.peft.bank.AdapterBank'>")
