"""Plots as plain SVG files, one line per series, each named at its end: log-log, or with even scales."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]
"""(tokens, milliseconds) or what else is measured, ascending in the first."""

WIDTH, HEIGHT = 860, 520
LEFT, RIGHT, TOP, BOTTOM = 76, 230, 48, 56
COLORS = ("#222222", "#0b6fb8", "#d1495b", "#2e8b57", "#c77d0a", "#7b4bb3", "#0f8b8d", "#a0522d", "#5f6b7a", "#c2418c")
LINE_HEIGHT = 15
MOST_DOTS = 40
"""Lines of more points are drawn without a dot on each."""
MOST_TICKS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class _Axis:
    """place: where a value is on the page. ticks: values with a line across the plot, and what is said there."""

    place: Callable[[float], float]
    ticks: Mapping[float, str]
    label: str


def human(tokens: int) -> str:
    """Return tokens as 512, 16K or 1M, in powers of 1024 where they are whole."""
    for suffix, unit in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{suffix}"
    return str(tokens)


def log_log(
    series: Mapping[str, Sequence[tuple[int, float]]],
    title: str,
    *,
    x_label: str = "tokens",
    y_label: str = "milliseconds",
) -> str:
    """Return the SVG text; series without points are left out, and a plot of nothing has only its axes."""
    xs = sorted({tokens for points in series.values() for tokens, _ in points}) or [1024]
    ys = [ms for points in series.values() for _, ms in points] or [1.0]
    low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
    high = max(high, low + 1)

    def across(tokens: float) -> float:
        span = math.log(xs[-1] / xs[0]) or 1.0
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(tokens / xs[0]) / span

    def down(ms: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - math.log10(ms)) / (high - low)

    decades = {10.0**decade: f"{10.0**decade:g}" for decade in range(low, high + 1)}
    x = _Axis(place=across, ticks={tokens: human(tokens) for tokens in xs}, label=x_label)
    return _drawn(series, title, x, _Axis(place=down, ticks=decades, label=y_label))


def linear(series: Mapping[str, Points], title: str, *, x_label: str, y_label: str) -> str:
    """Return the SVG text of a plot with even scales; series without points are left out."""
    xs = [x for points in series.values() for x, _ in points] or [0.0]
    ys = [y for points in series.values() for _, y in points] or [0.0]
    x_ticks, y_ticks = _round_numbers(min(xs), max(xs)), _round_numbers(min(ys), max(ys))

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])

    def down(y: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (y_ticks[-1] - y) / (y_ticks[-1] - y_ticks[0])

    x_axis = _Axis(place=across, ticks={tick: f"{tick:,.10g}" for tick in x_ticks}, label=x_label)
    y_axis = _Axis(place=down, ticks={tick: f"{tick:,.10g}" for tick in y_ticks}, label=y_label)
    return _drawn(series, title, x_axis, y_axis)


def _round_numbers(low: float, high: float) -> list[float]:
    """Return even steps of 1, 2 or 5 times a power of ten from at most `low` to at least `high`; two or more."""
    if low == high:
        high = low + (abs(low) or 1.0)
    least = (high - low) / (MOST_TICKS - 2)
    unit = 10.0 ** math.floor(math.log10(least))
    step = unit * next(times for times in (1, 2, 5, 10) if unit * times >= least)
    # Rounded, since a sum of tenths is no tenth.
    return [round(number * step, 12) for number in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _drawn(series: Mapping[str, Points], title: str, x_axis: _Axis, y_axis: _Axis) -> str:
    series = {name: points for name, points in series.items() if points}
    ends = {name: y_axis.place(points[-1][1]) for name, points in series.items()}
    parts = [*_frame(title), *_axes(x_axis, y_axis)]
    for number, (name, label_y) in enumerate(_spread(ends).items()):
        color = COLORS[number % len(COLORS)]
        dashes = ' stroke-dasharray="6 4"' if number >= len(COLORS) else ""
        places = [(x_axis.place(x), y_axis.place(y)) for x, y in series[name]]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        many = len(places) > MOST_DOTS
        width = 1.3 if many else 2
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"{dashes}/>')
        if not many:
            parts += (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in places)
        x, y = places[-1]
        border = WIDTH - RIGHT + 14
        parts.append(f'<path d="M{x + 5:.1f},{y:.1f} L{border - 3},{label_y:.1f}" stroke="{color}" opacity="0.35"/>')
        parts.append(f'<text x="{border}" y="{label_y + 4:.1f}" fill="{color}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _frame(title: str) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="26" font-size="15" fill="#222222">{escape(title)}</text>',
    ]


def _axes(x_axis: _Axis, y_axis: _Axis) -> list[str]:
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
    parts = []
    for value, said in y_axis.ticks.items():
        y = y_axis.place(value)
        parts.append(f'<path d="M{left},{y:.1f} H{right}" stroke="#dddddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#444444">{said}</text>')
    for value, said in x_axis.ticks.items():
        x = x_axis.place(value)
        parts.append(f'<path d="M{x:.1f},{top} V{bottom}" stroke="#eeeeee"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle" fill="#444444">{said}</text>')
    middle = (left + right) / 2
    parts.append(f'<path d="M{left},{top} V{bottom} H{right}" fill="none" stroke="#444444"/>')
    parts.append(f'<text x="{middle}" y="{bottom + 40}" text-anchor="middle" fill="#444444">{x_axis.label}</text>')
    y = (top + bottom) / 2
    parts.append(
        f'<text x="20" y="{y}" text-anchor="middle" fill="#444444" transform="rotate(-90 20 {y})">{y_axis.label}</text>'
    )
    return parts


def _spread(ends: Mapping[str, float]) -> dict[str, float]:
    """Return heights for the names, in order, that keep a line's height apart and stay on the page."""
    order = sorted(ends, key=lambda name: ends[name])
    heights: dict[str, float] = {}
    lowest = float(TOP)
    for name in order:
        heights[name] = max(ends[name], lowest)
        lowest = heights[name] + LINE_HEIGHT
    # Pushed off the bottom: push back up.
    highest = float(HEIGHT - LINE_HEIGHT)
    for name in reversed(order):
        heights[name] = min(heights[name], highest)
        highest = heights[name] - LINE_HEIGHT
    return {name: heights[name] for name in ends}
