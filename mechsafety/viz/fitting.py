"""The size of each text of a picture in its font, whose letters can be wider than the layout assumes."""

from mechsafety.viz.fonts import shares
from mechsafety.viz.marks import ROLE_OUTLINES, Label, Layout, NodeMark, label_room


def fitted_sizes(layout: Layout) -> dict[Label, float]:
    """The size at which each text fits its room.

    Outside the nodes, texts of one size shrink alike, so that a caption's lines match. A node's name shrinks alone.
    """
    outside = [*layout.labels, *(label for mark in layout.edges for label in mark.labels)]
    least: dict[float, float] = {}
    for label, share in zip(outside, _shares(layout, outside, [_width(label) for label in outside]), strict=True):
        least[label.size] = min(least.get(label.size, 1.0), share)
    inside = [(label, _room(mark, label)) for mark in (*layout.nodes, *layout.folded) for label in mark.labels]
    own = _shares(layout, [label for label, _ in inside], [room for _, room in inside])
    sizes = {label: label.size * least[label.size] for label in outside}
    return sizes | {label: label.size * share for (label, _), share in zip(inside, own, strict=True)}


def _shares(layout: Layout, labels: list[Label], rooms: list[float]) -> list[float]:
    return shares(layout.look.font, [(label.text, label.size, label.bold) for label in labels], rooms)


def _width(label: Label) -> float:
    return label.box[2] - label.box[0]


def _room(mark: NodeMark, label: Label) -> float:
    """The largest width of a name in its outline."""
    if mark.member is None:
        return (0.88 if mark.kind == "role" else 0.98) * mark.width
    return 0.98 * label_room(ROLE_OUTLINES[mark.member.role], mark.width, mark.height, label.size)
