"""Cards of nodes, notes, ablations and attention as the page gets them."""

import base64
import json

import numpy as np
import pytest
import torch
from circuits_drawn import HOSTILE
from test_formats import Tags

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.errors import MechsafetyError
from mechsafety.replies import ReplyKinds
from mechsafety.viz import Ablation, Notes, Style, circuit_html, layout_circuit
from mechsafety.viz.marks import grey


def page_data(text: str) -> dict:
    return json.loads(Tags(text).scripts[0])


def test_cards_have_the_numbers(small: RefusalCircuit) -> None:
    member = next(member for member in small.nodes if member.ci)
    card = page_data(circuit_html(small))["nodes"][str(member.node)]
    words = page_data(circuit_html(small))["words"]
    rows = dict(zip(words["rows"], card["rows"], strict=True))
    assert rows["effect, of the gap"].startswith(f"{member.effect:.3f}".replace("-", "\u2212"))
    assert rows["95 % interval"].startswith("[") and rows["role"] in (member.role, "no role")
    assert any("sends straight to the logits" in words["evidence"][place] for place, _ in card["evidence"])
    assert words["status"][rows["status"]].startswith(("measured", "rejected"))


def test_notes_reach_the_card_as_text(small: RefusalCircuit) -> None:
    node = small.nodes[0].node
    notes = Notes((" Sorry", HOSTILE), ("Sure",), {"instruction": 0.31}, (((" kill", "\n"), (0.5, -0.1)),))
    text = circuit_html(small, notes={node: notes})
    card = page_data(text)["nodes"][str(node)]
    assert card["promotes"][0] == "·Sorry" and card["promotes"][1].startswith("</script><img")
    assert card["spans"] == [["instruction", 0.31]] and card["texts"] == [[["·kill", "⏎"], [0.5, -0.1]]]
    assert "promotes" not in page_data(text)["nodes"][str(small.nodes[1].node)]
    with pytest.raises(MechsafetyError, match="1 activations of 2 tokens; expected one per token"):
        Notes(texts=((("a", "b"), (1.0,)),))


def test_ablations_are_optional(small: RefusalCircuit) -> None:
    first, second = (member.node for member in small.nodes[:2])
    before = ReplyKinds(("refuses",) * 4, torch.tensor([0.1] * 4), 5.0)
    after = ReplyKinds(("degenerate",) * 3 + ("answers",), torch.tensor([6.0] * 4), 5.0)
    ablation = Ablation("without the first", (first,), (3.1, -0.4), {second: 0.25}, (before, after))
    assert ablation.refusal_rate == (1.0, 0.0) and Ablation("x", (first,), (3.1, -0.4), {}).refusal_rate is None
    assert page_data(circuit_html(small))["ablations"] == []
    (row,) = page_data(circuit_html(small, ablations=[ablation]))["ablations"]
    assert row["text"] == (
        "metric 3.10 before, \u22120.40 after; "
        "before: refused 100 % (51 % to 100 %), degenerate 0 % (0 % to 49 %), perplexity 1.11; "
        "after: refused 0 % (0 % to 49 %), degenerate 75 % (30 % to 95 %), perplexity 403; "
        "3 of 4 replies that no longer refuse are degenerate: the model babbles rather than complies"
    )
    assert (row["nodes"], row["effects"]) == ([str(first)], {str(second): 0.25})


def test_nodes_get_the_colour_of_what_an_ablation_leaves(small: RefusalCircuit) -> None:
    layout = layout_circuit(small)
    drawn = {mark.key: mark.shapes[0].fill for mark in layout.nodes}
    gone, *others = (member for member in small.nodes if member.status in ("measured", "verified"))
    same = Ablation("same", (gone.node,), (1.0, 0.5), {member.node: member.effect for member in (gone, *others)})
    none = Ablation("none", (gone.node,), (1.0, 0.0), {member.node: 0.0 for member in others})
    rows = page_data(circuit_html(small, ablations=[same, none]))["ablations"]
    assert rows[0]["fills"] == {str(member.node): drawn[str(member.node)] for member in others}
    assert set(rows[1]["fills"].values()) == {"#ffffff"}
    greys = page_data(circuit_html(small, Style(grayscale=True), ablations=[same]))["ablations"][0]["fills"]
    assert greys == {key: grey(fill) for key, fill in rows[0]["fills"].items()}


def test_attention_is_packed_and_comes_back(small: RefusalCircuit) -> None:
    example = small.details.attention[0]
    packed = page_data(circuit_html(small))["attention"][0]
    assert packed["tokens"][4] == "·do" and len(packed["heads"]) == 4
    data = np.frombuffer(base64.b64decode(packed["heads"][str(example.heads[1])]), dtype=np.uint8) / 255
    assert np.abs(data.reshape(12, 12) - np.asarray(example.patterns)[1]).max() <= 0.5 / 255 + 1e-9
