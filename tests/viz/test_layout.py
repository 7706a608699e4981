"""Placement: nothing overlaps, layers go upward, widths follow effects."""

import itertools
from dataclasses import replace

import pytest
from conftest import build

from mechsafety.circuits.circuit import CircuitEdge, CircuitNode, Edge, Node, RefusalCircuit
from mechsafety.errors import MechsafetyError
from mechsafety.viz.layout import COMPACT_ABOVE, STATIC_EDGES, layout_circuit
from mechsafety.viz.marks import ROLE_COLOURS, ROLE_OUTLINES, luminance, text_width


def overlap(a, b) -> bool:
    return abs(a.x - b.x) < (a.width + b.width) / 2 and abs(a.y - b.y) < (a.height + b.height) / 2


def test_nodes_do_not_overlap_and_stay_inside(circuit: RefusalCircuit) -> None:
    layout = layout_circuit(circuit)
    assert {mark.node for mark in layout.nodes} == {m.node for m in circuit.nodes} | {Node("embed"), Node("logits")}
    assert not [(str(a.node), str(b.node)) for a, b in itertools.combinations(layout.nodes, 2) if overlap(a, b)]
    for mark in layout.nodes:
        assert 0 <= mark.x - mark.width / 2 <= mark.x + mark.width / 2 <= layout.width
        assert 0 <= mark.y - mark.height / 2 <= mark.y + mark.height / 2 <= layout.height


def test_every_text_fits_the_picture(circuit: RefusalCircuit) -> None:
    layout = layout_circuit(circuit)
    for label in layout.labels:
        width = text_width(label.text, label.size)
        right = label.x + {"start": width, "middle": width / 2, "end": 0}[label.anchor]
        assert right <= layout.width, label.text
        assert 0 < label.y <= layout.height, label.text


def test_layers_ascend_upward(circuit: RefusalCircuit) -> None:
    heights: dict[int, set[float]] = {}
    for mark in layout_circuit(circuit).nodes:
        layer = {"embed": -1, "logits": 10_000}.get(mark.node.kind, mark.node.layer)
        heights.setdefault(layer, set()).add(mark.y)
    layers = sorted(heights)
    for below, above in itertools.pairwise(layers):
        assert max(heights[above]) < min(heights[below])


def test_heads_stand_left_of_mlps_and_neurons_beside_their_mlp(neurons: RefusalCircuit) -> None:
    marks = layout_circuit(neurons).nodes
    heads = [mark.x for mark in marks if mark.node.kind == "head"]
    mlps = [mark.x for mark in marks if mark.node.kind == "mlp"]
    badges = [mark for mark in marks if mark.node.kind == "neuron"]
    assert max(heads) < min(mlps) < min(mark.x for mark in badges)
    crowded = {mark.y for mark in badges if mark.node.layer == 7}
    assert len(crowded) == 2  # seven neurons wrap to a second line


def test_edge_widths_follow_effects_and_signs_are_dashed(circuit: RefusalCircuit) -> None:
    marks = layout_circuit(circuit, max_edges=None).edges
    assert len(marks) == len(circuit.edges)
    by_size = sorted(marks, key=lambda mark: abs(mark.member.effect))
    widths = [mark.shape.width for mark in by_size]
    assert widths == sorted(widths) and widths[-1] > 3 * widths[0]
    for mark in marks:
        assert mark.shape.dashed == (mark.member.effect < 0)


def test_estimated_edges_are_lighter_than_measured_ones(small: RefusalCircuit) -> None:
    edge = small.edges[0]
    pair = [replace(small, edges=(replace(edge, status=status),)) for status in ("measured", "estimated")]
    measured, estimated = (layout_circuit(circuit).edges[0].shape for circuit in pair)
    assert luminance(estimated.stroke) > luminance(measured.stroke) and estimated.opacity < measured.opacity


def test_static_pictures_draw_the_strongest_edges(large: RefusalCircuit) -> None:
    layout = layout_circuit(large)
    assert len(layout.edges) == STATIC_EDGES < layout.n_edges == 120
    weakest = min(abs(mark.member.effect) for mark in layout.edges)
    left_out = {member.edge for member in large.edges} - {mark.member.edge for mark in layout.edges}
    assert all(abs(member.effect) <= weakest for member in large.edges if member.edge in left_out)
    assert any("60\xa0of\xa0120\xa0edges\xa0drawn" in label.text for label in layout.labels)


def test_small_circuits_leave_out_empty_layers_and_large_ones_do_not(
    small: RefusalCircuit, large: RefusalCircuit
) -> None:
    rows = [label.text for label in layout_circuit(small).labels]
    assert "L13 to L20: no node of the circuit" in rows and "L13" not in rows
    assert len(large.nodes) > COMPACT_ABOVE
    assert {f"L{layer}" for layer in range(30)} <= {label.text for label in layout_circuit(large).labels}
    assert layout_circuit(small).height < 750


@pytest.mark.parametrize("count", [0, 1, 250])
def test_extreme_sizes(count: int) -> None:
    every = [Node("head", layer, head) for layer in range(30) for head in range(9)]
    circuit = build(every[:count], 0)
    layout = layout_circuit(circuit)
    assert len(layout.nodes) == count + 2
    labelled = [mark for mark in layout.nodes if mark.label is not None]
    assert len(labelled) == count + 2 and min(mark.label.size for mark in labelled) >= 9


def test_wide_models_still_fit() -> None:
    every = [Node("head", layer, head) for layer in range(32) for head in range(32)]
    layout = layout_circuit(build(every[::4], 30, n_layers=32, n_heads=32))
    assert layout.width < 1400
    heads = [mark for mark in layout.nodes if mark.node.kind == "head"]
    assert all(mark.label.text == str(mark.node.index) and mark.label.size >= 8 for mark in heads)
    assert not [1 for a, b in itertools.combinations(layout.nodes, 2) if overlap(a, b)]


def test_hollow_means_estimated(circuit: RefusalCircuit) -> None:
    for mark in layout_circuit(circuit).nodes:
        if mark.member is not None:
            assert (mark.shape.fill == "#FFFFFF") == (mark.member.status in ("estimated", "rejected"))


def test_labels_contrast_with_their_fill(circuit: RefusalCircuit) -> None:
    for mark in layout_circuit(circuit).nodes:
        light, dark = sorted((luminance(mark.shape.fill), luminance(mark.label.colour)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.0, str(mark.node)


def test_roles_differ_in_colour_and_in_outline() -> None:
    assert len(set(ROLE_COLOURS.values())) == len(set(ROLE_OUTLINES.values())) == 5


def test_edges_to_undrawn_nodes_are_left_out_and_counted(small: RefusalCircuit) -> None:
    stray = CircuitEdge(Edge(Node("head", 0, 0), Node("logits"), "resid"), 1.0)
    layout = layout_circuit(replace(small, edges=(*small.edges, stray)))
    assert (len(layout.edges), layout.n_edges) == (16, 17)


def test_bad_input_is_named(small: RefusalCircuit) -> None:
    with pytest.raises(MechsafetyError, match=r"lists L4\.H3 twice; expected each node once"):
        layout_circuit(replace(small, nodes=(*small.nodes, CircuitNode(Node("head", 4, 3)))))
    with pytest.raises(MechsafetyError, match="max_edges=-1; expected None or"):
        layout_circuit(small, max_edges=-1)
