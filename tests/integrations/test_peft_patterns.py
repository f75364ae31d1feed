"""PEFT's rules for the names of layers: what a file says of a layer is what PEFT makes of it, and ends in time."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path

import pytest
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from peft_kernels import FusedLoRALinear
from peft_kernels.integrations import peft as files
from peft_kernels.integrations.peft import adapter_folder
from peft_kernels.integrations.peft.lora_config import read_config
from peft_kernels.integrations.peft.patterns import Pattern

_ATOMS = ["a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", r"\W", r"[\d.]", "x", "1", "^", "$", r"\b", r"\B", r"\Z", r"\A"]
_ENDS = ["*", "+", "?", "*?", "+?", "{2}", "{1,3}", "{0,2}?", "{2,}"]


def _expression(draw: random.Random, depth: int) -> str:
    kind = draw.randrange(10) if depth else 0
    if kind < 4:
        return draw.choice(_ATOMS)
    if kind < 6:
        return _expression(draw, depth - 1) + _expression(draw, depth - 1)
    if kind < 7:
        return f"({_expression(draw, depth - 1)}|{_expression(draw, depth - 1)})"
    if kind < 9:
        return f"({_expression(draw, depth - 1)}){draw.choice(_ENDS)}"
    return f"({draw.choice(['?=', '?!', '?<=', '?<!'])}{_expression(draw, depth - 1)})"


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("at_a_dot", [False, True])
def test_patterns_match_what_re_matches(at_a_dot: bool) -> None:
    draw, matches = random.Random(3), 0
    for _ in range(2000):
        text = _expression(draw, 4)
        whole = rf"(.*\.)?({text})$" if at_a_dot else text
        try:
            expected = re.compile(whole)
        except re.error:
            with pytest.raises(ValueError, match=r"^here must be .* is not supported"):
                Pattern("here", text, at_a_dot)
            continue
        pattern = Pattern("here", text, at_a_dot)
        for _ in range(4):
            name = "".join(draw.choice("ab.x1") for _ in range(draw.randrange(9)))
            assert pattern.match(name) == bool(expected.match(name)), (whole, name)
            assert pattern.fullmatch(name) == bool(expected.fullmatch(name)), (whole, name)
            matches += pattern.match(name)
    assert 1000 < matches < 7000


EVIL = "a" * 60 + "!"


@pytest.mark.parametrize(
    "text",
    [
        "(a+)+b",
        "(a|a)*b",
        "(.*)*b",
        ".*" * 12 + "b",
        "(a?){40}a{60}b",
        "(a{1,1000}){1,1000}b",
        "(){4000000000}b",
        "((" * 8 + "a*" + "c|a)*" * 8 + ")" * 8,
        "(" * 400 + "a" + ")*" * 400,
        "(" * 5000 + ")" * 5000,
    ],
)
@pytest.mark.parametrize("at_a_dot", [False, True])
def test_no_pattern_runs_for_ever(text: str, at_a_dot: bool) -> None:
    start = time.perf_counter()
    try:
        Pattern("here", text, at_a_dot).fullmatch(EVIL)
    except ValueError as error:
        assert re.search("^here must be .*(takes too long|is not supported)", str(error))
    assert time.perf_counter() - start < 10  # re takes years; a second is plenty, and the machine may be busy


@pytest.mark.parametrize("text", ["(", "a)", "[", "*", "(?i)a", "(?s:a)", r"(a)\1", "(?>a)", "a*+", r"\p", "(?<=a*)b"])
def test_what_is_no_pattern(text: str) -> None:
    with pytest.raises(ValueError, match=r"^here must be .* is not supported"):
        Pattern("here", text)


NAMES = [
    f"{head}layers.{layer}.{end}"
    for head in ("", "model.", "model.decoder.", "h.7.")
    for layer in (0, 1, 11)
    for end in ("fc", "self_attn.q_proj", "experts.1.fc", "proj+", "mlp.fc1", "a-b")
] + ["fc", "encoder.fc", "proj+", ""]


def _read(folder: Path, **options: object) -> object:
    path = folder / "adapter_config.json"
    if not path.exists():
        files.save_adapter(nn.ModuleDict({"fc": FusedLoRALinear(2, 2)}), folder)
    path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    return read_config(adapter_folder.read(folder, ("LORA",)))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["fc", "q_proj"]},
        {"target_modules": ["layers.1.fc", "proj+"]},
        {"target_modules": "fc"},
        {"target_modules": r".*layers\.(0|11)\..*(fc|q_proj)$"},
        {"target_modules": r"^(?!.*decoder).*\.(fc\d?|q_proj)"},
        {"target_modules": r"(?:.*?(?:decoder|h).*?(?:experts|mlp).*?(?:fc|fc1))|(?:\bmodel\.layers\.[\d]{1,}\.fc)"},
        {"target_modules": ["fc"], "exclude_modules": ["layers.0.fc"]},
        {"target_modules": ["fc"], "exclude_modules": r".*\.experts\..*"},
        {"target_modules": ["fc"], "layers_to_transform": 1},
        {"target_modules": ["fc", "model.layers.0.fc"], "layers_to_transform": [1, 7]},
        {"target_modules": ["fc"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["fc"], "layers_to_transform": [7, 11], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["fc"], "layers_to_transform": []},
        {"target_modules": []},
    ],
    ids=str,
)
def test_targets_are_peft_s(options: dict[str, object], tmp_path: Path) -> None:
    theirs = peft.LoraConfig(**options)
    targets = _read(tmp_path, **options).targets
    assert {n for n in NAMES if targets.include(n)} == {
        n
        for n in NAMES
        if check_target_module_exists(theirs, n) is True or isinstance(check_target_module_exists(theirs, n), re.Match)
    }


@pytest.mark.parametrize(
    "keys",
    [
        ["fc"],
        ["q_proj", "fc"],
        ["^fc"],
        [r"layers\.\d+\.fc", "fc"],
        ["proj+"],
        ["fc|a-b"],
        ["model.layers.1.fc", "x.fc"],
        ["layers.(0|1).*fc", "encoder.fc"],
        ["a)|(fc"],
        [""],
    ],
    ids=str,
)
def test_alphas_and_ranks_are_peft_s(keys: list[str], tmp_path: Path) -> None:
    pattern = {key: 2 + index for index, key in enumerate(keys)}
    config = _read(tmp_path, r=9, lora_alpha=18, rank_pattern=pattern, alpha_pattern=pattern)
    ranks = {name: pattern.get(get_pattern_key(pattern.keys(), name), 9) for name in NAMES}
    assert {name: config.rank(name) for name in NAMES} == ranks
    assert {n: config.scaling(n) for n in NAMES} == {
        n: pattern.get(get_pattern_key(pattern.keys(), n), 18) / ranks[n] for n in NAMES
    }


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rank_pattern", [1]),
        ("rank_pattern", {"0": 2.0}),
        ("rank_pattern", {"0": True}),
        ("rank_pattern", {"0": 0}),
        ("rank_pattern", {"(": 2}),
        ("rank_pattern", {"(a+)+\\1": 2}),
        ("alpha_pattern", "x"),
        ("alpha_pattern", {"0": "x"}),
        ("alpha_pattern", {"0": float("nan")}),
        ("alpha_pattern", {"0": 10**400}),
        ("alpha_pattern", {"(?i)x": 1}),
        ("target_modules", 5),
        ("target_modules", {"a": 1}),
        ("target_modules", ["a", 5]),
        ("target_modules", "("),
        ("exclude_modules", "*"),
        ("layers_to_transform", "1"),
        ("layers_to_transform", [1.5]),
        ("layers_to_transform", True),
        ("layers_pattern", "(a+)+"),
        ("layers_pattern", [1]),
        ("use_rslora", "false"),
        ("use_rslora", 1),
        ("bias", True),
        ("bias", "some"),
        ("lora_dropout", 1.5),
        ("task_type", "CAUSAL"),
        ("task_type", 5),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "OLoRA"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", ["gaussian"]),
        ("modules_to_save", "classifier"),
        ("modules_to_save", [["classifier"]]),
        ("velora_config", {"rank": 1}),
        ("kasa_config", {"beta": 1}),
        ("monteclora_config", {"a": 1}),
        ("use_dora", True),
        ("lora_bias", True),
        ("layer_replication", [[0, 1]]),
        ("alora_invocation_tokens", [1]),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["x"]),
        ("use_qalora", True),
        ("use_bdlora", {"a": 1}),
        ("arrow_config", {"a": 1}),
        ("megatron_config", {"a": 1}),
    ],
    ids=str,
)
def test_options_that_are_refused(option: str, value: object, tmp_path: Path) -> None:
    model = nn.ModuleDict({"fc": FusedLoRALinear(2, 2)})
    files.save_adapter(model, tmp_path)
    nn.init.ones_(model["fc"].lora_A["default"])
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), option: value}))
    with pytest.raises(ValueError, match=rf"adapter_config\.json.* {option}"):
        files.load_adapter(model, tmp_path)
    assert bool((model["fc"].lora_A["default"] == 1).all())


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_pattern_that_takes_too_long_names_the_file(option: str, tmp_path: Path) -> None:
    model = nn.ModuleDict({"a" * 50: FusedLoRALinear(2, 2)})
    files.save_adapter(model, tmp_path)
    path, text = tmp_path / "adapter_config.json", "((" * 8 + "a*" + "c|a)*" * 8 + ")" * 8 + "b"
    value = {text: 2} if option.endswith("pattern") else text
    path.write_text(json.dumps({**json.loads(path.read_text()), option: value}))
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {option} must .* takes too long with 'aaa"):
        files.load_adapter(model, tmp_path)


def test_every_option_of_peft_is_known_or_refused(tmp_path: Path) -> None:
    """A configuration of PEFT's defaults loads, and so does one in which what concerns the initialisation is set."""
    path = tmp_path / "adapter_config.json"
    model = nn.ModuleDict({"fc": FusedLoRALinear(2, 2, r=8)})
    files.save_adapter(model, tmp_path)
    config = peft.LoraConfig(target_modules=["fc"], ensure_weight_tying=True, fan_in_fan_out=True).to_dict()
    config["target_modules"], config["peft_type"] = ["fc"], "LORA"
    path.write_text(json.dumps({**config, "eva_config": {"rho": 2.0}, "init_lora_weights": "eva", "bias": "all"}))
    files.load_adapter(model, tmp_path)
