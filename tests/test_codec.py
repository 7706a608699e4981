"""Annotated dataclasses to JSON and back: what comes back, what is refused and where."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechsafety import Edge, MechsafetyError, Node
from mechsafety.codec import INLINE, REQUIRED, SPARSE, Amount, OrNan, PValue, decode, encode, parse
from mechsafety.sites import Site

NODE = Node("head", 1, 0)


@dataclass(frozen=True, slots=True)
class Leaf:
    """What a nested result may hold."""

    number: float
    pair: tuple[int, str]
    ends: tuple[float, float] | None
    choice: Literal["a", "b"]
    place: Node | Site | Edge
    by_node: Mapping[Node, tuple[float, ...]]
    words: str | tuple[int, ...]


numbers = st.floats(width=64) | st.just(-0.0)
whole = st.integers(0, 2**29)
nodes = st.builds(Node, st.just("head"), whole, whole) | st.builds(Node, st.just("mlp"), whole)
edges = nodes.map(lambda node: Edge(node, Node("logits"), "resid"))
places = nodes | edges | st.builds(Site, st.sampled_from(["resid_pre", "mlp_in"]), whole)
leaves = st.builds(
    Leaf,
    numbers,
    st.tuples(whole, st.text()),
    st.none() | st.tuples(numbers, numbers),
    st.sampled_from(["a", "b"]),
    places,
    st.dictionaries(nodes, st.lists(numbers).map(tuple)),
    st.text() | st.lists(whole).map(tuple),
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(min_size=6), inner),
)


@settings(max_examples=40)
@given(st.dictionaries(st.text(), st.lists(leaves).map(tuple)), plain)
def test_what_is_encoded_comes_back(rows, free):
    """Through the text of a file, NaN and infinities too (repr, since NaN is not equal to itself)."""
    for kind, value in ((Mapping[str, tuple[Leaf, ...]], rows), (Any, free)):
        text = json.dumps(encode(kind, value), allow_nan=False)
        assert repr(decode(kind, json.loads(text))) == repr(value)


@pytest.mark.parametrize(
    ("kind", "value", "data"),
    [
        (float, math.inf, {"float": "inf"}),
        (Any, {"budget": [math.nan, 1]}, {"budget": [{"float": "nan"}, 1]}),
        (tuple[Node, ...], (NODE,), [{"kind": "head", "layer": 1, "index": 0}]),
        (Node | Site, NODE, {"type": "Node", "kind": "head", "layer": 1, "index": 0}),
        (Site, Site("q", 2, 1), {"kind": "q", "layer": 2, "index": 1}),
        (
            Edge,
            Edge(NODE, Node("logits"), "resid"),
            {
                "from": {"kind": "head", "layer": 1, "index": 0},
                "to": {"kind": "logits", "layer": None, "index": None},
                "slot": "resid",
            },
        ),
        (Mapping[int, str] | None, {3: "a"}, [[3, "a"]]),
        (OrNan | str, 0.5, 0.5),
        (OrNan | str, "half", "half"),
        (Node | str, "none", "none"),
        (Node | str, NODE, {"kind": "head", "layer": 1, "index": 0}),
    ],
)
def test_how_it_is_written(kind, value, data):
    assert json.loads(json.dumps(encode(kind, value), allow_nan=False)) == data
    assert repr(decode(kind, data)) == repr(value)


def test_an_open_interval_may_end_in_null():
    assert decode(tuple[float, float], [None, 1.0]) == (-math.inf, 1.0)
    assert decode(tuple[float, float], [0.0, None]) == (0.0, math.inf)


@dataclass(frozen=True, slots=True)
class Owner:
    """Each way in which a field may be written."""

    node: Node = field(metadata=INLINE)
    low: float = field(metadata={"name": "held_out.low"})
    high: OrNan = field(metadata={"name": "held_out.high"})
    note: str = field(default="", metadata=SPARSE)
    status: str = field(default="measured", metadata=REQUIRED)
    n: Amount = 0


def test_where_fields_are_written():
    row = encode(Owner, Owner(NODE, 0.0, 0.5))
    assert row == {
        **{"kind": "head", "layer": 1, "index": 0},
        "held_out": {"low": 0.0, "high": 0.5},
        "status": "measured",
        "n": 0,
    }
    del row["n"]
    assert decode(Owner, row) == Owner(NODE, 0.0, 0.5)
    row["held_out"]["high"] = None
    assert math.isnan(decode(Owner, row).high)


FULL = encode(Owner, Owner(NODE, 0.0, 0.5, "x"))


@pytest.mark.parametrize(
    ("kind", "data", "expected"),
    [
        (Owner, FULL | {"held_out": {"low": 0}}, "at.held_out: field 'high' is missing; expected the fields of Owner"),
        (
            Owner,
            FULL | {"held_out": {"mid": 0, **FULL["held_out"]}},
            "at.held_out: unknown field 'mid'; expected the fields of Owner",
        ),
        (Owner, FULL | {"held_out": {"low": "x", "high": 0}}, "at.held_out.low: 'x'; expected a number"),
        (Owner, FULL | {"held_out": 3}, "at.held_out: 3; expected an object"),
        (Owner, {**FULL, "kind": "mlp"}, "at: a node of kind 'mlp' with layer 1 and index 0"),
        (
            Owner,
            {key: FULL[key] for key in FULL if key != "status"},
            "at: field 'status' is missing; expected the fields of Owner",
        ),
        (Owner, FULL | {"n": -1}, "at.n: -1; expected at least 0"),
        (Owner, FULL | {"n": 0.5}, "at.n: 0.5; expected a whole number"),
        (Owner, [], "at: []; expected an object"),
        (PValue, 1.5, "at: 1.5; expected a number from 0 to 1"),
        (float, math.nan, "at: nan; expected a finite number"),
        (float, {"float": "much"}, "at: {'float': 'much'}; expected a number"),
        (float, True, "at: True; expected a number"),
        (bool, 1, "at: 1; expected true or false"),
        (str, None, "at: None; expected text"),
        (tuple[int, str], [1], "at: 1 values; expected 2"),
        (tuple[int, ...], "12", "at: '12'; expected a list"),
        (Mapping[str, int], {"a.b": "x"}, "at.a.b: 'x'; expected a whole number"),
        (Mapping[Node, int], [[FULL, 1]], "at[0][0]: unknown field 'held_out'; expected the fields of Node"),
        (Mapping[Node, int], {"L1.H0": 1}, "at: {'L1.H0': 1}; expected a list"),
        (Literal["a", "b"], ["a"], "at: ['a']; expected one of ('a', 'b')"),
        (Node | Site, {"kind": "q"}, "at.type: None; expected one of ('Node', 'Site')"),
        (torch.Tensor, {"tensor": "b"}, "at: no tensor 'b'; expected it beside the JSON"),
    ],
)
def test_what_is_refused(kind, data, expected):
    with pytest.raises(MechsafetyError) as caught:
        decode(kind, data, "at", {"a": torch.zeros(1)})
    assert str(caught.value) == expected


def test_the_place_of_a_deep_field_is_named():
    """Four levels of classes made here, so that nothing knows them but their annotations."""
    kind: Any = make_dataclass("D", [("number", float)], frozen=True)
    for name in "CBA":
        kind = make_dataclass(name, [("inner", tuple[kind, ...]), ("by", dict[str, kind], field(default_factory=dict))])
    data = {"inner": [{"inner": []}, {"inner": [{"inner": [], "by": {"x": {"number": 1}}}]}]}
    assert encode(kind, decode(kind, data))["inner"][1]["inner"][0]["by"] == {"x": {"number": 1}}
    data["inner"][1]["inner"][0]["by"]["x"]["number"] = "one"
    with pytest.raises(MechsafetyError) as caught:
        decode(kind, data)
    assert str(caught.value) == "inner[1].inner[0].by.x.number: 'one'; expected a number"


def test_values_that_are_not_as_annotated_are_not_written():
    for kind, value, expected in (
        (
            tuple[Node | Site, ...],
            (NODE, Edge(NODE, Node("logits"), "resid")),
            "[1] is a Edge; expected Node or Site, as annotated",
        ),
        (tuple[int, int], (1,), "1 values; expected 2"),
        (tuple[int, ...], (1, 0.5), "[1]: 0.5; expected a whole number"),
        (Literal["a"], "b", "'b'; expected one of ('a',)"),
        (float, None, "None; expected a number"),
        (int, torch.zeros(1), "the value is a Tensor; expected int, as annotated"),
        (Any, {1: 2}, "the value is a dict; expected a number, text, None, or lists and mappings (by text) of them"),
    ):
        with pytest.raises(MechsafetyError) as caught:
            encode(kind, value, "", {})
        assert str(caught.value) == expected


def test_an_array_in_the_place_of_a_tensor_comes_back_as_a_tensor():
    stored: dict[str, torch.Tensor] = {}
    data = encode(tuple[torch.Tensor, ...], (np.eye(2), torch.eye(3)), "at", stored)
    assert data == [{"tensor": "at[0]"}, {"tensor": "at[1]"}] and stored["at[0]"].dtype == torch.float64
    back = decode(tuple[torch.Tensor, ...], data, "at", stored)
    assert all(torch.equal(one, torch.eye(n, dtype=one.dtype)) for n, one in zip((2, 3), back, strict=True))


def test_the_head_of_a_file():
    assert parse('{"format": "mechsafety.x", "version": 2}', "mechsafety.x", 1, 3)["version"] == 2
    for text, expected in (
        ("[", "malformed JSON (Expecting value: line 1 column 2 (char 1)); expected a x.json"),
        ("[]", 'not a x file; expected "format": "mechsafety.x"'),
        (
            '{"format": "mechsafety.x", "version": 4}',
            "x format version 4; expected 1 to 3; pip install --upgrade mechsafety",
        ),
        ('{"format": "mechsafety.x", "version": true}', "x format version True; expected 1 to 3; make the x again"),
    ):
        with pytest.raises(MechsafetyError) as caught:
            parse(text, "mechsafety.x", 1, 3)
        assert str(caught.value) == expected
