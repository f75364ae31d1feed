"""PEFT's prefix and prompt tuning models on tiny random bases, one as PEFT made it and one applied."""

from __future__ import annotations

import copy
import warnings

import peft
import torch
import transformers
from torch import Tensor, nn

import peft_kernels as pk
from tests.integrations.models import tokens
from tests.integrations.prefixes import P, base

CONFIGS = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}

# Architecture and task, as far as PEFT has a model for both.
TASKS = [
    ("llama", "CAUSAL_LM"),
    ("qwen2", "CAUSAL_LM"),
    ("mistral", "CAUSAL_LM"),
    ("gpt2", "CAUSAL_LM"),
    ("llama", "SEQ_CLS"),
    ("bert", "SEQ_CLS"),
    ("bert", "TOKEN_CLS"),
    ("bert", "QUESTION_ANS"),
    ("bert", "FEATURE_EXTRACTION"),
]
_HEADS = {
    ("llama", "SEQ_CLS"): transformers.LlamaForSequenceClassification,
    ("bert", "SEQ_CLS"): transformers.BertForSequenceClassification,
    ("bert", "TOKEN_CLS"): transformers.BertForTokenClassification,
    ("bert", "QUESTION_ANS"): transformers.BertForQuestionAnswering,
}


def task_base(architecture: str, task: str = "CAUSAL_LM", seed: int = 0, **config: object) -> nn.Module:
    """A base model with the task's head."""
    model = base(architecture, seed, **config)
    if task == "FEATURE_EXTRACTION":
        return model.base_model
    if (architecture, task) not in _HEADS:
        return model
    changed = copy.deepcopy(model.config)
    changed.num_labels, changed.pad_token_id = (2 if task == "QUESTION_ANS" else 3), 0
    torch.manual_seed(seed)
    return _HEADS[architecture, task](changed).eval()


def build(
    kind: str, architecture: str = "llama", task: str = "CAUSAL_LM", adapters: int = 1, seed: int = 0, **options: object
) -> peft.PeftModel:
    model = task_base(architecture, task, seed)
    torch.manual_seed(seed + 1)
    options = {"num_virtual_tokens": P, **options}
    peft_model = peft.get_peft_model(model, CONFIGS[kind](task_type=task, **options))
    for index in range(1, adapters):
        peft_model.add_adapter(
            f"other{index}", CONFIGS[kind](task_type=task, **{**options, "num_virtual_tokens": P + index})
        )
    return peft_model


def pair(kind: str, *args: object, **options: object) -> tuple[peft.PeftModel, peft.PeftModel, pk.integrations.Report]:
    """The same model applied, and as it was."""
    plain = build(kind, *args, **options)
    fused = copy.deepcopy(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = pk.apply(fused)
    return fused, plain, report


def inputs(architecture: str, task: str, labels: bool, mask: Tensor | None) -> dict[str, Tensor]:
    """What a forward call of the task takes."""
    ids = tokens()
    result = {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
    if architecture == "t5":
        result["decoder_input_ids"] = ids.flip(1)
    if not labels or task == "FEATURE_EXTRACTION":
        return result
    if task == "QUESTION_ANS":
        return result | {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([4, 3, 5])}
    return result | {"labels": {"SEQ_CLS": torch.tensor([0, 1, 2]), "TOKEN_CLS": ids % 3}.get(task, ids)}


def run(model: nn.Module, arguments: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """All floating tensors that the model returns, and the gradients of its loss or of a weighted sum of the first."""
    model.zero_grad(set_to_none=True)
    output = model(**arguments)
    tensors = [part for part in output.values() if isinstance(part, Tensor)]
    loss = output.get("loss")
    if loss is None:
        weights = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(5))
        loss = (tensors[0].float() * weights).mean()
    if loss.requires_grad:
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [tensor.detach() for tensor in tensors], gradients


def generate(model: nn.Module, mask: Tensor | None, **options: object) -> Tensor:
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    return model.eval().generate(input_ids=tokens(), attention_mask=mask, **options)
