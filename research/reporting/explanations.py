"""An explanation as elements of a page: coloured text, maps over pictures, tables.

Shape letters as in `analysis.explanation`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from research.analysis.attribution import windows
from research.analysis.explanation import IMAGE, QUERIES, Explanation, sides
from research.reporting import heat
from research.reporting.page import Html, details, figure, join, number, table, tag, tokens

METHODS = {
    "integrated_gradients": "Integrated gradients",
    "gradient_x_input": "Gradient x input",
    "occlusion": "Occlusion",
}
READING = {
    "integrated_gradients": "They sum to the difference that the whole input makes.",
    "gradient_x_input": "How the number would change at once if a part grew in proportion.",
    "occlusion": "By how much the number falls where this part alone is hidden.",
}
BLANK = {True: "a grey image", False: "blank tokens"}
SHOWN = 5  # places that a table lists
Namer = Callable[[int], str]


def legend() -> Html:
    """Return what the colours mean."""
    raising = tag("span", "blue, +", class_="key shade for", style="--share:1")
    lowering = tag("span", "orange, \u2212", class_="key shade against", style="--share:1")
    return tag(
        "p", raising, " raises the explained number, ", lowering, " lowers it; the strongest part has the full colour."
    )


def blocks(found: Explanation, namer: Namer, picture: np.ndarray | None = None, prefix: int = 0) -> Html:
    """Return all that there is to show of an explanation.

    Args:
      found: the explanation.
      namer: the text of a token.
      picture: the example's image as one sees it, float [H, W, 1 or 3] in [0, 1]; None where it has none.
      prefix: how many tokens of the image's encoder come before its patches.
    """
    names = {feature: [namer(int(id)) for id in ids] for feature, ids in found.ids.items()}
    parts: list[Html | None] = [_numbers(found)]
    for feature in found.attributions["occlusion"]:
        if feature != IMAGE:
            parts.append(_text(found, feature, names[feature]))
        elif picture is not None:
            parts.append(_image(found, picture))
    parts += [_matrix(found, feature, names) for feature in found.parts]
    parts.append(_attention(found, names, picture, prefix))
    parts.append(_lens(found, names, namer))
    parts.append(_norms(found, names, prefix))
    return join(parts)


def _numbers(found: Explanation) -> Html:
    total = sum(float(value.sum()) for value in found.attributions["integrated_gradients"].values())
    difference = found.output - found.baseline
    hidden = " and ".join(dict.fromkeys(BLANK[name == IMAGE] for name in found.attributions["occlusion"]))
    lines = [
        f"It is {number(found.output)}; with {hidden} it is {number(found.baseline)}: "
        f"a difference of {number(difference, True)}. Integrated gradients, at {found.points} points, sum to "
        f"{number(total, True)}"
    ]
    off = abs(total - difference)
    exact = off <= 0.01 * abs(difference) + 1e-6
    lines.append("." if exact else f", which misses it by {number(off)}: read with care.")
    return tag("p", "".join(lines))


def _title(feature: str, found: Explanation) -> str:
    several = sum(name != IMAGE for name in found.ids) > 1
    side = "what is written" if feature.startswith("decoder") else "what is read"
    return f"The text: {side}" if several else "The text"


def _text(found: Explanation, feature: str, names: Sequence[str]) -> Html:
    values = {method: found.attributions[method][feature] for method in METHODS}
    kept = "Special tokens are never hidden: theirs is 0 of integrated gradients and of occlusion."
    shown: list[Any] = [tag("h4", _title(feature, found)), tag("p", kept, class_="quiet")]
    for method, title in METHODS.items():
        shown += [tag("p", tag("strong", title), ". ", READING[method], class_="quiet"), tokens(names, values[method])]
    rows = [[f"{i}: {name}", *(number(float(values[m][i]), True) for m in METHODS)] for i, name in enumerate(names)]
    listed = table("Attributions of every token", ["token", *METHODS.values()], rows)
    return join([*shown, details("The same as a table", listed)])


def _image(found: Explanation, picture: np.ndarray) -> Html:
    height, width = picture.shape[:2]
    side = found.square
    places = windows((height, width), side)
    seen = "The picture as the model sees it" + (", with the box of the query" if found.question.box else "")
    figures = [figure(heat.boxed(picture, found.question.box), seen, seen)]
    rows = []
    for method, title in METHODS.items():
        values_HxW = found.attributions[method][IMAGE][:height, :width]
        take = np.mean if method == "occlusion" else np.sum
        sums = np.array([take(values_HxW[place]) for place in places])
        map_HxW = np.zeros((height, width))
        for place, value in zip(places, sums):
            map_HxW[place] = value
        best = np.argsort(-np.abs(sums), kind="stable")[:SHOWN]
        columns = -(-width // side)
        named = [f"row {i // columns + 1}, column {i % columns + 1}: {number(float(sums[i]), True)}" for i in best]
        figures.append(
            figure(
                heat.boxed(heat.over(picture, map_HxW), found.question.box),
                f"{title} over the picture; strongest at {named[0]}",
                join([tag("strong", title), f". {READING[method]} Strongest: {named[0]}."]),
            )
        )
        rows.append([title, *named])
    grid = f"{-(-height // side)} x {-(-width // side)} squares of {side} pixels, counted from the top left"
    listed = table(f"The strongest of {grid}", ["method", *(f"{i + 1}." for i in range(len(best)))], rows)
    return join([tag("h4", "The image"), tag("div", *figures, class_="grid"), listed])


def _matrix(found: Explanation, feature: str, names: Mapping[str, Sequence[str]]) -> Html:
    """Return gradient x input of every part of the number, such as every token that is written."""
    values_PxT = found.parts[feature]
    largest = np.abs(values_PxT).max() or 1.0
    what = "read" if not feature.startswith("decoder") else "written before it"
    head = ["part", *names[feature], "value"]
    rows = [
        [f"{i}: {part}", *(number(float(v), True) for v in values_T), number(float(found.outputs[i]))]
        for i, (part, values_T) in enumerate(zip(found.question.parts, values_PxT))
    ]
    shades = [[*(float(v) / largest for v in values_T), 0.0] for values_T in values_PxT]
    caption = f"Gradient x input of each part of the number (rows) by each token that is {what} (columns)"
    return join([tag("h4", f"Part by part: tokens that are {what}"), table(caption, head, rows, shades)])


def _attention(found: Explanation, names: Mapping[str, Sequence[str]], picture: np.ndarray | None, prefix: int) -> Html:
    heading = tag("h4", "Attention")
    if not found.attention:
        return join([heading, tag("p", "This model has no attention, so that there are no weights to show.")])
    shown = [heading]
    for path, row in found.rollout.items():
        columns = sides(found.question, path)[1]
        title = tag("p", tag("strong", f"Attention rollout: {_called(path)}"), ". ", ROLLOUT, class_="quiet")
        if columns == IMAGE and picture is not None:
            shown.append(
                join([title, tag("div", _places(row, "Attention rollout", picture, prefix, found), class_="grid")])
            )
        elif columns in names:
            shown.append(join([title, tokens(names[columns], row, signed=False)]))
    for path, weights in found.attention.items():
        rows, columns = sides(found.question, path)
        if columns == IMAGE:
            if picture is not None:
                shown.append(_places_by_head(path, weights, found, picture, prefix))
            continue
        queries = [f"query {i}" for i in range(weights.shape[-1])]
        shown.append(_pairs(path, weights, names.get(rows, queries), names.get(columns, queries)))
    return join(shown)


ROLLOUT = "Of what the result is made, if heads count alike and residual connections as much as attention."


def _called(path: str) -> str:
    """Return the path of a stack in words: "decoder cross attention"."""
    parts = [part for part in path.split("/") if part != "layers"]
    return " ".join(parts).replace("_", " ")


def _pairs(path: str, weights_LxHxTxS: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> Html:
    """Return the maps of all heads, a layer's side by side; opened at the last layer."""
    layers = []
    for layer, weights_HxTxS in enumerate(weights_LxHxTxS):
        figures = []
        for head, weights_TxS in enumerate(weights_HxTxS):
            t, s = np.unravel_index(np.argmax(weights_TxS), weights_TxS.shape)
            strongest = f"{rows[int(t)]} → {columns[int(s)]} {number(float(weights_TxS[t, s]))}"
            name = f"Layer {layer + 1}, head {head + 1}"
            figures.append(figure(heat.scaled(weights_TxS), f"{name}: strongest {strongest}", f"{name}: {strongest}"))
        layers.append(
            details(f"Layer {layer + 1} of {len(weights_LxHxTxS)}", tag("div", *figures, class_="grid"), open=False)
        )
    about = "Each row of a map is a token that attends, each column one that is attended to; darker is more."
    return details(f"Weights of {_called(path)}, by layer and head", tag("p", about, class_="quiet"), *layers)


def _places_by_head(path: str, weights_LxHxS: np.ndarray, found: Explanation, picture: np.ndarray, prefix: int) -> Html:
    rows, _ = sides(found.question, path)
    prefix = prefix if rows == IMAGE else 0
    layers = []
    for layer, weights_HxS in enumerate(weights_LxHxS):
        figures = [_places(weights_HxS.mean(axis=0), f"Layer {layer + 1}, mean of heads", picture, prefix, found)]
        figures += [
            _places(weights_S, f"Layer {layer + 1}, head {head + 1}", picture, prefix, found)
            for head, weights_S in enumerate(weights_HxS)
        ]
        layers.append(details(f"Layer {layer + 1} of {len(weights_LxHxS)}", tag("div", *figures, class_="grid")))
    who = f"query {found.question.position}" if rows == QUERIES else "the token that the result is read from"
    if found.question.position is None or (path.startswith("encoder") and found.question.box):
        who = "all places, on average"
    about = f"What {who} attends to; brighter is more."
    last = len(weights_LxHxS)
    above = tag(
        "div",
        _places(weights_LxHxS[-1].mean(axis=0), f"Layer {last}, mean of heads", picture, prefix, found),
        class_="grid",
    )
    title = f"Weights of {_called(path)}, by layer and head"
    if rows == QUERIES:
        return join(
            [tag("p", tag("strong", _called(path)), f". {about}", class_="quiet"), above, details(title, *layers)]
        )
    return details(title, tag("p", about, class_="quiet"), *layers)


def _places(weights_S: np.ndarray, name: str, picture: np.ndarray, prefix: int, found: Explanation) -> Html:
    """Return weights over an image's places as a map over the picture."""
    height, width = found.attributions["occlusion"][IMAGE].shape  # with padding
    shape = (height, width)
    grid_hxw = heat.grid(weights_S[prefix:], shape)
    if grid_hxw is None:
        return tag("p", f"{name}: {len(weights_S)} places, which are no grid of the image.")
    drawn = heat.lit(picture, heat.spread(grid_hxw, shape)[: picture.shape[0], : picture.shape[1]])
    rows, columns = (-(-grid_hxw.shape[i] * picture.shape[i] // shape[i]) for i in range(2))  # without padding
    seen_hxw = grid_hxw[:rows, :columns]
    row, column = np.unravel_index(np.argmax(seen_hxw), seen_hxw.shape)
    strongest = f"{number(float(seen_hxw.max()))} at row {row + 1}, column {column + 1} of {rows} x {columns}"
    return figure(heat.boxed(drawn, found.question.box), f"{name}: strongest {strongest}", f"{name}: {strongest}")


def _lens(found: Explanation, names: Mapping[str, Sequence[str]], namer: Namer) -> Html | None:
    if found.lens_ids is None or found.lens_log is None or found.question.vocabulary is None:
        return None
    feature = sides(found.question, found.question.vocabulary + "/attention")[0]
    layers, length, best = found.lens_ids.shape
    probabilities = np.exp(found.lens_log)
    first = found.lens_ids[..., 0], probabilities[..., 0]
    rows = [[_layer(i), *(_read(namer, *pair) for pair in zip(first[0][i], first[1][i]))] for i in range(layers)]
    caption = "The likeliest token that the output layer would read after each layer, with its probability"
    every = table(caption, ["after", *names[feature]], rows, probabilities[:, :, 0].tolist())
    position = length - 1 if found.question.position is None else found.question.position
    ids, shares = found.lens_ids[:, position], probabilities[:, position]
    cells = [[_layer(i), *(_read(namer, *pair) for pair in zip(ids[i], shares[i]))] for i in range(layers)]
    title = f"The five likeliest at '{names[feature][int(position)]}', token {position}"
    here = table(title, ["after", *(f"{k + 1}." for k in range(best))], cells, shares.tolist())
    return join([tag("h4", "Logit lens"), here, details("At every token", every)])


def _read(namer: Namer, id: int, probability: float) -> str:
    return f"{namer(int(id))}\n{probability:.3f}"


def _layer(number_: int) -> str:
    return "embedding" if number_ == 0 else f"layer {number_}"


def _norms(found: Explanation, names: Mapping[str, Sequence[str]], prefix: int) -> Html | None:
    """Return the lengths of the residual stream's vectors: of every token of a text, in summary of places."""
    tables = []
    for path, norms_LxT in found.norms.items():
        feature = sides(found.question, path + "/attention")[0]
        title = f"Residual stream of {_called(path) or 'the decoder'}"
        summary = [
            [_layer(i), *(number(float(f(row))) for f in (np.mean, np.min, np.max))] for i, row in enumerate(norms_LxT)
        ]
        tables.append(table(f"{title}: norms over all tokens", ["after", "mean", "least", "largest"], summary))
        if feature in names:
            rows = [[_layer(i), *(number(float(v)) for v in row)] for i, row in enumerate(norms_LxT)]
            shades = (norms_LxT / (norms_LxT.max() or 1.0)).tolist()
            each = table(f"{title}: the norm at every token", ["after", *names[feature]], rows, shades)
            tables.append(details(f"{title}, at every token", each))
    return join([tag("h4", "Norms of the residual stream"), *tables]) if tables else None
