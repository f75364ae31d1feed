"""An operator with its gradients, from one declaration.

Eager calls go through an ``autograd.Function`` around a direct launch, which costs a third of a dispatched operator;
compiled ones through what registration.py makes of the same declaration. Both routes end in the same two functions of
the family, and a backward pass runs on the backend of its forward pass. Where torch must see what is inside a call, it
is composed of torch's own differentiable operations.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peft_kernels._core import candidates, dispatch, registration, timing
from peft_kernels._core.autocast import is_any_autocast, without_autocast
from peft_kernels._core.batched import is_batched, one_by_one
from peft_kernels._core.cuda_tools import is_capturing
from peft_kernels._core.dispatch import (
    ROW_INVARIANT,
    Implementation,
    backend_of_graph,
    explain_backend,
    requested_backend,
    row_invariant_forms,
    select_backend,
    way_out,
)
from peft_kernels._core.errors import UnsupportedError
from peft_kernels._core.explain import is_heard, note
from peft_kernels._core.graph import DISPATCH_MODE, as_symbol, is_transformed, why_not_opaque
from peft_kernels._core.plans import Cache, Key, Keys, Plan
from peft_kernels._core.signature import Signature

_log = logging.getLogger("peft_kernels")

OPERATORS: dict[str, Operator] = {}
"""All that were declared, by name."""


@dataclass(eq=False)
class Operator:
    """What a family declares.

    Attributes:
        name: of the public function, and of the registered operator.
        call: NamedTuple of the arguments, in the order of the schema; signature.py has the types that it may have.
        needs: NamedTuple of a bool for each argument that can have a gradient, under the argument's name; of a tuple of
            bools where the argument is a tuple of tensors. One without fields says that results have no graph.
        implementations: in the order that ``auto`` tries them; the last one runs everything, and all that is empty.
        make_problem: checks a call and returns its problem, which has ``device`` and ``is_empty``.
        forward: (problem, call, implementation) -> results: y, or all of several, and then what ``kept`` names.
        backward: (problem, call, kept, dy, needs, implementation) -> a gradient, or None, for each of ``needs``; those
            of a tuple of tensors are a tuple. What it does not read of ``call`` and kept may be None. It and ``reads``
            may be left out where nothing has a gradient.
        results: (problem, call, implementation) -> empty tensors like ``forward``'s.
        composite: (problem, call) -> what the caller sees, by torch's differentiable operations, none of them in place.
        reads: needs -> names of the tensors, among arguments and kept results, that ``backward`` reads for them.
        kept: names of the results that are there for ``backward`` alone; y's own among them where it reads y too.
        keep: (y, *results for backward alone) -> what is kept of them, a tensor or None for each name in ``kept``.
        activations: arguments that nothing holds but a call's graph. A compiled backward pass has those that it reads
            and empty tensors in the place of the others; it always has all other arguments.
        passes: an argument whose gradient is dy itself, which no registered operator may return.
        several: whether y is a tuple.
        reached: (call, needs, dy) -> the ``needs`` that are left where some of several dy are None; the rest get None.
        adds: arguments that are added to y: no gradient depends on them.
        native: (problem, call, records) -> a function of calls of the same key that returns what the caller sees by
            torch's own operators, recorded by torch's own autograd where ``records``; or None where ``forward`` and
            ``backward`` are faster, or keep less. ``auto`` takes it in the torch implementation's place, outside of
            autocast, where something is to be computed. It owes what they owe: error, bits, bytes that are kept,
            results that are no views.
        addressed: arguments whose strides and addresses ``make_problem`` reads on CUDA.
        checked: what is checked on a machine as implementations are, and not chosen: kernels that these use.
        varying: the problem's sizes that change from call to call, as the number of tokens does.
        linear: whether no gradient depends on any argument, and the torch implementation's ``backward`` is made of
            differentiable operations: then it has derivatives of its own.
    """

    name: str
    call: type[Any]
    needs: type[Any]
    implementations: tuple[Implementation, ...]
    make_problem: Callable[[Any], Any]
    forward: Callable[..., tuple[Any, ...]]
    results: Callable[..., tuple[Any, ...]]
    composite: Callable[[Any, Any], Any]
    backward: Callable[..., Sequence[Any]] = lambda problem, call, kept, dy, needs, implementation: ()
    reads: Callable[[Any], Iterable[str]] = lambda needs: ()
    kept: tuple[str, ...] = ()
    keep: Callable[..., tuple[Tensor | None, ...]] = lambda y, *kept: kept
    activations: tuple[str, ...] = ()
    passes: str | None = None
    several: bool = False
    reached: Callable[[Any, Any, Any], Any] = lambda call, needs, dy: needs
    adds: tuple[str, ...] = ()
    linear: bool = False
    native: Callable[[Any, Any, bool], Callable[[Any], Any] | None] = lambda problem, call, records: None
    addressed: tuple[str, ...] = ()
    checked: tuple[Implementation, ...] = ()
    varying: tuple[str, ...] = ()
    plans: Cache[Plan] = field(init=False, default_factory=Cache)
    signature: Signature = field(init=False)

    def __post_init__(self) -> None:
        self.no_second_derivative = (
            f"{self.name}: no second derivatives: its gradients cannot be differentiated twice by create_graph=True; "
            "torch.func's transforms, such as torch.func.hessian, can differentiate the call"
        )
        self.signature = Signature.of(self.call)
        self.key = Keys(self.signature, self.addressed)
        self._has_rows_to_keep = any(each.row_invariant for each in self.implementations)
        self.asked = lru_cache(maxsize=1024)(self._asked)
        self._eager = _eager(self)
        self._operator = registration.register(self)
        OPERATORS[self.name] = self

    @property
    def has_gradients(self) -> bool:
        """Whether any argument can have one."""
        return bool(self.needs._fields)

    @property
    def to_check(self) -> tuple[Implementation, ...]:
        """All that a machine checks by problems of this operator; what another's problems check is not among it."""
        forms = (each.row_invariant for each in self.implementations if each.row_invariant is not None)
        every = (*self.implementations, *forms, *self.checked)
        return tuple(each for each in every if each.qualification and each.qualification.family.operator == self.name)

    def __call__(self, call: Any, backend: str | None) -> Any:
        """Run a call on a backend; None is the one in force."""
        if torch.compiler.is_compiling():
            return self._traced(call, self._understood(backend_of_graph(backend)))
        asked = requested_backend(backend)
        key = self.key(call, asked)
        plan = None if key is None else self.plans.get(key)
        if plan is None:
            problem, reason = self.make_problem(call), why_not_opaque(call)
            if reason is not None:
                return self._composed(problem, call, asked, reason)
            plan = self._plan(problem, call, asked, key)
        return self.run(plan, call)

    def known(self, call: Any, backend: str | None) -> Plan | None:
        """The plan of an eager call, if one of its key was made before: then the call's arguments are right."""
        key = self.key(call, requested_backend(backend))
        return None if key is None else self.plans.get(key)

    def run(self, plan: Plan, call: Any) -> Any:
        """Run an eager call by its plan."""
        if is_heard():
            self.note(plan.problem, plan.backend, plan)
        if plan.native is not None:
            return plan.native(call)
        if not plan.records:
            return self.visible(self.fresh(plan.problem, call, plan.implementation))
        return self._eager.apply(plan.problem, plan.implementation, *self.signature.leaves(call))

    def _plan(self, problem: Any, call: Any, backend: str, key: Key | None) -> Plan:
        """Decide what a call does, and remember it under its key, if it has one."""
        backend = self._understood(backend)
        generation, records = dispatch.generation, torch.is_grad_enabled() and self.has_gradients
        implementation = self.select(problem, backend)
        is_timed = backend == "auto" and not problem.is_empty and timing.may_decide(problem.device)
        if key is not None and is_timed:
            implementation = candidates.fastest(self, problem, call)
        ends_on_torch = implementation is self.implementations[-1]
        native = None
        if key is not None and backend == "auto" and ends_on_torch and not problem.is_empty and not is_any_autocast():
            native = self.native(problem, call, records)
        plan = Plan(problem, backend, implementation, native, records, is_timed, generation)
        # While a CUDA graph is captured, auto may have to pass over what it takes elsewhere.
        if key is not None and not is_capturing(problem.device):
            self.plans.put(key, plan)
            _log.debug("%s: new plan: %s (%s)", self.name, plan, problem)
        return plan

    def _traced(self, call: Any, backend: str) -> Any:
        tensors = (x for x in self.signature.spread(call) if isinstance(x, Tensor))
        if is_transformed() or any(type(x) not in (Tensor, nn.Parameter) for x in tensors):
            if backend.endswith(ROW_INVARIANT):
                raise UnsupportedError(
                    f"{self.name}: backend {backend!r} cannot run this call: torch has to see what is inside of it; "
                    + way_out(backend)
                )
            return self.composite(self.make_problem(call), call)
        # Not by _fields and _replace, which torch 2.8 does not trace.
        is_scalar, named = self.signature.is_scalar, zip(self.signature.types, call, strict=True)
        values = [_as_symbols(value, call[0]) if is_scalar(name) else value for name, value in named]
        return self.visible(self._operator(*self._flat(values), backend))

    def _composed(self, problem: Any, call: Any, backend: str, reason: str) -> Any:
        """Run a call that may not be opaque. A forced backend has kernels alone, which a mode sees as one operator."""
        backend = self._understood(backend)
        if backend in ("auto", "torch"):
            note(lambda: f"{self.name}: torch's own operations\n  {reason}")
            with without_autocast(problem.device.type):
                return self.composite(problem, call)
        if reason == DISPATCH_MODE:
            return self.visible(self._operator(*self._flat(call), backend))
        raise UnsupportedError(f"{self.name}: backend {backend!r} cannot run this call: {reason}; {way_out(backend)}")

    def _understood(self, backend: str) -> str:
        """The backend in force, without a mode that this operator does not know."""
        return backend if self._has_rows_to_keep else backend.removesuffix(ROW_INVARIANT)

    def _flat(self, call: Any) -> list[Any]:
        """A call as the registered operator takes it, which has no formula where nothing has a gradient."""
        flat = self.signature.flat(call)
        return flat if self.has_gradients else [x.detach() if isinstance(x, Tensor) else x for x in flat]

    def fresh(self, problem: Any, call: Any, implementation: Implementation) -> tuple[Any, ...]:
        """``forward``'s results, none of them a view: what was a view in here, nobody may change in place."""
        results = self.forward(problem, _readable(call, implementation), implementation)
        return tuple(y.data if y._is_view() else y for y in results)

    def differentiate(
        self, problem: Any, call: Any, kept: Any, dy: Any, needs: Any, implementation: Implementation
    ) -> Sequence[Any]:
        """``backward``'s gradients, without a graph of their own but where the operator is linear."""
        call, (dy,) = _readable(call, implementation), _readable((dy,), implementation)
        if not torch.is_grad_enabled():
            return self.backward(problem, call, kept, dy, needs, implementation)
        if self.linear:
            return self.backward(problem, call, kept, dy, needs, self.implementations[-1])
        with torch.no_grad():
            return self.backward(problem, call, kept, dy, needs, implementation)

    def select(self, problem: Any, backend: str) -> Implementation:
        """The first guess for a problem; with nothing to compute there is nothing to launch.

        Compiled calls stay with it: their forward and their backward pass choose apart, and must choose alike.
        """
        chosen = select_backend(self.name, self.implementations, problem, backend)
        if not problem.is_empty:
            return chosen
        is_row_invariant = backend.endswith(ROW_INVARIANT)
        return (row_invariant_forms(self.implementations) if is_row_invariant else self.implementations)[-1]

    def note(self, problem: Any, backend: str, plan: Plan | None = None) -> None:
        """Tell ``explain`` of a call."""
        line, chosen = (
            ("", self.select(problem, backend)) if plan is None else (f"\n  plan: {plan}", plan.implementation)
        )
        note(lambda: explain_backend(self.name, self.implementations, problem, backend, chosen) + line)

    def visible(self, results: Sequence[Any]) -> Any:
        """Of ``forward``'s results those that the caller sees."""
        return tuple(results[: self.outputs(results)]) if self.several else results[0]

    def outputs(self, results: Sequence[Any]) -> int:
        """How many of ``forward``'s results, or of their gradients, are the caller's."""
        return len(results) - sum(name != "y" for name in self.kept)

    def _asked(self, needed: tuple[bool, ...], lengths: tuple[int, ...]) -> _Asked:
        """What follows from which leaves need a gradient."""
        signature = self.signature
        leaves = signature.positions(lengths)
        needs = self.needs(*(signature.select(leaves[name], needed) for name in self.needs._fields))
        places = tuple(place for name in self.needs._fields for place in signature.all_of(leaves[name]))
        reads = frozenset(self.reads(needs)) if any(needed[place] for place in places) else frozenset()
        read = (name for name in leaves if name in reads or signature.is_scalar(name))
        saved = tuple(place for name in read for place in signature.all_of(leaves[name]))
        passes = None if self.passes is None else next(iter(signature.all_of(leaves[self.passes])))
        added = {place for name in self.adds for place in signature.all_of(leaves[name])}
        unseen = tuple(place not in added and place not in saved for place, need in enumerate(needed) if need)
        return _Asked(needs, reads, saved, places, passes if passes is not None and needed[passes] else None, unseen)

    def keeps(self, results: Sequence[Any], reads: Iterable[str]) -> tuple[Tensor | None, ...]:
        """Of ``forward``'s results those that ``backward`` reads."""
        kept = self.keep(results[0], *results[self.outputs(results) :])
        return tuple(value if name in reads else None for name, value in zip(self.kept, kept, strict=True))


def _as_symbols(value: Any, like: Tensor) -> Any:
    return tuple([as_symbol(each, like) for each in value]) if isinstance(value, tuple) else as_symbol(value, like)


def _readable(values: Any, implementation: Implementation) -> Any:
    """A tuple of tensors and others, in memory as kernels read it: no lazy bit says that a sign is still to change."""
    if implementation.name == "torch":
        return values
    if not any(isinstance(x, Tensor) and x.is_neg() for x in Signature.spread(values)):
        return values
    resolved = map(_resolved, values)
    return values._make(resolved) if hasattr(values, "_make") else tuple(resolved)


def _resolved(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_resolved, value))
    return value.resolve_neg() if isinstance(value, Tensor) else value


class _Asked(NamedTuple):
    """What follows from which leaves need a gradient.

    Attributes:
        needs: the operator's own form of it.
        reads: as the operator says.
        saved: positions of the leaves that ``backward`` reads.
        places: positions of the leaves that ``needs`` names, in its order.
        passes: position of the leaf whose gradient is dy, where it is asked for.
        unseen: of each leaf that needs a gradient, whether a gradient may depend on it that it is not saved for.
    """

    needs: Any
    reads: frozenset[str]
    saved: tuple[int, ...]
    places: tuple[int, ...]
    passes: int | None
    unseen: tuple[bool, ...]


class _DifferentiableOnce(torch.autograd.Function):
    """Pass gradients on, tied to all that they depend on, so that no derivative of them is silently zero."""

    @staticmethod
    def forward(ctx: Any, message: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.message = message
        return tuple(tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(ctx.message)


def _differentiable_once(
    operator: Operator, node: Any, sources: Sequence[Tensor | None], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients that raise where they are differentiated, also by what dy does not depend on."""
    tied = [source for source in sources if source is not None and source.requires_grad]
    edges = [edge for edge, _ in node.next_functions if edge is not None]
    for edge, unseen in zip(edges, node.asked.unseen, strict=True):
        if unseen and not hasattr(edge, "variable"):
            # An activation that was not saved, to which nothing can be tied any more.
            raise RuntimeError(operator.no_second_derivative)
        if unseen:
            tied.append(edge.variable)
    there = [gradient for gradient in gradients if gradient is not None]
    if not there:
        return list(gradients)
    passed = iter(_DifferentiableOnce.apply(operator.no_second_derivative, len(there), *there, *tied))
    return [None if gradient is None else next(passed) for gradient in gradients]


def _eager(operator: Operator) -> type[torch.autograd.Function]:
    signature = operator.signature

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, problem: Any, implementation: Implementation, lengths: Any, *leaves: Any) -> Any:
            results = operator.fresh(problem, signature.from_leaves(lengths, leaves), implementation)
            if any(ctx.needs_input_grad):
                ctx.asked = operator.asked(ctx.needs_input_grad[3:], lengths)
                ctx.problem, ctx.implementation, ctx.lengths = problem, implementation, lengths
                # What is no tensor stays beside those that are saved.
                ctx.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
                saved = (leaves[place] if ctx.leaves[place] is None else None for place in ctx.asked.saved)
                ctx.save_for_backward(*saved, *operator.keeps(results, ctx.asked.reads))
                ctx.set_materialize_grads(not operator.several)
            return operator.visible(results)

        @staticmethod
        def backward(ctx: Any, *dy: Tensor | None) -> tuple[Tensor | None, ...]:
            asked, leaves, saved = ctx.asked, list(ctx.leaves), ctx.saved_tensors
            gradients: list[Tensor | None] = [None] * len(leaves)
            if any(signature.spread(asked.needs)) and any(each is not None for each in dy):
                for place, leaf in zip(asked.saved, saved, strict=False):
                    leaves[place] = leaves[place] if leaf is None else leaf
                call, kept = signature.from_leaves(ctx.lengths, leaves), saved[len(asked.saved) :]

                def run(dy: Sequence[Tensor | None]) -> list[Tensor | None]:
                    incoming = dy if operator.several else dy[0]
                    needs = operator.reached(call, asked.needs, incoming)
                    found = operator.differentiate(ctx.problem, call, kept, incoming, needs, ctx.implementation)
                    return signature.spread(found)

                for place, gradient in zip(
                    asked.places, one_by_one(run, dy) if is_batched(dy) else run(dy), strict=True
                ):
                    gradients[place] = gradient
            if torch.is_grad_enabled() and is_batched(dy):
                raise RuntimeError(operator.no_second_derivative)
            if torch.is_grad_enabled() and not operator.linear:
                gradients = _differentiable_once(operator, ctx, [*dy, *saved], gradients)
            if asked.passes is not None:
                gradients[asked.passes] = dy[0]
            return None, None, None, *gradients

    Eager.__name__ = Eager.__qualname__ = "".join(part.capitalize() for part in operator.name.split("_"))
    return Eager
