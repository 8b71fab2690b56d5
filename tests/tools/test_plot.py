"""Plots with even scales: where points land, and what the scales say."""

from xml.etree import ElementTree

import pytest

from farspan.tools.bench.plot import BOTTOM, HEIGHT, LEFT, MOST_DOTS, RIGHT, TOP, WIDTH, Points, linear

SVG = "{http://www.w3.org/2000/svg}"


def drawn(points: Points) -> ElementTree.Element:
    return ElementTree.fromstring(linear({"a & b": points}, "x < y", x_label="step", y_label="loss"))


def places(plot: ElementTree.Element) -> list[tuple[float, float]]:
    """Where the points of the only line are."""
    (line,) = plot.iter(f"{SVG}polyline")
    pairs = (pair.split(",") for pair in line.attrib["points"].split())
    return [(float(x), float(y)) for x, y in pairs]


def test_points_land_where_the_scales_say() -> None:
    plot = drawn([(0, 2.0), (50, 3.0), (100, 6.0)])
    assert places(plot) == [
        (LEFT, HEIGHT - BOTTOM),
        ((LEFT + WIDTH - RIGHT) / 2, TOP + (HEIGHT - TOP - BOTTOM) * 3 / 4),
        (WIDTH - RIGHT, TOP),
    ]
    texts = [text.text for text in plot.iter(f"{SVG}text")]
    assert texts == [
        "x < y", "2", "3", "4", "5", "6", "0", "20", "40", "60", "80", "100", "step", "loss", "a & b",
    ]  # fmt: skip


@pytest.mark.parametrize("points", [[], [(7, 0.0)], [(7, 1.5)], [(0, 1.0), (10, 1.0)], [(1, 0.3), (260_000, 1e-7)]])
def test_every_point_is_on_the_page(points: Points) -> None:
    plot = drawn(points)
    ticks = [text.text for text in plot.iter(f"{SVG}text")][1:]
    assert 2 + 2 + 2 <= len(ticks) <= 2 * 9 + 3
    for x, y in places(plot) if points else []:
        assert LEFT <= x <= WIDTH - RIGHT
        assert TOP <= y <= HEIGHT - BOTTOM


def test_a_line_of_many_points_has_no_dots() -> None:
    assert len(list(drawn([(x, x) for x in range(MOST_DOTS)]).iter(f"{SVG}circle"))) == MOST_DOTS
    assert not list(drawn([(x, x) for x in range(MOST_DOTS + 1)]).iter(f"{SVG}circle"))
