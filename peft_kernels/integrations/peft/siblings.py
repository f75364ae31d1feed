"""What the LoRA layers of one parent share: which of them are groups, and what one call of the parent makes for them.

Scope       from the parent's pre-hook to its hook, in one thread: outputs that are parked for the members of a group,
            seeds by input, and who was handed what. Nothing of it outlives the parent's call; where the hook does not
            run (KeyboardInterrupt), it goes with the thread's next call of the parent.
Siblings    from ``apply`` to ``revert``: names alone. Whose they are a call finds in the parent that is called, so
            that copies, replicas and a layer by itself need nothing more.

A mask depends on seed and lane, and both on what the parent's call hands to whom: not on whether it was observed,
grouped, or ran after a group was dissolved. torch's checkpointing without reentrance also compares the tensors that a
call saves with those of its recomputation, so groups come and go only while no checkpointed call of the parent waits
for its backward pass.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from peft_kernels._core import dispatch
from peft_kernels._core.autocast import autocast_dtype
from peft_kernels.lora.kernels import dropout

Group = tuple[str, ...]
"""Names of layers of one parent, in the order in which it calls them."""

Values = tuple[Sequence[Any], list[tuple[Any, ...]]]
"""Tensors, numbers and None, and of each tensor what changes with its memory and with what is written there."""

MISSES = 2
"""After so many calls in which a member did not take what was made for it, a group is dissolved."""

# While torch.compile traces, a version is no number, but two addresses are known to be one if nothing was written
# between. Older releases know neither, and every layer computes alone there.
_TRACES_ADDRESSES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)

# Of torch 2.8 and newer. Without it nobody can say which calls torch's checkpointing is to repeat.
SEES_REGIONS = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")


class Seed:
    """A seed that was drawn for an input, and which layers have used it."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.value = x, dropout.draw_seed(x.device)
        self.used: set[str] = set()


class Parked:
    """Outputs that a group's first member made for the others.

    Attributes:
        outputs: of each member that has not come yet, with what it was made of.
        surroundings: of the call.
        seed: of its masks, or None.
        is_missed: whether a member came that could not take its own.
    """

    def __init__(self, x: Tensor, outputs: dict[str, tuple[Tensor, Values]], seed: Seed | None) -> None:
        self.outputs, self.seed, self.is_missed = outputs, seed, False
        self.surroundings = _surroundings(x)


class Scope:
    """One call of a parent, in one thread.

    Attributes:
        siblings, parent: whose call it is.
        groups: by member, as they were when the call began.
        mode: in which the parent was called.
        is_forced: as the siblings'.
        parked: by group.
        inputs: what layers were handed that are not observed yet, each input with their names in order.
    """

    def __init__(self, siblings: Siblings, parent: nn.Module, mode: Any) -> None:
        self.siblings, self.parent, self.groups, self.mode = siblings, parent, siblings.groups, mode
        self.is_forced = siblings.is_forced
        self.parked: dict[Group, Parked] = {}
        self.inputs: list[tuple[Tensor, list[str]]] = []
        self._seeds: list[Seed] = []

    def observe(self, name: str, x: Tensor) -> None:
        """Note what a layer is handed."""
        for each, names in self.inputs:
            if each is x:
                names.append(name)
                return
        self.inputs.append((x, [name]))

    def unused_seed(self, name: str, x: Tensor) -> Seed | None:
        """The first seed of an input that a layer has not used; None: a new one has to be drawn."""
        for seed in self._seeds:
            if seed.x is x and name not in seed.used:
                return seed
        return None

    def seed_for(self, name: str, x: Tensor) -> Seed:
        """The seed that a layer has to use for an input; whoever uses it says so by ``used``."""
        seed = self.unused_seed(name, x)
        if seed is None:
            seed = Seed(x)
            self._seeds.append(seed)
        return seed

    def park(self, group: Group, x: Tensor, outputs: dict[str, tuple[Tensor, Values]], seed: Seed | None) -> None:
        """Keep outputs for the members of a group that are still to come."""
        self.parked[group] = Parked(x, outputs, seed)

    def waits(self, group: Group) -> bool:
        """Whether outputs of a group are parked."""
        return group in self.parked and len(self.parked[group].outputs) > 0

    def take(self, name: str, x: Tensor, values: Sequence[Any]) -> Tensor | None:
        """What is parked for a layer, if it is what the layer would compute now from x and other values."""
        parked = self.parked.get(self.groups.get(name, ()))
        if parked is None or name not in parked.outputs:
            return None
        y, made_of = parked.outputs.pop(name)
        now = values_of([x, *values])
        if now is not None and _are_same(made_of, now) and parked.surroundings == _surroundings(x):
            if parked.seed is not None:
                parked.seed.used.add(name)
            return y
        parked.is_missed = True
        return None


class _Here(threading.local):
    scope: Scope | None = None


class Siblings:
    """The LoRA layers of one parent, by their names.

    Args:
        names: of all, in the parent's order; a layer's place is the lane of its mask.
        named: the groups, where they are not observed but given.
        is_forced: whether they are groups even where the clock may find them slower.
    """

    def __init__(self, names: Sequence[str], named: Sequence[Group] | None, is_forced: bool) -> None:
        self.wanted = tuple(names), None if named is None else tuple(named), is_forced
        self.lanes = {name: lane for lane, name in enumerate(names)}
        self.is_forced = is_forced
        self.unseen = set(names) if named is None else set()
        self.groups: Mapping[str, Group] = {name: group for group in named or () for name in group}
        self.dissolved: tuple[Group, ...] = ()
        # While torch.compile traces, which sees neither threads nor weak references.
        self.traced: Scope | None = None
        self._next = self.groups
        self._misses: Counter[Group] = Counter()
        self._here, self._lock = _Here(), threading.Lock()
        self._regions: WeakSet[Any] = WeakSet()

    def __deepcopy__(self, memo: dict[int, Any]) -> Siblings:
        names, named, is_forced = self.wanted
        memo[id(self)] = copied = Siblings(names, named, is_forced)
        # What the original waits for is no concern of the copy's.
        copied.unseen, copied.groups, copied.dissolved = set(self.unseen), self._next, self.dissolved
        copied._next, copied._misses = self._next, Counter(self._misses)
        return copied

    def formed(self) -> tuple[Group, ...]:
        """The groups, each once."""
        return tuple(dict.fromkeys(self._next.values()))

    def scope(self) -> Scope | None:
        """The parent's call that surrounds this one.

        None also in a part of it that is in another mode, without gradients or checkpointed: recomputed by itself, that
        part finds no parent's call.
        """
        if torch.compiler.is_compiling():
            scope, mode = self.traced, _traced_mode()
        else:
            scope, mode = self._here.scope, _mode()
        return scope if scope is not None and scope.mode == mode else None

    def enter(self, parent: nn.Module) -> None:
        """Begin a call of the parent."""
        if torch.compiler.is_compiling():
            if _TRACES_ADDRESSES:
                _trace_in(self, Scope(self, parent, _traced_mode()))
            return
        self._settle()
        mode = _mode()
        if mode[-1] is not None:
            self._regions.add(mode[-1])
        self._here.scope = Scope(self, parent, mode)

    def leave(self, is_finished: bool) -> None:
        """End a call of the parent; one that is not finished says nothing about groups."""
        if torch.compiler.is_compiling():
            if _TRACES_ADDRESSES:
                _trace_in(self, None)
            return
        self.traced = None
        scope, self._here.scope = self._here.scope, None
        if scope is not None and is_finished:
            with self._lock:
                self._learn(scope)
        self._settle()

    def _learn(self, scope: Scope) -> None:
        """Make groups of what was observed, and dissolve what was missed too often."""
        groups = dict(self._next)
        for _, handed in scope.inputs:
            group = tuple(name for name in dict.fromkeys(handed) if name in self.unseen)
            self.unseen -= set(group)
            if len(group) > 1:
                groups |= dict.fromkeys(group, group)
        for group, parked in scope.parked.items():
            self._misses[group] += parked.is_missed or bool(parked.outputs)
            if self._misses[group] >= MISSES and groups.get(group[0]) == group:
                self.dissolved += (group,)
                groups = {name: each for name, each in groups.items() if each != group}
        if groups != self._next:
            self._next = groups

    def _settle(self) -> None:
        """Let the groups be those that they should be, unless a call may have to be repeated as it was."""
        if self.groups is not self._next and not len(self._regions):
            self.groups = self._next


class _Hook:
    """On a parent. Pickled as a function of the standard library's that does nothing."""

    def __init__(self, siblings: Siblings) -> None:
        self.siblings = siblings

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return type(self)(copy.deepcopy(self.siblings, memo))

    def __reduce__(self) -> Any:
        return getattr, (contextlib.nullcontext(), "__exit__")


class _Enter(_Hook):
    def __call__(self, parent: nn.Module, args: Any) -> None:
        self.siblings.enter(parent)


class _Leave(_Hook):
    def __call__(self, parent: nn.Module, args: Any, result: Any) -> None:
        # After an exception there is none.
        self.siblings.leave(result is not None)


def attach(parent: nn.Module, siblings: Siblings) -> None:
    """Have the parent's calls begin and end scopes."""
    parent.register_forward_pre_hook(_Enter(siblings))
    parent.register_forward_hook(_Leave(siblings), always_call=True)


def attached(parent: nn.Module) -> Siblings | None:
    """What is attached to a parent."""
    hooks = [hook for hook in parent._forward_pre_hooks.values() if isinstance(hook, _Enter)]
    return hooks[0].siblings if hooks else None


def detach(parent: nn.Module) -> None:
    """Take it off, and what a pickled model has in its place."""
    for hooks, others in (
        (parent._forward_pre_hooks, (parent._forward_pre_hooks_with_kwargs,)),
        (parent._forward_hooks, (parent._forward_hooks_with_kwargs, parent._forward_hooks_always_called)),
    ):
        for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
            del hooks[key]
            for other in others:
                other.pop(key, None)


def values_of(values: Sequence[Any]) -> Values | None:
    """What an output is made of, to be compared later; None where a change could not be seen."""
    tensors = [x for x in values if isinstance(x, Tensor)]
    if torch.compiler.is_compiling():
        return values, [(x.data_ptr(), x.requires_grad) for x in tensors]
    try:
        return values, [(x._version, x.data_ptr(), x.requires_grad) for x in tensors]
    except RuntimeError:  # a tensor of inference mode has no version
        return None


def _are_same(made_of: Values, values: Values) -> bool:
    """Whether values are the very objects that were noted, and unchanged; numbers may be equal."""
    (olds, states), (news, new_states) = made_of, values
    if len(olds) != len(news) or len(states) != len(new_states):
        return False
    for old, new in zip(olds, news, strict=True):
        if old is not new and (isinstance(old, Tensor) or isinstance(new, Tensor) or old != new):
            return False
    return states == new_states


def _surroundings(x: Tensor) -> tuple[Any, ...]:
    """What a member's call has to have in common with that of the first, beside the parent's mode."""
    dtype = autocast_dtype(x.device.type)
    if torch.compiler.is_compiling():
        return dtype, dispatch.backend_of_graph(None)
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    return dtype, dispatch.requested_backend(None), stream


def _mode() -> tuple[Any, ...]:
    """Whether gradients are recorded, and which checkpointed region saves tensors, last."""
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), _region()


def _trace_in(siblings: Siblings, scope: Scope | None) -> None:
    """Set the traced scope, also while a checkpointed region is traced, which may change nothing that lies outside.

    A recomputation has no part in it: it is made of the region's graph, and the scope is gone by its end.
    """
    torch._dynamo.utils._disable_side_effect_safety_checks_for_current_subtracer(_set_traced, siblings, scope)


def _set_traced(siblings: Siblings, scope: Scope | None) -> None:
    siblings.traced = scope


def _traced_mode() -> tuple[Any, ...]:
    """Whether gradients are recorded, and which trace this is: behind a break of the graph it is another one."""
    return torch.is_grad_enabled(), _trace()


def _trace() -> str:
    return str(torch._guards.CompileContext.current_compile_id())


# What torch.compiler.assume_constant_result does, without importing torch's compiler.
_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _region() -> Any:
    """What stands for a region that torch's checkpointing will recompute: it lives until no recomputation can come."""
    hooks: tuple[Callable[..., Any], ...] | None = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None or getattr(hooks[1], "__module__", None) != "torch.utils.checkpoint":
        return None
    return hooks[1]


def _is_ours(hook: Any) -> bool:
    return isinstance(hook, _Hook) or getattr(hook, "__func__", None) is contextlib.nullcontext.__exit__
