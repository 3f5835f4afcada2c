"""Pictures can be read: nothing that is written is cut off, or stands on something else that is."""

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from research.reporting import pictures

IMAGE = np.zeros((28, 28, 3), np.float32)
LONG = "Staffordshire bullterrier\nfor American Staffordshire terrier, 99 %"


@pytest.fixture
def figure(monkeypatch):
    """Calls what draws and returns the figure in place of its pixels."""

    def keep(figure):
        FigureCanvasAgg(figure).draw()
        return figure

    monkeypatch.setattr(pictures, "render", keep)
    return lambda draw, *arguments: draw(*arguments)


def extent(text):
    return text.get_window_extent().extents  # left, bottom, right, top


def within(inner, outer):
    return (inner[:2] >= outer[:2] - 1).all() and (inner[2:] <= outer[2:] + 1).all()


def apart(one, other):
    return one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


@pytest.mark.parametrize("count", [1, 2, 10])
@pytest.mark.parametrize("name", ["", "Bag\nfor Coat, 99 %", LONG])
def test_titles_of_a_grid(figure, count, name):
    title = "Taken for another class: the 3 surest of 1,000 mistakes"
    drawn = figure(pictures.grid, [IMAGE] * count, [name] * count, min(count, 8), title)
    texts = [drawn._suptitle, *(axes.title for axes in drawn.axes if name)]
    assert all(within(extent(text), drawn.bbox.extents) for text in texts)
    assert all(apart(extent(a), extent(b)) for a, b in itertools.combinations(texts, 2))


@pytest.mark.parametrize("columns", [1, 10])
def test_titles_of_the_rest(figure, columns):
    title = (
        "75% of the patches are masked (blue); predictions are rescaled to the true mean and deviation of each patch"
    )
    rows = [np.stack([IMAGE] * columns)] * 3
    every = [IMAGE] * columns
    for drawn in (
        figure(pictures.by_class, rows, ["a", "b", "c"], title),
        figure(pictures.reconstructions, every, every, [np.ones((28, 28), bool)] * columns, title),
    ):
        assert within(extent(drawn._suptitle), drawn.bbox.extents)


def test_what_stands_beside_boxes_can_be_seen_wherever_they_are(figure):
    corners = [[0, 0, 9, 9], [20, 0, 28, 9], [-3, 12, 9, 20], [24, 24, 31, 31], [10, 10, 18, 18]]
    found = np.array(corners, float), np.arange(5), np.full(5, 0.5)
    drawn = figure(pictures.boxes, [IMAGE], [found[:2]], [found], ["T-shirt/top"] * 5)
    for axes in drawn.axes:
        assert len(axes.texts) == 5
        assert all(within(extent(text), axes.bbox.extents) for text in axes.texts)
