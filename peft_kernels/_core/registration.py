"""What torch.library is told of an operator: schemas, fakes and the autograd formula of compiled calls.

``peft_kernels::<name>`` takes a flat call and a backend's name, and returns the results in a list.
``peft_kernels::<name>_backward`` returns, in a list, the gradients that are asked for. opcheck, torch.compile and
torch.export come here; eager calls do not.

Caches of compiled graphs know an operator by its name and its arguments, and nothing of what it returns or how it is
differentiated. So each call in a graph carries a number that changes with this package's sources, which nothing reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "peft_kernels"
_PACKAGE = Path(__file__).resolve().parent.parent
_BACKEND_AND_REVISION = "str backend, int revision"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def register(operator: Any) -> Callable[..., list[Tensor]]:
    """Register an ``Operator`` and return what dispatches a flat call."""
    name, signature = operator.name, operator.signature

    def problem_of(values: Sequence[Any]) -> tuple[Any, Any, str]:
        call, (backend, _) = signature.from_flat(values)
        return operator.make_problem(call), call, backend

    def kernel(*values: Any) -> list[Tensor]:
        problem, call, backend = problem_of(values)
        operator.note(problem, backend)
        return list(operator.fresh(problem, call, operator.select(problem, backend)))

    def fake(*values: Any) -> list[Tensor]:
        problem, call, backend = problem_of(values)
        return list(operator.results(problem, call, operator.select(problem, backend)))

    forward = _define(f"{name}({signature.text()}, {_BACKEND_AND_REVISION}) -> Tensor[]", kernel, fake)
    if operator.has_gradients:
        _register_autograd(operator, forward, _define_backward(operator))
    dispatched = _dispatched(forward)
    return lambda *values: dispatched(*values, revision())


def revision() -> int:
    """What stands for the state of the package's sources in a graph."""
    return _hash_of_sources()


# As in dispatch.py.
revision._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _hash_of_sources() -> int:
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return int.from_bytes(digest.digest()[:4], "big")


def _define_backward(operator: Any) -> str:
    signature, count = operator.signature, len(operator.activations)

    def parts(dy: Any, values: Sequence[Any]) -> tuple[Any, Sequence[Tensor | None], Any, str]:
        """The call, with empty tensors for the activations that are not there, what was kept, needs and backend."""
        call, rest = signature.from_flat(values)
        shapes, dtypes, rest = rest[:count], rest[count : 2 * count], rest[2 * count :]
        like = next(each for each in dy if each is not None) if operator.several else dy
        for name, shape, dtype in zip(operator.activations, shapes, dtypes, strict=True):
            if shape is not None and getattr(call, name) is None:
                call = call._replace(**{name: _stand_in(like, shape, dtype)})
        *kept, needed, backend, _ = rest
        places = signature.positions([len(value) for value in call if isinstance(value, tuple)])
        flags = dict(zip(_places_of_needs(operator, places), needed, strict=True))
        needs = operator.needs(*(_flags(places[name], flags) for name in operator.needs._fields))
        return call, kept, needs, backend

    def kernel(dy: Any, *values: Any) -> list[Tensor]:
        call, kept, needs, backend = parts(dy, values)
        problem = operator.make_problem(call)
        found = operator.backward(problem, call, kept, dy, needs, operator.select(problem, backend))
        # As ``fake`` says.
        return [gradient.contiguous() for gradient in signature.spread(found) if gradient is not None]

    def fake(dy: Any, *values: Any) -> list[Tensor]:
        call, _, needs, _ = parts(dy, values)
        like = signature.spread(getattr(call, name) for name in needs._fields)
        # Not empty_like, which would keep the strides of a transposed or expanded input.
        return [x.new_empty(x.shape) for x, need in zip(like, signature.spread(needs), strict=True) if need]

    facts = [f"SymInt[]? {name}_shape" for name in operator.activations]
    facts += [f"ScalarType? {name}_dtype" for name in operator.activations]
    kept = [f"Tensor? {name}" for name in operator.kept]
    dy = "Tensor?[] dy" if operator.several else "Tensor dy"
    arguments = [
        dy,
        signature.text(optional=operator.activations),
        *facts,
        *kept,
        "bool[] needs",
        _BACKEND_AND_REVISION,
    ]
    return _define(f"{operator.name}_backward({', '.join(arguments)}) -> Tensor[]", kernel, fake)


def _register_autograd(operator: Any, forward: str, backward: str) -> None:
    signature = operator.signature

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        ctx.set_materialize_grads(False)
        *flat, ctx.backend, ctx.revision = inputs
        call, _ = signature.from_flat(flat)
        ctx.lengths, *leaves = signature.leaves(call)
        ctx.asked = asked = operator.asked(tuple(_needed(signature, call, flat, ctx.needs_input_grad)), ctx.lengths)
        activations = [getattr(call, name) for name in operator.activations]
        ctx.facts = [None if x is None else list(x.shape) for x in activations]
        ctx.facts += [None if x is None else x.dtype for x in activations]
        places = signature.positions(ctx.lengths)
        for name in operator.activations:
            leaves[places[name]] = leaves[places[name]] if name in asked.reads else None
        ctx.there = [isinstance(leaf, Tensor) for leaf in leaves]
        ctx.leaves = [None if there else leaf for leaf, there in zip(leaves, ctx.there, strict=True)]
        tensors = (leaf for leaf, there in zip(leaves, ctx.there, strict=True) if there)
        ctx.save_for_backward(*tensors, *operator.keeps(output, asked.reads))

    def formula(ctx: Any, dys: list[Tensor | None]) -> tuple[Any, ...]:
        dy, asked = dys[: operator.outputs(dys)], ctx.asked
        gradients: list[Any] = [None] * len(ctx.leaves)
        incoming, saved = dy if operator.several else dy[0], iter(ctx.saved_tensors)
        leaves = [next(saved) if there else leaf for leaf, there in zip(ctx.leaves, ctx.there, strict=True)]
        call = signature.from_leaves(ctx.lengths, leaves)
        needed = signature.spread(operator.reached(call, asked.needs, incoming))
        if any(each is not None for each in dy):
            if any(needed):
                if torch.is_grad_enabled():
                    # Where a tracer keeps this formula, as torch.compile(backend="eager") does.
                    raise RuntimeError(operator.no_second_derivative)
                values = *signature.flat(call), *ctx.facts, *saved
                found = _dispatched(backward)(incoming, *values, needed, ctx.backend, ctx.revision)
                asking = (place for place, need in zip(asked.places, needed, strict=True) if need)
                for place, gradient in zip(asking, found, strict=True):
                    gradients[place] = gradient
            if asked.passes is not None:
                gradients[asked.passes] = incoming
        return (*signature.flat_gradients(call, signature.from_leaves(ctx.lengths, gradients)), None, None)

    torch.library.register_autograd(forward, formula, setup_context=setup_context, lib=_LIBRARY)


def _needed(signature: Any, call: Any, flat: Sequence[Any], flags: Sequence[bool]) -> Iterator[bool]:
    """For each leaf whether it needs a gradient; torch has a flag for each tensor of a list, else for each argument."""
    rest, positions = iter(flags), signature.flat_positions().values()
    by_argument = [
        [next(rest) for _ in value]
        if isinstance(value, list) and all(isinstance(x, Tensor) for x in value)
        else next(rest)
        for value in flat
    ]
    for value, position in zip(call, positions, strict=True):
        needed = by_argument[position]
        if not isinstance(value, tuple):
            yield needed
        elif isinstance(needed, list):
            there = iter(needed)
            yield from (next(there) if each is not None else False for each in value)
        else:  # of numbers
            yield from (needed for _ in value)


def _places_of_needs(operator: Any, places: Any) -> list[int]:
    return [place for name in operator.needs._fields for place in operator.signature.all_of(places[name])]


def _flags(place: Any, flags: dict[int, bool]) -> Any:
    return tuple(flags[each] for each in range(place.start, place.stop)) if isinstance(place, slice) else flags[place]


def _stand_in(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of a shape and dtype whose rows are one row, so that it holds next to nothing."""
    return like.new_empty(shape[-1:], dtype=dtype).expand(shape)


def _define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> str:
    """Register an operator for all devices and return its qualified name.

    ``Library.define`` takes the schema as text; ``custom_op`` would infer one from annotations that no declaration has.
    """
    qualified = f"{NAMESPACE}::{schema.split('(', 1)[0]}"
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "default", lib=_LIBRARY)(kernel)
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    return qualified


def _dispatched(qualified: str) -> Any:
    namespace, name = qualified.split("::")
    return getattr(getattr(torch.ops, namespace), name)
