"""Placement: nothing overlaps, layers go upward, edges run beside nodes, widths follow effects, one place a node."""

import itertools
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from circuits_drawn import build
from hypothesis import given, settings
from hypothesis import strategies as st

from mechsafety.circuits.circuit import CircuitEdge, CircuitNode, Edge, Node, RefusalCircuit, RoleEvidence, Search
from mechsafety.errors import MechsafetyError
from mechsafety.viz.comparison import compare_layouts
from mechsafety.viz.layout import layout_circuit, layout_circuits
from mechsafety.viz.legend import edge_key, edge_rows, node_rows, swatch
from mechsafety.viz.look import ROLE_COLOURS
from mechsafety.viz.marks import (
    DASHES,
    LINK,
    LINK_DASHES,
    PORTS,
    ROLE_OUTLINES,
    Layout,
    luminance,
)
from mechsafety.viz.placement import crossings, place
from mechsafety.viz.style import Positions, Style

Box = tuple[float, float, float, float]


def node_box(mark) -> Box:
    return mark.x - mark.width / 2, mark.y - mark.height / 2, mark.x + mark.width / 2, mark.y + mark.height / 2


def overlaps(first: list[Box], second: list[Box] | None = None) -> list[tuple[int, int]]:
    """Pairs of boxes that share more than a hair."""
    a, b = np.array(first).reshape(-1, 4), np.array(first if second is None else second).reshape(-1, 4)
    wide = np.minimum(a[:, None, 2], b[:, 2]) - np.maximum(a[:, None, 0], b[:, 0]) > 0.05
    tall = np.minimum(a[:, None, 3], b[:, 3]) - np.maximum(a[:, None, 1], b[:, 1]) > 0.05
    hit = wide & tall
    return [tuple(map(int, pair)) for pair in np.argwhere(np.triu(hit, 1) if second is None else hit)]


def assert_nothing_overlaps(layout: Layout) -> None:
    nodes = [node_box(mark) for mark in layout.nodes]
    assert overlaps(nodes) == []
    texts = [label.box for label in layout.labels]
    inner = [label.box for mark in layout.nodes for label in mark.labels]
    assert overlaps([*texts, *inner]) == []
    assert overlaps(texts, nodes) == []
    for mark in layout.nodes:
        left, _, right, _ = node_box(mark)
        assert all(left <= label.box[0] and label.box[2] <= right for label in mark.labels), mark.key
    for left, top, right, bottom in [*texts, *nodes]:
        assert left >= 0 and top >= 0 and right <= layout.width + 0.05 and bottom <= layout.height + 0.05


def samples(mark) -> np.ndarray:
    """Points along an edge's curve [point, 2]."""
    points, at = [], np.zeros(2)
    for letter, values in mark.shapes[0].commands:
        ends = np.array(values).reshape(-1, 2)
        t = np.linspace(0, 1, 40)[:, None]
        if letter == "L":
            points.append(at + t * (ends[-1] - at))
        elif letter == "C":
            a, b, c = ends
            points.append((1 - t) ** 3 * at + 3 * (1 - t) ** 2 * t * a + 3 * (1 - t) * t**2 * b + t**3 * c)
        at = ends[-1]
    return np.concatenate(points)


def assert_edges_run_beside_nodes(layout: Layout) -> None:
    left, top, right, bottom = np.array([node_box(mark) for mark in layout.nodes]).T
    for mark in layout.edges:
        x, y = samples(mark)[:, :, None].swapaxes(0, 1)
        inside = (x > left + 0.1) & (x < right - 0.1) & (y > top + 0.1) & (y < bottom - 0.1)
        # a node's outline is a little smaller than its box, so its own edges may begin at the rim
        crossed = {layout.nodes[k].key for k in np.flatnonzero(inside.any(0))}
        assert crossed <= {mark.sender, mark.receiver}, (mark.title, crossed)


@given(
    count=st.integers(5, 500),
    seed=st.integers(0, 10**6),
    columns=st.sampled_from(["role", "part", "position"]),
    n_heads=st.sampled_from([4, 12, 32]),
    max_edges=st.sampled_from([60, None]),
    fold=st.sampled_from([(), ("detection",), ("evaluation", "production")]),
)
@settings(max_examples=5)
def test_nothing_ever_overlaps(
    count: int, seed: int, columns: str, n_heads: int, max_edges: int | None, fold: tuple[str, ...]
) -> None:
    rng = random.Random(seed)
    n_layers = rng.choice([2, 12, 40])
    every = [Node("head", layer, head) for layer in range(n_layers) for head in range(n_heads)]
    every += [Node("mlp", layer) for layer in range(n_layers)]
    every += [Node("neuron", rng.randrange(n_layers), index) for index in rng.sample(range(14336), count)]
    circuit = build(rng.sample(every, count), min(count, 150), n_layers=n_layers, n_heads=n_heads, seed=seed)
    layout = layout_circuit(circuit, Style(columns=columns, max_edges=max_edges, fold=fold))
    folded = [n for n in (len(circuit.by_role(role)) for role in fold) if n > 1]
    assert len(layout.nodes) == count + 2 - sum(folded) + len(folded)
    assert_nothing_overlaps(layout)
    assert_edges_run_beside_nodes(layout)


@pytest.mark.parametrize("style", [Style(), Style(columns="part"), Style(columns="position")], ids=str)
def test_fixture_circuits_overlap_nowhere(circuit: RefusalCircuit, style: Style) -> None:
    layout = layout_circuit(circuit, style)
    drawn = {mark.key for mark in layout.nodes}
    assert drawn == {str(member.node) for member in circuit.nodes} | {"embed", "logits"}
    assert_nothing_overlaps(layout)
    assert_edges_run_beside_nodes(layout)


def test_the_overlap_check_can_fail(small: RefusalCircuit) -> None:
    layout = layout_circuit(small)
    first, second = layout.nodes[1:3]
    moved = replace(first, x=second.x, y=second.y)
    with pytest.raises(AssertionError):
        assert_nothing_overlaps(replace(layout, nodes=(moved, *layout.nodes[2:])))
    with pytest.raises(AssertionError):
        assert_edges_run_beside_nodes(replace(layout, nodes=tuple(replace(m, width=400.0) for m in layout.nodes)))


def test_layers_ascend_upward_and_edges_with_them(circuit: RefusalCircuit) -> None:
    layout = layout_circuit(circuit, Style(max_edges=None))
    heights: dict[int, set[float]] = {}
    for mark in layout.nodes:
        layer = {"embed": -1, "logits": 10_000}.get(mark.kind, mark.member.node.layer if mark.member else None)
        heights.setdefault(layer, set()).add(mark.y)
    for below, above in itertools.pairwise(sorted(heights)):
        assert max(heights[above]) < min(heights[below])
    y = {mark.key: mark.y for mark in layout.nodes}
    assert all(y[mark.receiver] < y[mark.sender] for mark in layout.edges)


def lanes(layout: Layout, key) -> dict[str, tuple[float, float]]:
    """Leftmost and rightmost centre of the nodes of each key."""
    found: dict[str, list[float]] = {}
    for mark in layout.nodes:
        if mark.member is not None:
            found.setdefault(key(mark.member), []).append(mark.x)
    return {name: (min(xs), max(xs)) for name, xs in found.items()}


def in_order(ranges: dict[str, tuple[float, float]], names: list[str]) -> bool:
    present = [ranges[name] for name in names if name in ranges]
    return all(a[1] < b[0] for a, b in itertools.pairwise(present))


def test_roles_have_lanes(large: RefusalCircuit) -> None:
    ranges = lanes(layout_circuit(large), lambda member: member.role)
    assert len(ranges) == 6
    assert in_order(ranges, ["none", "detection", "relay", "evaluation", "decision", "production"])


def test_parts_have_lanes(neurons: RefusalCircuit) -> None:
    ranges = lanes(layout_circuit(neurons, Style(columns="part")), lambda member: member.node.kind)
    assert len(ranges) == 3 and in_order(ranges, ["head", "mlp", "neuron"])


def test_positions_have_lanes_named_by_tokens(small: RefusalCircuit) -> None:
    nodes = [member.node for member in small.nodes]
    positions = Positions((" pick", " a", " lock"), {node: place % 3 for place, node in enumerate(nodes[:-1])})
    layout = layout_circuit(small, Style(columns="position", positions=positions))
    ranges = lanes(layout, lambda member: str(positions.of.get(member.node, 9)))
    assert len(ranges) == 4 and in_order(ranges, ["0", "1", "2", "9"])
    titles = [label.text for label in layout.labels]
    assert [title for title in titles if title in ("pick", "a", "lock", "position not measured")] == [
        "pick", "a", "lock", "position not measured",
    ]  # fmt: skip
    with pytest.raises(MechsafetyError, match=r"positions \[3\]; expected 0 to 2, one per label"):
        Positions(("a", "b", "c"), {nodes[0]: 3})


def test_without_positions_the_spans_of_the_evidence_are_lanes(small: RefusalCircuit) -> None:
    early = RoleEvidence(at_instruction=0.5, at_suffix=0.1)
    late = RoleEvidence(at_instruction=0.0, at_suffix=-0.3)
    evidence = [early, late, RoleEvidence()] * 4
    circuit = replace(
        small, nodes=tuple(replace(member, evidence=found) for member, found in zip(small.nodes, evidence, strict=True))
    )
    ranges = lanes(layout_circuit(circuit, Style(columns="position")), lambda member: str(member.evidence))
    assert in_order(ranges, [str(early), str(late), str(RoleEvidence())])


def test_placement_crosses_fewer_edges_than_the_order_of_indices() -> None:
    before, after = 0, 0
    for seed in range(5):
        rng = random.Random(seed)
        every = [Node("head", layer, head) for layer in range(8) for head in range(8)]
        nodes = rng.sample(every, 40)
        circuit = build(nodes, 50, n_layers=8, n_heads=8, seed=seed)
        lane = dict.fromkeys(nodes, "all")
        ordered = {}
        for layer in range(8):
            row = sorted((node for node in nodes if node.layer == layer), key=lambda node: node.order)
            ordered |= {node: (layer, column) for column, node in enumerate(row)}
        before += crossings(ordered, circuit.edges)
        after += crossings(place(lane, [("all", "")], circuit.edges, 20).cell, circuit.edges)
    assert after < 0.31 * before


def test_crossings_of_known_pictures() -> None:
    a, b, c, d = (Node("head", layer, head) for layer in (0, 1) for head in (0, 1))
    cell = {a: (0, 0), b: (0, 1), c: (1, 0), d: (1, 1)}
    parallel = [CircuitEdge(Edge(a, c, "q"), 1.0), CircuitEdge(Edge(b, d, "q"), 1.0)]
    crossed = [CircuitEdge(Edge(a, d, "q"), 1.0), CircuitEdge(Edge(b, c, "q"), 1.0)]
    shared = [CircuitEdge(Edge(a, d, "q"), 1.0), CircuitEdge(Edge(b, d, "q"), 1.0)]
    assert [crossings(cell, edges) for edges in (parallel, crossed, shared)] == [0, 1, 0]


def test_slots_differ_in_port_dashes_and_mark() -> None:
    sender, receiver = Node("mlp", 0), Node("head", 3, 1)
    circuit = build([sender, receiver], 0)
    edges = tuple(CircuitEdge(Edge(sender, receiver, slot), 0.5, "measured") for slot in "qkv")
    marks = layout_circuit(replace(circuit, edges=edges)).edges
    ports = {mark.slot: mark.shapes[0].commands[0][1][0] for mark in marks}
    assert ports["q"] < ports["k"] < ports["v"]
    assert len({mark.shapes[0].dashes for mark in marks}) == 3
    tips = {mark.slot: mark.shapes[1].commands for mark in marks}
    assert "C" in {letter for letter, _ in tips["q"]} and tips["k"][0][1][1] == tips["k"][1][1][1]  # circle, square
    assert tips["v"][1][1][1] == tips["v"][3][1][1]  # diamond
    assert len({DASHES[slot] for slot in "qkv"}) == len({PORTS[slot] for slot in "qkv"}) == 3


def test_edges_into_one_slot_share_a_trunk(large: RefusalCircuit) -> None:
    receiver = Node("head", 20, 4)
    senders = [Node("head", layer, 4) for layer in (1, 4, 8)]
    blocker = [Node("head", layer, 4) for layer in range(9, 20)]
    circuit = build([receiver, *senders, *blocker], 0)
    edges = tuple(CircuitEdge(Edge(sender, receiver, "v"), 0.5, "measured") for sender in senders)
    marks = layout_circuit(replace(circuit, edges=edges)).edges
    assert len({mark.shapes[0].commands[0] for mark in marks}) == 1
    shared = [set(map(tuple, np.round(samples(mark), 3))) for mark in marks]
    assert len(set.intersection(*shared)) > 10


def test_edge_widths_follow_effects(circuit: RefusalCircuit) -> None:
    marks = layout_circuit(circuit, Style(max_edges=None)).edges
    assert len(marks) == len(circuit.edges)
    for status in ("measured", "estimated"):
        widths = [mark.shapes[0].width for mark in sorted(marks, key=lambda m: abs(m.effect)) if mark.status == status]
        assert widths == sorted(widths) and widths[-1] > 1.5 * widths[0]


def test_estimated_measured_rejected_and_negative_edges_differ(small: RefusalCircuit) -> None:
    edge = replace(small.edges[0], effect=0.2)
    kinds = {}
    for status, effect in (("measured", 0.2), ("estimated", 0.2), ("rejected", 0.2), ("measured", -0.2)):
        circuit = replace(small, edges=(replace(edge, status=status, effect=effect),))
        kinds[status, effect > 0] = layout_circuit(circuit).edges[0].shapes
    measured, estimated = kinds["measured", True], kinds["estimated", True]
    assert luminance(estimated[0].stroke) > luminance(measured[0].stroke)
    assert estimated[0].width < measured[0].width
    assert (measured[1].fill, estimated[1].fill) == (measured[1].stroke, "#FFFFFF")
    assert len(kinds["measured", False]) == len(measured) + 1  # the bar across
    assert len(kinds["rejected", True]) == 3 and kinds["rejected", True][1].fill is None  # the cross


def test_edges_kept_only_to_connect_have_a_look_of_their_own(small: RefusalCircuit) -> None:
    """A reader takes no line for a path of the circuit that stands there only so that a node is fed."""
    link, other = small.edges[0], small.edges[1]
    linked = replace(small, search=Search(3, 0, linked=(link.edge,)))
    marks = {mark.member.edge: mark for mark in layout_circuit(linked).edges}
    assert marks[link.edge].linking and not marks[other.edge].linking
    assert marks[link.edge].shapes[0].stroke == LINK != marks[other.edge].shapes[0].stroke
    assert len(marks[link.edge].shapes[0].dashes) == len(LINK_DASHES) != len(DASHES["k"])
    assert marks[link.edge].title.endswith("; kept only to connect a node")
    texts = [label.text for label in layout_circuit(linked).labels]
    assert "kept only to connect a node" in texts
    description = layout_circuit(linked).description.replace("\u00a0", " ")
    assert "1 of the circuit's edges kept only to connect a node" in description
    plain = layout_circuit(replace(small, search=None))
    assert not any(mark.linking for mark in plain.edges) and "only to connect" not in plain.description
    assert "kept only to connect a node" not in [label.text for label in plain.labels]


def test_static_pictures_draw_the_strongest_edges_at_the_same_places(large: RefusalCircuit) -> None:
    some, every = layout_circuit(large), layout_circuit(large, Style(max_edges=None))
    assert len(some.edges) < some.n_edges == len(every.edges) == 120
    # the 60 strongest, and the strongest of each node that would else have none
    ranked = sorted(every.edges, key=lambda mark: -abs(mark.effect))
    ends = {key for mark in every.edges for key in (mark.sender, mark.receiver)}
    best = {next(mark.title for mark in ranked if key in (mark.sender, mark.receiver)) for key in ends}
    assert {mark.title for mark in some.edges} == {mark.title for mark in ranked[:60]} | best
    assert len(some.edges) > 60 and layout_circuit(large, Style(max_edges=0)).edges == ()
    assert [(m.key, m.x, m.y) for m in some.nodes] == [(m.key, m.x, m.y) for m in every.nodes]
    paths = {mark.title: mark.shapes for mark in every.edges}
    assert all(paths[mark.title] == mark.shapes for mark in some.edges)
    said = f"{len(some.edges)}\xa0of\xa0120\xa0edges\xa0drawn"
    assert any(said in label.text for label in some.labels)


def test_two_circuits_share_places(small: RefusalCircuit, neurons: RefusalCircuit) -> None:
    half = replace(small, nodes=small.nodes[::2], edges=())
    first, second, third = layout_circuits((half, neurons, small))
    places = {mark.key: (mark.x, mark.y) for mark in third.nodes}
    assert all(places[mark.key] == (mark.x, mark.y) for mark in first.nodes)
    assert {mark.key for mark in first.nodes} == {str(m.node) for m in half.nodes} | {"embed", "logits"}
    assert (first.width, first.map_height) == (second.width, second.map_height) == (third.width, third.map_height)


def test_folding_moves_nothing_and_sums_edges(large: RefusalCircuit) -> None:
    plain, folded = layout_circuit(large), layout_circuit(large, Style(fold=("detection", "decision")))
    places = {mark.key: (mark.x, mark.y) for mark in plain.nodes}
    rest = [mark for mark in folded.nodes if mark.kind != "group"]
    assert all(places[mark.key] == (mark.x, mark.y) for mark in rest)
    hidden = {str(m.node) for m in large.nodes if m.role in ("detection", "decision")}
    assert not hidden & {mark.key for mark in folded.nodes}
    assert {mark.key for mark in folded.nodes if mark.kind == "group"} == {"group:detection", "group:decision"}
    assert overlaps([node_box(mark) for mark in folded.nodes]) == []
    group = {key: "group:" + next(m.role for m in large.nodes if str(m.node) == key) for key in hidden}
    expected: dict[tuple[str, str, str], list[float]] = {}
    for member in large.edges:
        keys = str(member.edge.sender), str(member.edge.receiver)
        ends = group.get(keys[0], keys[0]), group.get(keys[1], keys[1])
        if ends[0] != ends[1]:
            expected.setdefault((*ends, member.edge.slot), []).append(member.effect)
    every = layout_circuit(large, Style(fold=("detection", "decision"), max_edges=None))
    drawn = {(mark.sender, mark.receiver, mark.slot): mark.effect for mark in every.edges}
    assert drawn == pytest.approx({key: sum(values) for key, values in expected.items()})
    assert {m.n_edges for m in every.edges} == {len(values) for values in expected.values()}
    # what is left out is left out after summing
    shown = {(mark.sender, mark.receiver, mark.slot): mark for mark in folded.edges}
    assert 60 <= len(shown) < len(drawn) and all(drawn[key] == mark.effect for key, mark in shown.items())
    weakest = sorted(map(abs, drawn.values()))[-60]
    assert {key for key, value in drawn.items() if abs(value) >= weakest} <= shown.keys()
    single = next(mark for mark in every.edges if mark.n_edges == 1 and "group:" in mark.sender + mark.receiver)
    assert "1 edge, effect" in single.title and "1 edges" not in single.title
    total = sum(mark.n_edges for mark in folded.edges)
    assert any(f"{total}\xa0of\xa0120\xa0edges" in label.text for label in folded.labels)


@pytest.mark.parametrize("columns", ["role", "part"])
def test_folded_edges_run_beside_nodes(large: RefusalCircuit, neurons: RefusalCircuit, columns: str) -> None:
    downward = 0
    for circuit in (large, neurons):
        roles = [role for role in ("detection", "evaluation", "decision", "production") if circuit.by_role(role)]
        for fold in [*((role,) for role in roles), tuple(roles)]:
            layout = layout_circuit(circuit, Style(columns=columns, fold=fold, max_edges=None))
            assert_edges_run_beside_nodes(layout)
            y = {mark.key: mark.y for mark in layout.nodes}
            downward += sum(y[mark.receiver] > y[mark.sender] for mark in layout.edges)
            for mark in layout.edges:
                assert mark.shapes[0].commands[0][1][1] == pytest.approx(
                    y[mark.receiver] + next(n.height for n in layout.nodes if n.key == mark.receiver) / 2
                )
    assert downward > 0  # a group's members stand above and below it


def test_what_else_is_folded_moves_no_sum(large: RefusalCircuit) -> None:
    roles = ("detection", "evaluation", "decision", "production")
    found: dict[tuple[str, str, str], set[object]] = {}
    for fold in itertools.chain.from_iterable(itertools.combinations(roles, n) for n in range(1, 5)):
        layout = layout_circuit(large, Style(fold=fold, max_edges=None))
        runs: dict[tuple[float, str], list[tuple[float, float]]] = {}
        for mark in layout.edges:
            if mark.member is None:
                path = mark.shapes[0].commands
                found.setdefault((mark.sender, mark.receiver, mark.slot), set()).add(path)
                ends = [(start[-2:], end) for (_, start), (letter, end) in itertools.pairwise(path) if letter == "L"]
                for start, end in ends:
                    if start[1] == end[1]:
                        runs.setdefault((end[1], f"{mark.receiver} {mark.slot}"), []).append((start[0], end[0]))
        # level runs into different slots lie on each other nowhere
        for (one, first), (other, second) in itertools.combinations(runs, 2):
            if one == other and first != second:
                spans = [(min(map(min, runs[key])), max(map(max, runs[key]))) for key in ((one, first), (one, second))]
                assert spans[0][1] < spans[1][0] or spans[1][1] < spans[0][0]
    assert len(found) > 100 and all(len(paths) == 1 for paths in found.values())


def test_own_groups_are_checked(small: RefusalCircuit) -> None:
    one, two, three = (member.node for member in small.nodes[:3])
    layout = layout_circuit(small, Style(groups={"pair": [one, two]}, fold=("pair",)))
    assert "group:pair" in {mark.key for mark in layout.nodes}
    with pytest.raises(MechsafetyError, match=rf"{two} is in the groups 'a' and 'b'; expected one group"):
        layout_circuit(small, Style(groups={"a": [one, two], "b": [two, three]}))
    with pytest.raises(MechsafetyError, match=r"fold=\['c'\]; expected some of \['a'\]"):
        layout_circuit(small, Style(groups={"a": [one, two]}, fold=("c",)))


@pytest.mark.parametrize("width", [85.0, 120.0, 178.0])
def test_paper_widths_are_kept_at_the_asked_font(small: RefusalCircuit, width: float) -> None:
    layout = layout_circuit(small, Style(width_mm=width, font_pt=7.5))
    assert layout.width == pytest.approx(width * 96 / 25.4)
    assert max(label.size for mark in layout.nodes for label in mark.labels) == pytest.approx(10.0)
    assert_nothing_overlaps(layout)


def test_a_width_that_is_too_small_is_named(large: RefusalCircuit) -> None:
    with pytest.raises(MechsafetyError, match=r"width_mm=30 with 9 pt labels; expected at least \d+ mm for this circ"):
        layout_circuit(large, Style(width_mm=30, font_pt=9))


def test_a_legend_that_is_wider_than_the_figure_is_refused(small: RefusalCircuit) -> None:
    few = small.subset([small.nodes[0].node])
    with pytest.raises(
        MechsafetyError, match=r"^width_mm=30 with 7 pt labels and a legend; expected at least \d+ mm for this legend; "
    ) as caught:
        layout_circuit(few, Style(width_mm=30, font_pt=7))
    enough = float(re.search(r"at least (\d+) mm", str(caught.value)).group(1))
    for style in (Style(width_mm=30, font_pt=7, legend=False), Style(width_mm=enough, font_pt=7)):
        layout = layout_circuit(few, style)
        assert layout.labels and max(label.box[2] for label in layout.labels) <= layout.width + 0.1


def test_legend_and_caption_can_go(small: RefusalCircuit) -> None:
    full, bare = layout_circuit(small), layout_circuit(small, Style(legend=False, caption=False))
    gone = {label.text for label in full.labels} - {label.text for label in bare.labels}
    assert "verified" in gone and any("Held-out faithfulness" in text for text in gone)
    assert bare.height < full.height and bare.map_height == full.map_height


def test_greys_keep_their_luminance(small: RefusalCircuit) -> None:
    colour, grey = layout_circuit(small), layout_circuit(small, Style(grayscale=True))
    for a, b in zip(colour.nodes, grey.nodes, strict=True):
        fill = b.shapes[0].fill
        assert fill[1:3] == fill[3:5] == fill[5:7]
        assert luminance(fill) == pytest.approx(luminance(a.shapes[0].fill), abs=0.01)
    shades = {colour for shape in grey.backdrop for colour in (shape.fill, shape.stroke) if colour}
    assert all(shade[1:3] == shade[3:5] == shade[5:7] for shade in shades)


def test_hollow_means_estimated(circuit: RefusalCircuit) -> None:
    for mark in layout_circuit(circuit).nodes:
        if mark.member is not None:
            assert (mark.shapes[0].fill == "#FFFFFF") == (mark.member.status in ("estimated", "rejected"))


def test_labels_contrast_with_their_fill(circuit: RefusalCircuit) -> None:
    for mark in layout_circuit(circuit).nodes:
        fill = next(shape.fill for shape in reversed(mark.shapes) if shape.fill)
        light, dark = sorted((luminance(fill), luminance(mark.labels[0].colour)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.0, mark.key


def test_roles_differ_in_colour_and_in_outline() -> None:
    assert len(set(ROLE_COLOURS.values())) == len(set(ROLE_OUTLINES.values())) == 6


def test_nodes_that_work_against_refusal_are_underlined(small: RefusalCircuit) -> None:
    first = small.nodes[0]
    for ends, opposes in (((-0.5, -0.3), True), ((-0.5, 0.1), False), (None, False)):
        member = replace(first, effect=-0.4, ci=ends, status="measured")
        layout = layout_circuit(replace(small, nodes=(member, *(replace(m, ci=None) for m in small.nodes[1:]))))
        mark = next(mark for mark in layout.nodes if mark.member == member)
        assert member.opposes is opposes and (len(mark.shapes) == 2) is opposes
        assert ("works against refusal" in mark.title) is opposes
        assert any(label.text == "works against refusal" for label in layout.labels) is opposes
        if opposes:  # in the ink of the name, inside the node
            (_, start), (_, end) = mark.shapes[1].commands
            assert mark.shapes[1].stroke == mark.labels[0].colour and abs(end[0] - start[0]) < mark.width
            assert mark.labels[0].y < start[1] < mark.y + mark.height / 2


def test_missing_layers_are_marked(small: RefusalCircuit) -> None:
    layout = layout_circuit(small)
    rows = [label.text for label in layout.labels]
    assert "L21" in rows and "L13" not in rows
    assert layout.height < 750


def test_edges_to_undrawn_nodes_are_left_out_and_counted(small: RefusalCircuit) -> None:
    stray = CircuitEdge(Edge(Node("head", 0, 0), Node("logits"), "resid"), 1.0)
    layout = layout_circuit(replace(small, edges=(*small.edges, stray)))
    assert (len(layout.edges), layout.n_edges) == (16, 17)


@pytest.mark.parametrize("count", [0, 1])
def test_extreme_sizes(count: int) -> None:
    layout = layout_circuit(build([Node("head", 3, 4)][:count], 0))
    assert len(layout.nodes) == count + 2
    assert_nothing_overlaps(layout)


def test_bad_input_is_named(small: RefusalCircuit) -> None:
    with pytest.raises(MechsafetyError, match=r"lists L4\.H3 twice; expected each node once"):
        layout_circuit(replace(small, nodes=(*small.nodes, CircuitNode(Node("head", 4, 3)))))
    for options, text in (
        ({"max_edges": -1}, "max_edges=-1; expected None or"),
        ({"columns": "rows"}, r"columns='rows'; expected one of \('role', 'part', 'position'\)"),
        ({"width_mm": 5}, "width_mm=5; expected 20 to 2000"),
        ({"font_pt": 90}, "font_pt=90; expected 3 to 40"),
    ):
        with pytest.raises(MechsafetyError, match=text):
            Style(**options)


def runs(mark) -> list[tuple[str, float, float, float]]:
    """Straight level and upright pieces of an edge: which, where, from, to."""
    found, at = [], mark.shapes[0].commands[0][1]
    for letter, values in mark.shapes[0].commands[1:]:
        end = values[-2:]
        if letter == "L" and abs(at[0] - end[0]) < 1e-6:
            found.append(("upright", round(at[0], 3), *sorted((at[1], end[1]))))
        elif letter == "L":
            found.append(("level", round(at[1], 3), *sorted((at[0], end[0]))))
        at = end
    return found


def shared_runs(layout: Layout) -> list[tuple[str, str]]:
    """Pairs of edges into different slots, from different senders, that lie on each other over more than a pixel."""
    pieces = [(mark, run) for mark in layout.edges for run in runs(mark)]
    found = []
    for (a, run), (b, other) in itertools.combinations(pieces, 2):
        if (a.receiver, a.slot) == (b.receiver, b.slot) or a.sender == b.sender:
            continue
        if run[:2] == other[:2] and min(run[3], other[3]) - max(run[2], other[2]) > 1:
            found.append((a.title, b.title))
    return found


def test_edges_of_different_slots_never_lie_on_each_other(small: RefusalCircuit, neurons: RefusalCircuit) -> None:
    rng = random.Random(7)
    every = [Node("head", layer, head) for layer in range(12) for head in range(6)]
    others = [build(rng.sample(every, 40), 40, n_layers=12, n_heads=6, seed=seed) for seed in range(4)]
    for circuit in (small, neurons, *others):
        assert shared_runs(layout_circuit(circuit)) == []


def form(shapes) -> tuple:
    """What a glyph is without its colours: outlines to a tenth of a pixel, dashes, and what is hollow."""
    return tuple(
        (
            tuple((letter, tuple(round(value, 1) for value in values)) for letter, values in shape.commands),
            shape.dashes,
            None if shape.fill is None else "paper" if shape.fill == "#FFFFFF" else "filled",
            # a dark rim is told from one in the fill's own colour
            shape.stroke is not None and luminance(shape.stroke) < 0.02,
        )
        for shape in shapes
    )


def test_no_two_entries_of_the_legend_look_alike(small: RefusalCircuit) -> None:
    """In greys too: each pair differs in more than its colour."""
    first, kinds = small.nodes[0], ("measured", "estimated", "rejected", "verified")
    roles = [replace(first, role=role, status="measured") for role in ROLE_COLOURS]
    nodes = [*roles, *(replace(first, status=status) for status in kinds), replace(first, ci=(-0.5, -0.3))]
    head, mlp = Node("head", 3, 1), Node("mlp", 3)
    ends = [*(Edge(Node("mlp", 0), head, slot) for slot in "qkv"), Edge(Node("mlp", 0), mlp, "mlp")]
    edges = [CircuitEdge(end, -0.5, status) for end in ends for status in kinds[:3]]
    rows = [*node_rows(nodes, Style().look), *edge_rows([edge_key(edge, {ends[0]}) for edge in edges])]
    look = Style().look
    # nodes and edges have statuses of the same name
    glyphs = {(k, text): form(swatch(*of, 0, 0, 1.0, look)) for k, row in enumerate(rows) for *of, text in row[1]}
    entries = {text: glyph for text, glyph in glyphs.items() if glyph}
    assert len(entries) == len(glyphs) - 2 == 6 + 4 + 1 + 4 + 3 + 2
    for (one, glyph), (other, another) in itertools.combinations(entries.items(), 2):
        assert glyph != another, f"{one!r} looks like {other!r}"


@pytest.mark.parametrize("grayscale", [False, True])
def test_no_two_entries_of_a_differences_legend_look_alike(small: RefusalCircuit, grayscale: bool) -> None:
    changed = replace(small, nodes=small.nodes[2:], edges=small.edges[3:])
    layout = compare_layouts(small, changed, ("a", "b"), Style(grayscale=grayscale)).difference
    glyphs = [shape for shape in layout.backdrop if shape.commands[0][1][1] > layout.map_height]
    nodes, lines = [shape for shape in glyphs if shape.fill], [shape for shape in glyphs if not shape.fill]
    assert (len(nodes), len(lines)) == (5, 3)
    for tone in (lambda shape: shape.fill, lambda shape: shape.stroke):
        group = nodes if tone(nodes[0]) != nodes[0].stroke else lines
        for one, other in itertools.combinations(group, 2):
            # lightness as the eye sees it, 0 to 1; colours differ in hue
            apart = abs(luminance(tone(one)) ** (1 / 3) - luminance(tone(other)) ** (1 / 3))
            hues = sum(abs(int(tone(one)[k : k + 2], 16) - int(tone(other)[k : k + 2], 16)) for k in (1, 3, 5))
            assert (apart > 0.05 or one.dashes != other.dashes) if grayscale else hues > 60
