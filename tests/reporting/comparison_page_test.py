import html.parser
import io
import pathlib
import re

import numpy as np
import PIL.Image

from research.reporting import comparison, comparison_page, page
from research.reporting.runs import Run

HOSTILE = '<script>alert("x")</script><img src=http://example.com/a.png>'


def png(shade=0):
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.full((4, 6, 3), shade, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def make_run(folder, seed=0, accuracy=0.8, rate=1e-3):
    (folder / "figures" / "test").mkdir(parents=True)
    config = {"seed": seed, "optimizer.learning_rate": rate, f"note{HOSTILE}": f"{HOSTILE}{rate}"}
    record = {"command": f"python {HOSTILE}", "git": {"commit": "0123456789abcdef", "dirty": True}}
    return Run(folder, config, record, (), {"step": 2, "metrics": {"test/accuracy": accuracy, f"a{HOSTILE}": 1.0}})


class Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in page.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def rendered(tmp_path):
    found = [
        make_run(tmp_path / f"run-{rate}-{seed}", seed, 0.8 + seed / 50 + rate, rate)
        for rate in (1e-3, 2e-3)
        for seed in (0, 1)
    ]
    (found[0].path / "figures" / "test" / "boxes-10.png").write_bytes(png(1))
    (found[0].path / "figures" / "test" / "boxes-9.png").write_bytes(png(2))
    (found[0].path / "figures" / f"{HOSTILE.replace('/', '')}.png").write_bytes(png(3))
    (found[0].path / "figures" / "none.png").write_text("no picture")
    groups = comparison.make_groups(found)
    metrics = list(dict.fromkeys(name for run in found for name in run.numbers))
    return found, comparison_page.render(groups, metrics, png(4))


def test_it_needs_nothing_else_and_what_runs_say_is_text(tmp_path):
    _, text = rendered(tmp_path)
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "iframe", "object", "base", "form", "a", "style "}
    sources = [attributes["src"] for _, attributes in reader.tags if "src" in attributes]
    assert len(sources) == 3  # the curves, the last boxes and the one without a step
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not [name for _, attributes in reader.tags for name in attributes if name.startswith("on")]
    style = re.search(r"<style>(.*)</style>", text, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme:dark" in style
    policy = next(a["content"] for tag, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == page.POLICY
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_every_table_scrolls_in_a_box_of_its_own(tmp_path):
    _, text = rendered(tmp_path)
    assert text.count("<table") == len(re.findall(r'<div class="scroll"[^>]*tabindex="0"[^>]*><table', text)) == 5
    assert 'name="viewport"' in text


def test_it_has_the_results_the_intervals_and_the_runs(tmp_path):
    found, text = rendered(tmp_path)
    assert "<title>4 runs in 2 groups</title>" in text
    assert "81.10 % ± 1.41 (2 runs)" in text
    assert "+0.10 points (+0.10 to +0.10; 2 pairs)" in text
    assert "0123456789ab and changes" in text
    assert str(found[3].path) in text
    assert text.count("<svg") == 2  # of the accuracy; the others do not vary


def test_the_last_picture_of_each_name_is_shown(tmp_path):
    found, text = rendered(tmp_path)
    captions = dict(comparison_page.pictures(found[0]))
    assert captions["test/boxes, step 10, the last of 2"] == png(1)
    assert len(captions) == 2
    assert "test/boxes, step 10, the last of 2" in text
    assert comparison_page.pictures(found[1]) == []
    assert comparison_page.pictures(Run(pathlib.Path(tmp_path, "gone"), {}, {}, (), {"metrics": {}})) == []
