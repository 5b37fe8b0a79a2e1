"""Charts at their limits; that they draw what they should: test_report.py."""

import math
from xml.etree import ElementTree

from ddetr.launch.charts import Line, chart


def ticks(drawing: str) -> list[str | None]:
    return [
        t.text
        for t in ElementTree.fromstring(drawing).iter("text")
        if t.get("text-anchor") == "end" and t.text != "step"
    ]


def test_an_axis_of_many_decades_shows_these_alone() -> None:
    few = chart([Line("a", [0, 1], [1.0, 60.0])], title="t", x_name="step", log=True)
    assert ticks(few) == ["1", "2", "5", "10", "20", "50", "100"]
    many = chart([Line("a", [0, 1], [0.01, 1000.0])], title="t", x_name="step", log=True)
    assert ticks(many) == ["0.01", "0.1", "1", "10", "100", "1\N{THIN SPACE}000"]


def test_a_line_without_a_finite_value_is_said() -> None:
    drawing = chart([Line("a", [0, 1], [math.nan, math.inf])], title="Loss & more", x_name="step")
    assert drawing == '<p class="empty">No finite value of loss &amp; more yet.</p>'
    assert "No finite value" in chart([Line("a", [0], [-1.0])], title="Loss", x_name="step", log=True)
