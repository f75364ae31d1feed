"""A callback for transformers' Trainer and those like it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from peft_kernels.integrations.apply_revert import apply
from peft_kernels.integrations.report import Report

_logger = logging.getLogger(__name__)


class ApplyCallback(TrainerCallback):
    """Call ``apply`` on the model when training begins, after the trainer has wrapped and placed it.

    The report is seen without any configuration of logging: the first process prints it on stderr, and fallbacks are a
    warning, when training begins and, for calls, when it ends.

    Args:
        strict, group, groups: as ``apply``'s.

    Attributes:
        report: what ``apply`` returned, None before training.
    """

    def __init__(
        self, strict: bool = False, group: bool | str = "auto", groups: Sequence[Sequence[str]] | None = None
    ) -> None:
        self.strict, self.group, self.groups = strict, group, groups
        self.report: Report | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Apply, and show the report; as a warning, in each process, if it has fallbacks."""
        self.report = apply(model, strict=self.strict, group=self.group, groups=self.groups)
        if self.report.fallbacks:
            _logger.warning("%s", self.report)
        elif getattr(state, "is_world_process_zero", True):
            print(self.report, file=sys.stderr, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warn of calls that fell back during training."""
        if self.report is not None and self.report.fallback_calls:
            _logger.warning("%s", self.report)
