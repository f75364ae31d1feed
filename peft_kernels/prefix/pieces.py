"""Paths of the Triton backend: our own kernels, or two pieces, of which one of torch's fused operators makes one.

    y = (e^lse_s y_s + e^lse_p y_p) / (e^lse_s + e^lse_p)        _s: the sequence's part, _p: the prefix's

A path in two pieces names the operator of the forward pass and says who makes the sequence's gradients: the operator's
own backward form, or this package's kernels, which need no more than y and lse. Only what gives the same bits twice is
taken.
"""

from __future__ import annotations

from peft_kernels._core import verdicts
from peft_kernels._core.device import hardware
from peft_kernels.prefix import qualification
from peft_kernels.prefix.kernels import config
from peft_kernels.prefix.kernels import fused_operators as fused
from peft_kernels.prefix.kernels.fused_operators import PATHS, Pieces
from peft_kernels.prefix.problem import PrefixAttentionProblem

OWN = "own"
"""The path without another's operator, first guess for every problem."""

WIDE = "wide"
"""The same with more keys in a block of the forward kernel, which TMA copies."""


def first(problem: PrefixAttentionProblem) -> str:
    """The path of calls that the clock does not decide about: compiled ones, and those of a forced backend."""
    return OWN


def taken(path: str | None, problem: PrefixAttentionProblem) -> Pieces | None:
    """The pieces of a path, None being the first; or None where all is our own."""
    return PATHS.get(path or first(problem))


def paths(problem: PrefixAttentionProblem) -> tuple[str, ...]:
    """All that are right for a problem on this machine, our own first; may start a check and wait for it."""
    return (OWN, *(path for path in (WIDE, *PATHS) if why_not(path, problem) is None))


def name_of(path: str) -> str:
    """The name under which a machine's record has a path."""
    return f"{path} path"


def why_not(path: str, problem: PrefixAttentionProblem) -> str | None:
    """Reason why a path is not taken for a problem, or None; may start a check and wait for it."""
    reason = why_not_possible(path, problem)
    return reason or verdicts.why_not(name_of(path), qualification.OF_PATH[path], problem)


def why_not_possible(path: str, problem: PrefixAttentionProblem) -> str | None:
    """Reason why a path cannot run a problem, or None."""
    chip = hardware(problem.device)
    if path == WIDE:
        possible = config.takes_wide_blocks(problem, chip)
        return None if possible else "its blocks would not fit, not be filled, or not be TMA's to read"
    operator, both = PATHS[path]
    reason = fused.why_not_pieces(problem) or operator.why_not(problem, chip)
    if reason is None and operator is fused.FLASH and both and not problem.deterministic:
        return "its gradient of q has the same bits twice under torch.use_deterministic_algorithms(True) alone"
    return reason
