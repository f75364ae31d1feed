"""LoRA files and the layers of a model: which are in a file, under which names, and what goes with them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from peft_kernels import FusedLoRALinear, PromptEmbedding
from peft_kernels.integrations import peft as files
from peft_kernels.integrations import transformers as integration
from python_ref import compare
from tests.integrations.models import HIDDEN, tokens
from tests.integrations.peft_prompts import task_base
from tests.integrations.prefixes import CLOSE


class Tree(nn.Module):
    """Linear layers at the given paths, called in turn."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.paths = list(layers)
        for path, layer in layers.items():
            *parents, name = path.split(".")
            parent: nn.Module = self
            for part in parents:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for path in self.paths:
            x = torch.tanh(self.get_submodule(path)(x))
        return x


def _tree(paths: dict[str, tuple[int, float] | None], seed: int = 0, **options: object) -> Tree:
    """A plain layer where there is neither rank nor alpha."""
    torch.manual_seed(seed)
    layers = {
        path: nn.Linear(8, 8) if sizes is None else FusedLoRALinear(8, 8, *sizes, **options)
        for path, sizes in paths.items()
    }
    model = Tree(layers)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model


def _plain(model: Tree) -> Tree:
    layers = {}
    for path in model.paths:
        layer = model.get_submodule(path)
        layers[path] = nn.Linear(8, 8)
        layers[path].load_state_dict({"weight": layer.weight, "bias": layer.bias})
    return Tree(layers)


TREES = {
    "an end of another": {"encoder.fc": (4, 4.0), "fc": (4, 32.0)},
    "another's end": {"fc": (4, 32.0), "encoder.fc": (4, 4.0), "a.encoder.fc": (2, 7.0)},
    "ranks": {"fc": (8, 8.0), "encoder.fc": (4, 4.0)},
    "the end of a plain layer": {"encoder.fc": None, "fc": (4, 8.0), "b": (2, 3.0)},
    "a dot stands for all": {"axb": (4, 8.0), "a.b": (2, 4.0), "a-b": (3, 5.0)},
    "operators": {"q+": (4, 8.0), "qq": (2, 4.0), "q": (3, 5.0), "q*": (2, 9.0), "(q|k)": (4, 3.0), "k": (2, 1.0)},
    "operators beside a plain layer": {"q+": (4, 8.0), "m.q+": None, "[a]": (2, 3.0), "x|y": (1, 2.0), "y": None},
    "no pattern": {"a(": (4, 8.0), "b[": (2, 4.0), "c\\": (3, 5.0), "d{2}": (2, 9.0), "^e$": (2, 1.0)},
}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("tree", TREES)
def test_every_layer_keeps_its_scaling(tree: str, use_rslora: bool, tmp_path: Path) -> None:
    model, x = _tree(TREES[tree], use_rslora=use_rslora), torch.randn(3, 8)
    files.save_adapter(model, tmp_path)
    again = _tree(TREES[tree], use_rslora=use_rslora)
    for path in again.paths:
        if TREES[tree][path]:
            nn.init.zeros_(again.get_submodule(path).lora_B["default"])
            again.get_submodule(path).scaling["default"] = -1.0
    files.load_adapter(again, tmp_path)
    compare.assert_bitwise_equal("outputs", again(x), model(x))
    theirs = peft.PeftModel.from_pretrained(_plain(model), tmp_path)
    scalings = {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert scalings == {
        path: model.get_submodule(path).scaling["default"] for path, sizes in TREES[tree].items() if sizes
    }
    torch.testing.assert_close(theirs(x), model(x), **CLOSE)


@pytest.mark.parametrize(("r", "alpha"), [(3, 16), (7, 0.1), (6, 1 / 3), (12, 1e-3), (5, -2), (49, 12345.678)])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_alphas_give_the_scaling_back(r: int, alpha: float, use_rslora: bool, tmp_path: Path) -> None:
    files.save_adapter(nn.ModuleDict({"a": FusedLoRALinear(64, 64, r, alpha, use_rslora=use_rslora)}), tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"]
    assert written / (math.sqrt(r) if use_rslora else r) == alpha / (math.sqrt(r) if use_rslora else r)
    assert isinstance(written, int) == isinstance(alpha, int)


def _without(folder: Path, *parts: str) -> None:
    path = folder / "adapter_model.safetensors"
    kept = {
        key: value for key, value in safetensors_torch.load_file(path).items() if not any(part in key for part in parts)
    }
    safetensors_torch.save_file(kept, path)


class TestStrict:
    def _pair(self, folder: Path) -> tuple[Tree, dict[str, Tensor]]:
        files.save_adapter(_tree({"a": (2, 4.0), "b": (2, 4.0), "c": (2, 4.0)}, seed=1), folder)
        model = _tree({"a": (2, 4.0), "b": (2, 4.0), "d": (2, 4.0)})
        return model, {name: value.clone() for name, value in model.state_dict().items()}

    def _changed(self, model: Tree, before: dict[str, Tensor]) -> set[str]:
        return {
            name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])
        }

    def test_a_layer_that_the_model_lacks(self, tmp_path: Path) -> None:
        model, before = self._pair(tmp_path)
        with pytest.raises(
            ValueError, match=r"c\.lora_A\.weight' must name a FusedLoRALinear.*strict=False leaves it out"
        ):
            files.load_adapter(model, tmp_path)
        assert not self._changed(model, before)
        files.load_adapter(model, tmp_path, strict=False)
        assert self._changed(model, before) == {"a", "b"}

    @pytest.mark.parametrize("name", ["default", "new"])
    def test_a_layer_that_the_file_lacks(self, name: str, tmp_path: Path) -> None:
        _, _ = self._pair(tmp_path)
        _without(tmp_path, ".b.")
        model = _tree({"a": (2, 4.0), "b": (2, 4.0), "c": (2, 4.0)})
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"must hold factors of b, since .*strict=False leaves it as it is"):
            files.load_adapter(model, tmp_path, name)
        assert model.state_dict().keys() == before.keys() and not self._changed(model, before)
        files.load_adapter(model, tmp_path, name, strict=False)
        assert name not in ("new",) or set(model.b.scaling) == {"default"}
        assert torch.equal(model.b.lora_B["default"], before["b.lora_B.default"])

    def test_another_layer_with_this_adapter(self, tmp_path: Path) -> None:
        """What it has would be mixed with the file's. Under a name that it does not have, it is out of it."""
        files.save_adapter(_tree({"a": (2, 4.0)}), tmp_path)
        model = _tree({"a": (2, 4.0), "b": (2, 4.0)})
        with pytest.raises(ValueError, match="must hold factors of b, since the model has this adapter there"):
            files.load_adapter(model, tmp_path)
        files.load_adapter(model, tmp_path, "new")
        assert set(model.a.scaling) == {"default", "new"} and set(model.b.scaling) == {"default"}

    def test_a_layer_that_the_configuration_does_not_target(self, tmp_path: Path) -> None:
        """PEFT makes no adapter there, and leaves the tensors lie."""
        model = _tree({"a": (2, 4.0), "b": (2, 4.0)})
        files.save_adapter(model, tmp_path)
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": ["a"]}))
        with pytest.raises(ValueError, match=r"b\.lora_A\.weight' must be of a layer in target_modules"):
            files.load_adapter(model, tmp_path, "new")
        files.load_adapter(model, tmp_path, "new", strict=False)
        assert set(model.b.scaling) == {"default"}

    def test_nothing_in_common(self, tmp_path: Path) -> None:
        files.save_adapter(_tree({"a": (2, 4.0)}), tmp_path)
        with pytest.raises(ValueError, match="at least one layer, holds none"):
            files.load_adapter(_tree({"b": (2, 4.0)}), tmp_path, strict=False)


def test_a_failure_while_adapters_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when memory runs out: those that were added are gone again."""
    files.save_adapter(_tree({"a": (2, 4.0), "b": (2, 4.0)}), tmp_path)
    model = _tree({"a": (2, 4.0), "b": (2, 4.0)})
    names, calls, add = list(model.state_dict()), [], FusedLoRALinear.add_adapter

    def failing(layer: FusedLoRALinear, *args: object) -> None:
        calls.append(layer)
        if len(calls) == 2:
            raise MemoryError
        add(layer, *args)

    monkeypatch.setattr(FusedLoRALinear, "add_adapter", failing)
    with pytest.raises(MemoryError):
        files.load_adapter(model, tmp_path, "new")
    assert list(model.state_dict()) == names and set(model.a.scaling) == {"default"}


def test_another_rank_says_that_parameters_are_new(tmp_path: Path) -> None:
    files.save_adapter(_tree({"a": (2, 4.0)}), tmp_path)
    model = _tree({"a": (3, 4.0)})
    with pytest.warns(UserWarning, match="an optimizer that was made before trains the old ones"):
        files.load_adapter(model, tmp_path)
    assert model.a.lora_A["default"].shape == (2, 8)


AUTO = {
    "CAUSAL_LM": ("llama", peft.AutoPeftModelForCausalLM),
    "SEQ_CLS": ("bert", peft.AutoPeftModelForSequenceClassification),
    "TOKEN_CLS": ("bert", peft.AutoPeftModelForTokenClassification),
    "QUESTION_ANS": ("bert", peft.AutoPeftModelForQuestionAnswering),
    "FEATURE_EXTRACTION": ("bert", peft.AutoPeftModelForFeatureExtraction),
    "SEQ_2_SEQ_LM": ("t5", peft.AutoPeftModelForSeq2SeqLM),
    None: ("bert", peft.AutoPeftModel),
}
LAYER = {"llama": "q_proj", "bert": "query", "t5": "SelfAttention.q"}


def _outputs(model: nn.Module) -> Tensor:
    arguments = {"decoder_input_ids": tokens()} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=tokens(), **arguments)[0]


def _with_lora(model: nn.Module, end: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    for name in [name for name, _ in model.named_modules() if name.endswith(end)]:
        model.set_submodule(name, FusedLoRALinear.from_linear(model.get_submodule(name), r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or name.split(".")[0] in ("classifier", "qa_outputs"):
                parameter.normal_()
    return model


@pytest.mark.parametrize("task", AUTO)
def test_peft_finds_the_base_model_and_the_head(task: str | None, tmp_path: Path) -> None:
    architecture, auto = AUTO[task]
    base = task_base(architecture, task or "CAUSAL_LM")
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = _with_lora(base, LAYER[architecture], seed=1)
    files.save_adapter(model, tmp_path / "adapter")
    theirs = auto.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(_outputs(theirs), _outputs(model), **CLOSE)
    theirs.save_pretrained(tmp_path / "again")
    read = _with_lora(type(base).from_pretrained(tmp_path / "base"), LAYER[architecture], seed=2)
    files.load_adapter(read, tmp_path / "again")
    torch.testing.assert_close(_outputs(read), _outputs(model), **CLOSE)


def test_a_head_with_lora_has_no_task(tmp_path: Path) -> None:
    """PEFT trains it whole, and has no LoRA in it."""
    model = _with_lora(task_base("bert", "SEQ_CLS"), "classifier", seed=1)
    with pytest.raises(ValueError, match="SEQ_CLS has PEFT train classifier whole, which has adapters here"):
        files.save_adapter(model, tmp_path, task_type="SEQ_CLS")
    files.save_adapter(model, tmp_path)
    base, head = task_base("bert", "SEQ_CLS"), model.classifier
    base.classifier.load_state_dict({"weight": head.weight, "bias": head.bias})
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(_outputs(theirs), _outputs(model), **CLOSE)


def test_no_such_task(tmp_path: Path) -> None:
    for model in (_tree({"a": (2, 4.0)}), PromptEmbedding(3, 4)):
        with pytest.raises(ValueError, match=r"task_type must be one of SEQ_CLS, .*, got 'CAUSAL'"):
            files.save_adapter(model, tmp_path / "new", task_type="CAUSAL")
    assert not (tmp_path / "new").exists()


def _prompted(seed: int) -> nn.Module:
    model = task_base("bert", "SEQ_CLS")
    torch.manual_seed(seed)
    integration.add_prompt(model, PromptEmbedding(3, HIDDEN))
    return model


BASE = [
    "bert.embeddings.word_embeddings.weight",
    "bert.encoder.layer.0.attention.self.query.weight",
    "classifier.weight",
]


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(
    ("kind", "path"), [("prompt", "prompt.weight"), *((kind, path) for kind in ("lora", "prompt") for path in BASE)]
)
def test_a_file_writes_its_adapter_alone(kind: str, listed: bool, path: str, tmp_path: Path) -> None:
    """A weight of the base model in it is refused; a head is, too, unless modules_to_save names it."""
    make: Callable[[int], nn.Module] = (
        _prompted if kind == "prompt" else lambda s: _with_lora(task_base("bert", "SEQ_CLS"), "query", s)
    )
    files.save_adapter(make(1), tmp_path)
    model, prefix = make(2), "base_model." if kind == "prompt" else "base_model.model."
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors = safetensors_torch.load_file(weights)
    tensors[prefix + path] = torch.ones_like(model.get_parameter(path))
    safetensors_torch.save_file(tensors, weights)
    names = ["classifier", path.split(".")[0]] if listed else None
    config.write_text(json.dumps({**json.loads(config.read_text()), "modules_to_save": names}))
    if listed and path.startswith("classifier"):
        files.load_adapter(model, tmp_path)
        assert bool((model.classifier.weight == 1).all())
        return
    for strict in (True, False):
        with pytest.raises(ValueError, match="modules_to_save"):
            files.load_adapter(model, tmp_path, strict=strict)
    for name, value in model.state_dict().items():
        compare.assert_bitwise_equal(name, value, before[name])
