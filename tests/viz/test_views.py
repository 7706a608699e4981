"""Drawing a part of a circuit: what a style chooses, what fits a paper, and what the caption says of the rest."""

from io import BytesIO
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from test_layout import assert_edges_run_beside_nodes, assert_nothing_overlaps

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.errors import MechsafetyError
from mechsafety.viz import Style, circuit_html, compare_layouts, layout_circuit, role_diagram
from mechsafety.viz.style import PIXELS_PER_MM

MAP = RefusalCircuit.load(Path(__file__).parents[2] / "docs" / "gallery" / "demo.json")


def drawn(layout) -> set[str]:
    return {mark.key for mark in layout.nodes if mark.kind != "weak"} - {"embed", "logits"}


def weak(layout) -> dict[str, int]:
    """The number on the mark of each lane's weak nodes."""
    return {mark.key.removeprefix("weak:"): int(mark.labels[0].text) for mark in layout.nodes if mark.kind == "weak"}


def strongest(circuit, count) -> set[str]:
    ranked = sorted(circuit.nodes, key=lambda member: (-abs(member.effect), member.node.order))
    return {str(member.node) for member in ranked[:count]}


@pytest.mark.parametrize("width", [85.0, 178.0])
@pytest.mark.parametrize("more", [{}, {"font_pt": 7, "grayscale": True}, {"columns": "part"}], ids=str)
def test_a_real_map_fits_a_column_and_a_page(width, more):
    """No text is under 6 points, nothing is higher than a page; what is folded has the smallest effects."""
    layout = layout_circuit(MAP, Style(width_mm=width, **more))
    assert layout.width == pytest.approx(width * PIXELS_PER_MM) and layout.height <= 230 * PIXELS_PER_MM + 0.1
    shown = drawn(layout)
    folded = weak(layout)
    assert 10 < len(shown) < len(MAP) and len(shown) + sum(folded.values()) == len(MAP)
    # a node that is alone in its lane among the weak is drawn itself
    certain = strongest(MAP, len(shown) - 6)
    assert certain <= shown and min(folded.values()) > 1
    text = " ".join(label.text for label in layout.labels)
    assert (
        f"{len(shown)} of {len(MAP)} nodes are drawn one by one. The {sum(folded.values())} weakest"
        in layout.description
    )
    assert "Information flows upward" not in layout.description, "a sum may run down"
    assert "of the whole circuit" in layout.description
    assert (
        f"{len(MAP)} of {MAP.n_candidates} candidate nodes" in text
        and f"{MAP.verification.held_out_faithfulness:.2f}" in text
    ), "the whole circuit's numbers"
    sizes = [label.size for mark in layout.nodes for label in mark.labels]
    assert min([*sizes, *(label.size for label in layout.labels)]) * 72 / 96 >= 6 - 1e-6
    assert_nothing_overlaps(layout)
    assert_edges_run_beside_nodes(layout)


def test_what_has_no_room_is_counted_by_role_and_its_edges_are_summed():
    layout = layout_circuit(MAP, Style(width_mm=85, max_edges=None))
    shown, counts = drawn(layout), weak(layout)
    role = {str(member.node): member.role for member in MAP.nodes}
    hidden = [member for member in MAP.nodes if str(member.node) not in shown]
    assert counts == {role: n for role in counts for n in [sum(m.role == role for m in hidden)]}
    said = layout.description.split("their edges summed: ")[1].split(".")[0]
    assert {part.split(" ", 1)[1]: int(part.split()[0]) for part in said.split(", ")} == counts
    assert all(f"{counts[mark.key[5:]]} nodes folded" in mark.title for mark in layout.nodes if mark.kind == "weak")

    def end(node) -> str:
        return str(node) if str(node) in shown or node.layer is None else f"weak:{role[str(node)]}"

    sums: dict[tuple[str, str, str], list[float]] = {}
    for member in MAP.edges:
        key = (end(member.edge.sender), end(member.edge.receiver), member.edge.slot)
        if key[0] != key[1]:
            sums.setdefault(key, []).append(member.effect)
    marks = {(mark.sender, mark.receiver, mark.slot): mark for mark in layout.edges}
    assert marks.keys() <= sums.keys()
    for key, mark in marks.items():
        assert mark.effect == pytest.approx(sum(sums[key])) and mark.n_edges == len(sums[key])
    # edges between nodes that are drawn are all there; of the sums, the strongest and one for each node
    plain = {key for key in sums if not any(part.startswith("weak:") for part in key)}
    assert plain <= marks.keys()
    others = sorted((key for key in sums if key not in plain), key=lambda key: -abs(sum(sums[key])))
    assert set(others[:12]) <= marks.keys() and len(marks) < len(sums)
    assert {part for key in sums for part in key[:2]} == {part for key in marks for part in key[:2]}


@pytest.mark.parametrize("columns", ["part", "position"])
def test_weak_nodes_fold_by_lane(columns, large):
    layout = layout_circuit(large, Style(width_mm=178, columns=columns))
    assert len(drawn(layout)) + sum(weak(layout).values()) == len(large)
    assert_nothing_overlaps(layout)
    assert_edges_run_beside_nodes(layout)


def test_a_page_shows_folded_weak_nodes():
    page = circuit_html(MAP, Style(width_mm=85))
    assert page.count('data-kind="weak"') == len(weak(layout_circuit(MAP, Style(width_mm=85, max_edges=None))))


def test_two_circuits_leave_out_what_has_no_room():
    """What both fold would not be the same nodes, so a difference of sums would mean nothing."""
    fewer = MAP.subset([member.node for member in MAP.nodes[5:]])
    both = compare_layouts(MAP, fewer, ("all", "fewer"), Style(width_mm=85))
    assert not weak(both.first) and not weak(both.difference) and "left out: " in both.first.description


def test_a_smaller_height_folds_more():
    heights = [layout_circuit(MAP, Style(width_mm=178, height_mm=height)) for height in (120, 180, 230)]
    counts = [len(drawn(layout)) for layout in heights]
    assert counts == sorted(counts) and counts[0] < counts[2]
    assert all(a.height <= b * PIXELS_PER_MM for a, b in zip(heights, (120.1, 180.1, 230.1), strict=True))
    with pytest.raises(MechsafetyError, match=r"^height_mm=30 with 6 pt labels; expected a greater height"):
        layout_circuit(MAP, Style(width_mm=178, height_mm=30))
    with pytest.raises(MechsafetyError, match=r"^width_mm=25 with 30 pt labels; expected at least \d+ mm"):
        layout_circuit(MAP, Style(width_mm=25, font_pt=30))


def test_a_small_circuit_is_drawn_whole(small):
    layout = layout_circuit(small, Style(width_mm=178))
    assert len(drawn(layout)) == len(small) and "are drawn" not in layout.description


@pytest.mark.parametrize(
    ("style", "kept"),
    [
        (Style(top=20), lambda m: str(m.node) in strongest(MAP, 20)),
        (Style(min_effect=0.1), lambda m: abs(m.effect) >= 0.1),
        (Style(roles=("decision", "production")), lambda m: m.role in ("decision", "production")),
        (Style(layers=range(14, 18)), lambda m: m.node.layer in range(14, 18)),
        (Style(nodes=["14.2", "M26"]), lambda m: str(m.node) in ("L14.H2", "L26.MLP")),
        (Style(roles=("decision",), layers=(21,)), lambda m: m.role == "decision" and m.node.layer == 21),
    ],
    ids=["top", "min_effect", "roles", "layers", "nodes", "both"],
)
def test_a_view_draws_what_is_chosen_and_keeps_the_numbers(style, kept):
    layout, whole = layout_circuit(MAP, style), layout_circuit(MAP)
    chosen = {str(member.node) for member in MAP.nodes if kept(member)}
    assert drawn(layout) == chosen and 0 < len(chosen) < len(MAP)
    assert {(mark.sender, mark.receiver) for mark in layout.edges} <= {
        (a, b) for a in {*chosen, "embed"} for b in {*chosen, "logits"}
    }
    hidden = len(MAP) - len(chosen)
    said = layout.description.split("(left out: ")[1].split(")")[0]
    assert sum(int(part.split()[0]) for part in said.split(", ")) == hidden
    first, second = (text.split("Held-out faithfulness")[1] for text in (layout.description, whole.description))
    assert first == second, "the verification is the whole circuit's"


def test_other_figures_take_views_too():
    diagram = role_diagram(MAP, Style(roles=("detection", "decision")))
    assert {mark.key for mark in diagram.nodes} == {"detection", "decision", "embed", "logits"}
    n = len(MAP.by_role("detection")) + len(MAP.by_role("decision"))
    assert f"{n} of {len(MAP)} nodes are drawn" in diagram.description
    fewer = MAP.subset([member.node for member in MAP.nodes[:40]])
    both = compare_layouts(MAP, fewer, ("all", "forty"), Style(top=5))
    assert len(drawn(both.first)) == 5 and drawn(both.difference) == drawn(both.first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, "top=0; expected None or at least 1"),
        ({"roles": ("refusal",)}, "roles names the role 'refusal'; expected some of"),
        ({"height_mm": 100}, "height_mm without width_mm; expected both, or a width alone"),
        ({"nodes": ["L0.H0"]}, "L0.H0 is not in this circuit; expected nodes of the circuit"),
        ({"layers": (99,)}, "a view without nodes; expected a wider choice"),
    ],
)
def test_a_view_of_nothing(options, message):
    with pytest.raises(MechsafetyError) as caught:
        layout_circuit(MAP, Style(**options))
    assert str(caught.value).startswith(message)


def test_a_circuit_in_axes_of_ones_own(small):
    """Beside another panel, at its size; texts keep their points, and nothing of pyplot is used."""
    figure = Figure(figsize=(7, 8))
    left, right = figure.subplots(1, 2)
    right.plot([0, 1], [0, 1])
    assert MAP.draw(left) is left and not left.axison
    width, height = left.get_position().width * 7 * 96, left.get_position().height * 8 * 96
    assert left.get_xlim() == pytest.approx((0, width)) and left.get_ylim() == pytest.approx((height, 0))
    texts = {text.get_text(): text for text in left.texts}
    assert "M0" in texts and "14.2" in texts and texts["M0"].get_fontsize() > 4.5
    assert max(text.get_position()[1] for text in left.texts) <= height
    assert any(f"of {len(MAP)} nodes are drawn" in text for text in texts)
    figure.savefig(BytesIO(), format="png")
    alone = small.draw(style=Style(caption=False))
    assert len(alone.patches) > len(small) and len(alone.figure.axes) == 1
    with pytest.raises(MechsafetyError, match=r"^axes of \d+ x \d+ mm; expected at least 20 mm each way$"):
        small.draw(Figure(figsize=(0.5, 5)).subplots())


def test_one_role_and_one_layer_need_no_list(small: RefusalCircuit) -> None:
    role, layer = small.nodes[0].role, small.nodes[0].node.layer
    assert layout_circuit(small, Style(roles=role)) == layout_circuit(small, Style(roles=(role,)))
    assert layout_circuit(small, Style(layers=layer)) == layout_circuit(small, Style(layers=[layer]))


def test_the_legend_names_only_what_is_drawn() -> None:
    """The folded map of a column has no query's edge among those that are drawn."""
    layout = layout_circuit(MAP, Style(width_mm=85, font_pt=7))
    drawn, legend = {mark.slot for mark in layout.edges}, {label.text for label in layout.labels}
    assert "q" in {member.edge.slot for member in MAP.edges}
    for slot, name in (("q", "query"), ("k", "key"), ("v", "value")):
        assert (name in legend) == (slot in drawn)
