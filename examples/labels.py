"""Labels of points in a picture, each where it covers no point and no other text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.transforms import Bbox

Point = tuple[float, float]
Label = tuple[Point, str]

# Pixels at the figure's resolution.
RADIUS = 8.0
_GAP = 5.0
_STEP = 9.0
_STEPS = 40


def place(axes: Axes, labels: Sequence[Label], points: Sequence[Point]) -> None:
    """Write each label beside its point, as near as there is room; a line leads to one that is not next to it.

    The axes must have their limits and their place in the figure.

    Args:
        labels: point in data coordinates, and text; the first ones have the choice.
        points: those that are drawn.
    """
    from matplotlib.transforms import Bbox

    renderer = axes.figure.canvas.get_renderer()
    inside = axes.get_window_extent(renderer)
    drawn = [axes.transData.transform(point) for point in points]
    taken = [Bbox.from_bounds(x - RADIUS, y - RADIUS, 2 * RADIUS, 2 * RADIUS) for x, y in drawn]
    for point, text in labels:
        x, y = axes.transData.transform(point)
        artist = axes.annotate(text, point, xytext=(0, 0), textcoords="offset pixels", va="bottom", ha="left")
        # What is written must not move the axes that it was written for.
        artist.set_in_layout(False)
        size = artist.get_window_extent(renderer)
        left, bottom = _free(x, y, size.width, size.height, taken, inside)
        artist.set_position((left - x, bottom - y))
        taken.append(Bbox.from_bounds(left, bottom, size.width, size.height))
        if abs(bottom + size.height / 2 - y) > size.height + RADIUS:
            near = min(max(x, left), left + size.width), bottom if bottom > y else bottom + size.height
            ends = axes.transData.inverted().transform([(x, y), near])
            (line,) = axes.plot(*ends.T, color="#8d99ae", linewidth=0.7, zorder=0.5)
            line.set_in_layout(False)


def _free(x: float, y: float, width: float, height: float, taken: Sequence[Bbox], inside: Bbox) -> Point:
    """The nearest place whose box overlaps nothing; the first one where there is none."""
    from matplotlib.transforms import Bbox

    candidates = list(_places(x, y, width, height))
    for left, bottom in candidates:
        box = Bbox.from_bounds(left, bottom, width, height)
        fits = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
        if fits and not any(box.overlaps(other) for other in taken):
            return left, bottom
    return candidates[0]


def _places(x: float, y: float, width: float, height: float) -> Iterator[Point]:
    """Corners of boxes to the right, to the left, above and below, further and further up and down."""
    aside = RADIUS + _GAP
    for step in range(_STEPS):
        for move in (step * _STEP, -step * _STEP):
            yield x + aside, y - height / 2 + move
            yield x - aside - width, y - height / 2 + move
            if step:
                yield x - width / 2, y - height / 2 + move
