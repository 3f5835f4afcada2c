"""Pages for a browser: one file each, without a script and without anything from elsewhere.

All text is escaped by what puts elements together, so that no input can become markup. Pages follow the reader's choice
of light or dark, and wide content scrolls in a box of its own.
"""

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import PIL.Image

STYLE = """
:root{color-scheme:light dark;--ground:#fff;--panel:#f5f6f8;--text:#1b1d21;--quiet:#565b64;--line:#d3d7de;
--link:#0b57a4;--for:0,114,178;--against:213,94,0;--strength:.5}
@media (prefers-color-scheme:dark){:root{--ground:#15171b;--panel:#1f2228;--text:#e9ebee;--quiet:#aab0ba;--line:#3b404a;
--link:#8ec2f5;--for:60,150,215;--against:225,110,30;--strength:.6}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--text);font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
main{max-width:72rem;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;line-height:1.2}h2{font-size:1.3rem;line-height:1.25;margin:2.5rem 0 .5rem;padding-top:1rem;
border-top:2px solid var(--line)}h3{font-size:1.1rem;margin:1.6rem 0 .4rem}h4{font-size:1rem;margin:1.2rem 0 .3rem}
a{color:var(--link)}p,ul,dl{margin:.4rem 0}dt{font-weight:600}dd{margin:0 0 .4rem 1rem;white-space:pre-wrap}
.quiet,figcaption,caption{color:var(--quiet);font-size:.875rem;text-align:left}
.scroll{overflow-x:auto;max-width:100%;padding:2px}
:focus-visible{outline:3px solid var(--link);outline-offset:2px}
details{border:1px solid var(--line);border-radius:6px;margin:.6rem 0;padding:0 .8rem}
summary{cursor:pointer;padding:.5rem 0;font-weight:600}
table{min-width:min(26rem,100%);border-collapse:collapse;font-size:.875rem;margin:.4rem 0;
font-variant-numeric:tabular-nums}
th,td{border:1px solid var(--line);padding:.2rem .45rem;text-align:right;white-space:pre;overflow-wrap:normal}
th{background:var(--panel);font-weight:600}th[scope=row],td.text{text-align:left}
.tokens{display:flex;flex-wrap:wrap;gap:4px;padding:0;margin:.3rem 0;list-style:none}
.tokens li{border:1px solid var(--line);border-radius:4px;padding:0 .35rem;text-align:center;max-width:100%}
.tokens .value{display:block;font-size:.75rem;font-variant-numeric:tabular-nums}
.token{white-space:pre-wrap;unicode-bidi:isolate;font-weight:600}
.shade{background:rgba(var(--hue),calc(var(--share)*var(--strength)))}
.for{--hue:var(--for)}.against{--hue:var(--against)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(11rem,100%),1fr));gap:.8rem;margin:.5rem 0}
figure{margin:0;min-width:0}img{display:block;max-width:100%;height:auto;width:100%;border:1px solid var(--line)}
.pixels{image-rendering:pixelated}
.key{display:inline-block;padding:0 .4rem;border-radius:4px;border:1px solid var(--line);color:var(--text)}
@media print{.scroll{overflow:visible}}
"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
VOID = ("img", "meta", "br")
CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")  # no text in HTML
SMALL = 128  # pixels of a side up to which images are kept as they are, without loss


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def escape(value: Any) -> Html:
    """Return a value as markup: `Html` as it is, anything else as text."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(CONTROLS.sub("\ufffd", str(value)), quote=True))


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """Return an element; children that are not `Html` are text, and an attribute that is None is left out.

    The trailing underscore of an attribute is dropped, and others become hyphens: `class_="quiet"`, `aria_label="..."`.
    """
    given = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None)
    head = "".join(f' {key}="{escape(str(value))}"' for key, value in given)
    if name in VOID:
        return Html(f"<{name}{head}>")
    return Html(f"<{name}{head}>{join(children)}</{name}>")


def join(children: Iterable[Any]) -> Html:
    """Return children one after the other; None is left out."""
    return Html("".join(escape(child) for child in children if child is not None))


def page(title: str, *children: Any, style: str = "") -> str:
    """Return a whole document; `style` is more CSS."""
    head = join(
        [
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
            tag("meta", name="color-scheme", content="light dark"),
            tag("title", title),
            tag("style", Html(STYLE + style)),
        ]
    )
    body = tag("main", tag("h1", title), *children)
    return "<!doctype html>\n" + tag("html", tag("head", head), tag("body", body), lang="en") + "\n"


def scroll(label: str, child: Html) -> Html:
    """Return a box that scrolls sideways, by the keyboard too, so that a wide child widens no page."""
    return tag("div", child, class_="scroll", role="region", tabindex="0", aria_label=label)


def details(summary: str, *children: Any, open: bool = False) -> Html:
    """Return what is shown on demand."""
    return tag("details", tag("summary", summary), *children, open="" if open else None)


def table(
    caption: str, head: Sequence[Any], rows: Iterable[Sequence[Any]], shades: Sequence[Sequence[float]] | None = None
) -> Html:
    """Return a table in a box that scrolls.

    Args:
      caption: what it shows.
      head: names of the columns.
      rows: cells, the first of which names the row.
      shades: for each row a number in [-1, 1] for each cell but the first: its colour; by default none.
    """
    lines = []
    for number, (first, *cells) in enumerate(rows):
        colours = shades[number] if shades is not None else [0.0] * len(cells)
        made = [
            tag("td", cell, class_=_shade(share) or ("text" if isinstance(cell, Html) else None), style=_style(share))
            for cell, share in zip(cells, colours, strict=True)
        ]
        lines.append(tag("tr", tag("th", first, scope="row"), *made))
    titles = tag("tr", *(tag("th", title, scope="col") for title in head))
    body = tag("table", tag("caption", caption), tag("thead", titles), tag("tbody", *lines))
    return scroll(caption, body)


def tokens(names: Sequence[str], values: Sequence[float] | np.ndarray, signed: bool = True) -> Html:
    """Return a text whose tokens are coloured by a number each, which stands beneath: the largest has full colour."""
    largest = max((abs(float(value)) for value in values), default=0.0)
    items = []
    for name, value in zip(names, values, strict=True):
        share = float(value) / largest if largest else 0.0
        shown = tag("span", name, class_="token", dir="auto")
        number_ = tag("span", number(float(value), signed), class_="value")
        items.append(tag("li", shown, number_, class_=_shade(share), style=_style(share)))
    return tag("ol", *items, class_="tokens")


def number(value: float, signed: bool = False) -> str:
    """Return a number with three digits that count."""
    text = f"{value:.3g}" if value else "0"
    text = text.replace("e-0", "e-").replace("e+0", "e+")
    return (f"+{text}" if signed and value > 0 else text).replace("-", "\u2212", 1 if text.startswith("-") else 0)


def figure(image: np.ndarray, description: str, caption: Any) -> Html:
    """Return an image uint8 [H, W, 3] with what is to be read where it cannot be seen, and a caption."""
    pixels = "pixels" if max(image.shape[:2]) <= SMALL else None
    height, width = image.shape[:2]
    picture = tag("img", src=data_uri(image), alt=description, class_=pixels, width=width, height=height)
    return tag("figure", picture, tag("figcaption", caption))


def data_uri(image: np.ndarray) -> str:
    """Return an image uint8 [H, W, 3] as the address that holds it."""
    small, buffer = max(image.shape[:2]) <= SMALL, io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, "PNG" if small else "JPEG", quality=88)  # which PNG takes no notice of
    return file_uri("png" if small else "jpeg", buffer.getvalue())


def file_uri(kind: str, content: bytes) -> str:
    """Return an image file's content, "png" or "jpeg", as the address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _shade(share: float) -> str | None:
    return None if not share else "shade for" if share > 0 else "shade against"


def _style(share: float) -> str | None:
    return f"--share:{min(abs(share), 1):.3f}" if share else None
