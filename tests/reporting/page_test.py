import base64
import html.parser
import io
import re

import numpy as np
import PIL.Image
import pytest

from research.reporting import heat, page

HOSTILE = """<script>alert(1)</script>"onload='x'&amp;\x00\u202e\ud800 ]]> <img src=http://x.example/y.png>"""


class Tags(html.parser.HTMLParser):
    """Collects elements and what they refer to; a page that is not well nested is an error."""

    def __init__(self, text):
        super().__init__()
        self.names, self.addresses, self.open, self.text = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.names.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "data", "srcset")]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in page.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_no_text_becomes_markup():
    body = page.tag("p", HOSTILE, title=HOSTILE)
    shown = [page.tokens([HOSTILE], [1.0]), page.table(HOSTILE, [HOSTILE], [[HOSTILE, HOSTILE]])]
    shown.append(page.figure(np.zeros((2, 2, 3), np.uint8), HOSTILE, HOSTILE))
    shown.append(page.scroll(HOSTILE, page.details(HOSTILE, HOSTILE)))
    text = page.page(HOSTILE, body, *shown)
    found = Tags(text)
    assert "script" not in found.names
    assert found.names.count("img") == 1
    assert [address[:22] for address in found.addresses] == ["data:image/png;base64,"]
    assert any("<script>alert(1)</script>" in part for part in found.text)
    text.encode()
    assert "\x00" not in text


def test_a_page_asks_for_nothing_from_elsewhere_and_follows_the_reader():
    text = page.page("Title", page.tag("p", "text"))
    assert not re.search(r"https?:|//|@import|url\(", text.replace("<!doctype html>", ""))
    assert "default-src &#x27;none&#x27;" in text
    assert "prefers-color-scheme:dark" in text
    assert 'name="viewport"' in text
    assert '<html lang="en">' in text


def test_what_scrolls_is_reached_by_the_keyboard():
    box = page.table("Caption", ["a", "b"], [["row", 1]], [[0.5]])
    assert 'tabindex="0"' in box
    assert 'role="region"' in box
    assert 'aria-label="Caption"' in box
    assert '<td class="shade for" style="--share:0.500">1</td>' in box
    assert '<th scope="row">row</th>' in box


def test_values_stand_beside_colours():
    text = page.tokens(["good", "bad", "x"], [0.5, -1.0, 0.0])
    assert text.index("good") < text.index("+0.5") < text.index("bad") < text.index("\u22121") < text.index("x")
    assert 'class="shade for" style="--share:0.500"' in text
    assert 'class="shade against" style="--share:1.000"' in text
    assert page.tokens([], []) == '<ol class="tokens"></ol>'


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.0, "1"), (-0.12345, "\u22120.123"), (1.5e-7, "1.5e-7"), (1234.5, "1.23e+3"), (float("nan"), "nan")],
)
def test_numbers(value, text):
    assert page.number(value) == text
    assert page.number(abs(value), signed=True).lstrip("+") == text.lstrip("\u2212")


@pytest.mark.parametrize("size", [(5, 7), (200, 300)])
def test_images_are_held_by_their_address(size):
    image = np.random.default_rng(0).integers(0, 255, (*size, 3)).astype(np.uint8)
    address = page.data_uri(image)
    opened = PIL.Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    assert opened.size == size[::-1]
    if max(size) <= page.SMALL:
        np.testing.assert_array_equal(np.asarray(opened), image)


def test_maps_over_images():
    image = np.full((4, 4, 1), 0.5)
    values = np.zeros((4, 4))
    values[0, 0], values[3, 3] = 1, -1
    drawn = heat.over(image, values)
    assert drawn.shape == (240, 240, 3)
    assert drawn[0, 0, 2] > drawn[0, 0, 0]
    assert drawn[-1, -1, 0] > drawn[-1, -1, 2]
    assert len(set(drawn[120, 120])) == 1
    assert heat.over(image, np.zeros((4, 4))).max() > 0
    lit = heat.lit(image, values.clip(0))
    assert lit[0, 0, 0] > lit[-1, -1, 0] > 0
    boxed = heat.boxed(np.zeros((300, 400, 3)), (0.25, 0.5, 0.75, 1.0))
    assert boxed[148:154, 200].max() == 255
    assert boxed[:145].max() == boxed[160:290, 110:290].max() == 0
    assert heat.enlarged(np.zeros((1000, 500, 3), np.uint8)).shape == (512, 256, 3)


def test_grids_of_places():
    assert heat.grid(np.arange(49), (28, 28)).shape == (7, 7)
    assert heat.grid(np.arange(6), (20, 30)).shape == (2, 3)
    assert heat.grid(np.arange(4 * 3), (100, 75)).shape == (4, 3)  # 25 strides of pixels, rounded up
    assert heat.grid(np.arange(5), (28, 28)) is None
    np.testing.assert_array_equal(heat.spread(np.array([[1, 2]]), (2, 4)), [[1, 1, 2, 2]] * 2)
