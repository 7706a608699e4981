"""Charts, attention, words and the report."""

import base64
import gzip
import io
import math
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from circuits_drawn import HOSTILE, build
from test_formats import SVG, Tags, assert_inert

from mechsafety.circuits.circuit import Backup, CurvePoint, Node, RandomControls, RefusalCircuit, Search
from mechsafety.circuits.verification.outcome import Claim
from mechsafety.errors import MechsafetyError
from mechsafety.results import visible
from mechsafety.viz import (
    attention_html,
    circuit_svg,
    effect_distribution,
    faithfulness_curve,
    figures_page,
    neurons_html,
    node_heatmap,
    render_report,
    tokens_html,
    write_all,
)
from mechsafety.viz.chart_svg import NARROW, WIDE, chart_svg, heat_colours
from mechsafety.viz.flow import ENDS, flow
from mechsafety.viz.marks import text_width
from mechsafety.viz.words import chance, concentration, necessity, number, p_value, percent, plain, verdict


def with_curve(circuit: RefusalCircuit, *points: tuple[int, float], own: float = 0.0) -> RefusalCircuit:
    curve = tuple(CurvePoint(n / circuit.n_candidates, n, value, value) for n, value in points)
    check = replace(circuit.verification, curve=curve, held_out_faithfulness=own, target=0.8, reached=own >= 0.8)
    return replace(circuit, verification=check)


@pytest.mark.parametrize(
    ("points", "word", "phrase"),
    [
        (((10, 0.9), (150, 0.95)), "concentrated", "10 of 300 (3.3 %) are enough for 80 %"),
        (((10, 0.3), (29, 0.8)), "concentrated", "29 of 300"),
        (((10, 0.3), (30, 0.8)), "moderately spread", "30 of 300 (10 %) are enough"),
        (((10, 0.3), (100, 0.8)), "moderately spread", "100 of 300 (33 %)"),
        (((10, 0.03), (101, 0.8)), "spread out", "101 of 300 (34 %) are needed"),
        (((10, 0.03), (150, 0.83)), "spread out", "The 10 best nodes restore 3 % of the gap on held-out pairs"),
        (((10, 0.03), (150, 0.66)), "target not reached", "150 of 300 nodes, restores 66 %"),
    ],
)
def test_verdict_by_numbers(points, word: str, phrase: str, small: RefusalCircuit) -> None:
    circuit = with_curve(small, *points)
    assert concentration(circuit) == word
    assert phrase in verdict(circuit)
    said = {
        "concentrated": "is concentrated",
        "moderately spread": "is moderately spread",
        "spread out": "is spread out",
    }
    for name, text in said.items():
        assert (text in verdict(circuit)) == (name == word)
    assert ("never reached" in verdict(circuit)) == (word == "target not reached")
    assert phrase in Tags(render_report(circuit)).text


def test_verdict_without_a_curve_rests_on_the_circuit(small: RefusalCircuit) -> None:
    assert concentration(with_curve(small, own=0.9)) == "concentrated"
    assert "never reached" in verdict(with_curve(small, own=0.2))


def test_chance_is_not_flattered(small: RefusalCircuit) -> None:
    check = replace(small.verification, random_controls=RandomControls(200, 0.5, 0.99, 0.4))
    assert "not better than chance" in chance(replace(small, verification=check))
    assert "is better than chance" in chance(small)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(0.034, "3.4 %"), (0.8, "80 %"), (0.0999, "10 %"), (-0.05, "\u22125 %"), (0.0, "0 %"), (None, "\u2013")],
)
def test_percent(given: float | None, expected: str) -> None:
    assert percent(given) == expected


def test_small_words() -> None:
    assert (number(-0.00001), number(float("nan")), p_value(None)) == ("0.000", "\u2013", "p not measured")
    assert plain("a\x00\n b") == "a\ufffd b" and len(plain("x" * 200, 60)) <= 60
    assert visible(" a\n\t\x1b") == "·a⏎⇥\ufffd"


def test_heatmap_tells_measured_from_estimated(large: RefusalCircuit) -> None:
    figure = node_heatmap(large)
    heat, members, guesses = figure.data
    assert heat.zmin == -heat.zmax < 0
    by_node = {score.node: score for score in large.details.scores}
    measured = by_node[large.nodes[0].node]
    column = 9 if measured.node.index is None else measured.node.index
    assert heat.z[measured.node.layer][column] == measured.effect
    assert len(members.x) == 200
    assert len(guesses.x) == sum(score.effect is None for score in large.details.scores) > 0
    first = next(score for score in large.details.scores if score.effect is None)
    assert heat.z[first.node.layer][9 if first.node.index is None else first.node.index] == first.estimate


def test_heatmap_of_a_loaded_circuit_has_only_its_nodes(loaded: RefusalCircuit) -> None:
    heat = node_heatmap(loaded).data[0]
    assert sum(value is not None for row in heat.z for value in row) == len(loaded.nodes)


def test_curve_shows_both_splits_target_size_and_controls(large: RefusalCircuit) -> None:
    figure = faithfulness_curve(large)
    held_out, discovery, shown, random = figure.data
    assert list(held_out.y) == [point.held_out for point in large.verification.curve]
    assert list(discovery.y) == [point.faithfulness for point in large.verification.curve]
    assert (shown.x[0], shown.y[0]) == (200, large.verification.held_out_faithfulness)
    assert (random.x[0], random.y[0]) == (200, 0.08)
    assert figure.layout.xaxis.type == "log" and {shape.y0 for shape in figure.layout.shapes} >= {0.8}
    with pytest.raises(MechsafetyError, match="n_candidates=0; expected at least 1"):
        faithfulness_curve(replace(large, n_candidates=0))


def unpacked(page: str) -> list[str]:
    """CircuitsVis' scripts on a page, as a browser unpacks them."""
    packed = re.findall(r'atob\("([\w+/=]+)"\)', page)
    return [gzip.decompress(base64.b64decode(text)).decode() for text in packed]


def test_attention_escapes_tokens_twice_and_brings_its_script_once(hostile: RefusalCircuit) -> None:
    text = attention_html(hostile.details.attention)
    (script,) = unpacked(text)
    assert "var CircuitsVis=" in script and "sourceMappingURL" not in script
    assert len(text) < 600_000
    page = assert_inert(text, scripts=4)
    props = page.scripts[0]
    assert "&lt;img" in props.encode().decode("unicode_escape") and "<" not in props
    assert "im_start" in props and "⏎" in props


def test_attention_names_a_wrong_shape(small: RefusalCircuit) -> None:
    example = small.details.attention[0]
    with pytest.raises(MechsafetyError, match=r"shape \(1, 2, 2\); expected \[head query key\] = \(4, 12, 12\)"):
        attention_html([replace(example, patterns=np.ones((1, 2, 2)))])
    assert "No attention patterns" in attention_html([])


def test_report_is_inert_and_complete(hostile: RefusalCircuit) -> None:
    text = render_report(hostile)
    page = Tags(text)
    assert "img" not in page.tags and not page.handlers
    tables = [address for address in page.addresses if address.startswith("data:text/plain;base64,")]
    anchors = [address for address in page.addresses if address not in tables]
    assert all(address.startswith("#") for address in anchors)
    assert {address[1:] for address in anchors} <= set(re.findall(r'id="([\w-]+)"', text))
    assert page.text.count("</script><img src=x onerror=alert(1)>") >= 4  # model, option, prompt, reply
    assert len(page.frames) == 1
    assert_inert(page.frames[0], scripts=2)
    assert "plotly.js" not in text and len(unpacked(text)) == 1
    assert "default-src 'none'" in text and 'content="light dark"' in text
    assert page.frames[0].count('data-theme="auto"') == 1


def test_report_is_the_same_twice(small: RefusalCircuit) -> None:
    assert render_report(small) == render_report(small)


def test_report_says_what_was_not_measured(small: RefusalCircuit) -> None:
    text = Tags(render_report(small)).text
    assert "Completeness: not measured" in text and "Minimality: not measured" in text
    check = replace(small.verification, completeness=0.05, minimality={"L4.H3": 0.12})
    text = Tags(render_report(replace(small, verification=check))).text
    assert (
        "Completeness: not measured" not in text
        and "Completeness: 0.050" in text
        and "lost without it" in text
        and "0.1200" in text
    )


def test_report_of_a_loaded_circuit_names_what_is_missing(loaded: RefusalCircuit) -> None:
    text = Tags(render_report(loaded)).text
    for words in ("comes without", "no generated replies", "no attention patterns", "scores of candidates outside"):
        assert words in text
    assert "comes without" not in Tags(render_report(build([Node("head", 1, 1)], 0))).text


def test_report_lists_every_node_edge_and_reply(neurons: RefusalCircuit) -> None:
    text = render_report(neurons)
    body = Tags(text).text
    assert all(str(member.node) in body for member in neurons.nodes)
    assert text.count("<tr><td data-sort=") == len(neurons.nodes)
    assert "I'm sorry, I can't help with that." in body and "Look for a dull rind.\nTap it." in body
    assert "88 %" in body and "(77 % to 94 %)" in body


@pytest.mark.parametrize(("kind", "limit"), [("loaded", 1_500_000), ("large", 3_000_000), ("neurons", 3_000_000)])
def test_report_is_light(kind: str, limit: int, request: pytest.FixtureRequest) -> None:
    """With CircuitsVis' figures a report may have twice the bytes."""
    circuit = request.getfixturevalue(kind)
    text = render_report(circuit)
    assert len(text.encode()) < limit and len(unpacked(text)) == (circuit.details is not None)


def test_report_names_the_model_in_full(small: RefusalCircuit) -> None:
    def title(model: str) -> str:
        page = render_report(replace(small, provenance=replace(small.provenance, model=model)))
        return re.search("<h1>(.*)</h1>", page)[1]

    assert title("demo") == "SmolLM2-135M-Instruct with mechsafety&#39;s refusal adapter (demo)"
    assert title("some/other") == "some/other"


def test_first_screen_shows_what_each_role_reads(large: RefusalCircuit) -> None:
    steps = flow(large)
    assert [step.name for step in steps][:1] + [step.name for step in steps][-1:] == ["refuse or comply", ENDS["embed"]]
    roles = {member.role for member in large.nodes}
    assert {step.name for step in steps if step.colour} == {role.replace("none", "no role") for role in roles}
    assert max(step.share for step in steps) == 1.0
    role_of = {member.node: member.role for member in large.nodes}
    sums: dict[str, float] = {}
    for member in large.edges:
        if member.edge.receiver == Node("logits"):
            sender = role_of.get(member.edge.sender, "the prompt").replace("none", "no role")
            sums[sender] = sums.get(sender, 0.0) + member.effect
    shown = dict(part.rsplit(" ", 1) for part in steps[0].reads.split(", "))
    assert shown == {name: number(sums[name], 2) for name in shown} and len(shown) == min(
        3, sum(abs(value) >= 0.005 for value in sums.values())
    )


@pytest.mark.parametrize("paper", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("draw", [faithfulness_curve, node_heatmap, effect_distribution])
def test_charts_of_the_report_show_what_plotly_shows(draw, paper, large: RefusalCircuit) -> None:
    figure = draw(large)
    text = chart_svg(figure, "a <title>", paper)
    assert text == chart_svg(figure, "a <title>", paper)
    root = ElementTree.fromstring(text)
    assert root.find(f"{SVG}title").text == "a <title>" and root.get("role") == "img"
    width, height = (float(part) for part in root.get("viewBox").split()[2:])
    for el in root.iter(f"{SVG}text"):
        if el.get("x"):
            wide = text_width(el.text, paper.font) * 0.9
            left = float(el.get("x")) - {"middle": wide / 2, "end": wide}.get(el.get("text-anchor"), 0.0)
            assert left > -1 and left + wide < width + 1 and 0 < float(el.get("y")) < height, el.text
    marks = sum(len(trace.x) for trace in figure.data if trace.type == "scatter")
    heat = [value for trace in figure.data if trace.type == "heatmap" for row in trace.z for value in row]
    cells = sum(value is not None for value in heat)
    drawn = sum(len([*root.iter(f"{SVG}{kind}")]) for kind in ("circle", "rect", "polygon")) + text.count('"2.4"/>')
    assert drawn >= marks + cells
    said = [el.text for el in root.iter(f"{SVG}title")][1:]
    texts = [t for trace in figure.data for t in np.ravel(trace.text) if trace.text is not None]
    assert len(said) == (len([t for t in texts if t != "not scored"]) if paper.titles else 0)


def test_charts_place_marks_by_their_values(small: RefusalCircuit) -> None:
    root = ElementTree.fromstring(chart_svg(effect_distribution(small), "effects"))
    circles = [el for group in root.iter(f"{SVG}g") for el in group.iter(f"{SVG}circle")]
    figure = effect_distribution(small)
    values = [x for trace in figure.data for x in trace.x]
    places = [float(el.get("cx")) for el in circles]
    slope, start = np.polyfit(values, places, 1)
    assert slope > 0 and np.allclose(np.array(values) * slope + start, places, atol=0.2)


def test_dark_pages_replace_every_colour_of_the_heat_map() -> None:
    light = [before for before, _ in heat_colours()]
    assert len(set(light)) == len(light)
    assert (light[0], light[-1]) == tuple(colour.lower() for colour in ("#9C2F6B", "#00588C"))


def test_report_brings_its_tables(small: RefusalCircuit) -> None:
    text = render_report(small)
    files = {
        name: base64.b64decode(data).decode() for data, name in re.findall(r'base64,([^"]+)" download="([^"]+)"', text)
    }
    assert set(files) == {"nodes.csv", "edges.csv", "curve.csv", "scores.csv", "circuit.json"}
    assert files["circuit.json"] == small.to_json()
    assert pd.read_csv(io.StringIO(files["nodes.csv"])).name.tolist() == [str(member.node) for member in small.nodes]
    assert len(pd.read_csv(io.StringIO(files["edges.csv"]))) == len(small.edges)


def test_report_has_methods_with_options_and_formulas(small: RefusalCircuit) -> None:
    text = Tags(render_report(small)).text
    assert "faithfulness(C) = (m(C) - m(empty)) / (m(model) - m(empty))" in text
    methods = text[text.index("Options of this run") :]
    assert re.search(r"target\s*0\.8", methods)


def test_failed_claims_are_shown_as_failed(small: RefusalCircuit) -> None:
    claims = (
        Claim("faithfulness", "enough of the gap", 0.8, None, None, "at least 0.8", True),
        Claim("minimal", "no part is superfluous", 0.1, (0.0, 0.2), 0.01, "p < 0.05", True),
        Claim("complete", "nothing is left out", 0.4, None, None, "at most 0.2", False),
        Claim("fresh", "so on others", 0.9, (-1.0, 2.0), None, "at least 0.8", None, "the interval holds 0"),
        Claim("stable", "prompts do not matter", None, None, None, "Jaccard 0.7", None, "too few pairs"),
    )
    check = replace(small.verification, claims=claims)
    text = Tags(render_report(replace(small, verification=check))).text
    part = text[text.index("What was claimed and checked") :]
    rows = (("fails", "complete"), ("undecided", "fresh"), ("not measured", "stable"), ("holds", "minimal"))
    rows += (("holds by construction", "faithfulness"),)
    order = [part.index(verdict + name) for verdict, name in rows]
    assert order == sorted(order)
    assert (
        "too few pairs" in part
        and "0.900, [\u22121.000, 2.000], the interval holds 0" in part
        and "0.100, [0.000, 0.200], p = 0.01" in part
    )
    assert "What was claimed" not in Tags(render_report(small)).text


def test_an_unverified_circuit_says_so(small: RefusalCircuit) -> None:
    nan = math.nan
    check = replace(
        small.verification,
        faithfulness=nan, held_out_faithfulness=nan, held_out_ci=(nan, nan), necessity=nan, curve=(), cmd=nan, cpr=nan,
        random_controls=RandomControls(0, nan, nan, nan), reached=False,
    )  # fmt: skip
    circuit = replace(small, verification=check, details=None)
    text = Tags(render_report(circuit)).text
    assert "not verified as a whole" in text and "Not measured: no random circuits were drawn." in text
    assert "Not verified: nothing was measured" in circuit_svg(circuit)
    assert "circuit is better than chance" not in text and "survives without it" not in text


def test_effects_of_every_node_are_in_the_distribution(large: RefusalCircuit) -> None:
    figure = effect_distribution(large)
    assert sorted(x for trace in figure.data for x in trace.x) == sorted(member.effect for member in large.nodes)
    assert [text for text in figure.layout.yaxis.ticktext][-1] == "detection"


def test_circuitsvis_views_escape_tokens_and_share_one_script(small: RefusalCircuit) -> None:
    page = figures_page(
        "views",
        attention_html(small.details.attention, script=False),
        attention_html(small.details.attention, view="heads", script=False),
        tokens_html(["<img src=x onerror=alert(1)>", " a"], [0.5, -0.5], script=False),
        neurons_html([(("a", "</script>"), np.ones((2, 1, 2)))], layers=[3], neurons=["N1", "N2"], script=False),
    )
    assert len(unpacked(page)) == 1 and page.count("data-props></div>") == 6
    tags = Tags(page)
    assert "img" not in tags.tags and not tags.handlers
    assert "default-src 'none'" in page


def test_circuitsvis_views_name_wrong_shapes() -> None:
    with pytest.raises(MechsafetyError, match="1 values of 2 tokens; expected one per token"):
        tokens_html(["a", "b"], [1.0])
    with pytest.raises(MechsafetyError, match=r"expected \[token layer neuron\] = \(1, 1, 2\)"):
        neurons_html([(("a",), np.ones((1, 1, 1)))], layers=[0], neurons=["x", "y"])
    with pytest.raises(MechsafetyError, match=r"view='x'; expected one of \['heads', 'patterns'\]"):
        attention_html([], view="x")


def test_write_all_writes_six_files(small: RefusalCircuit, loaded: RefusalCircuit, tmp_path: Path) -> None:
    paths = write_all(small, tmp_path)
    names = {"circuit.json", "report.html", "circuit.svg", "circuit.pdf", "circuit.tex", "scores.csv"}
    assert {path.name for path in paths} == {path.name for path in tmp_path.iterdir()} == names
    assert RefusalCircuit.load(tmp_path / "circuit.json") == loaded
    assert (tmp_path / "scores.csv").read_text().count("\n") == 301
    assert len(write_all(small, tmp_path / "new" / "folder")) == len(list((tmp_path / "new" / "folder").iterdir())) == 6
    with pytest.raises(MechsafetyError, match="no scores of its candidates"):
        write_all(loaded, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_hostile_string_is_hostile() -> None:
    assert set(Tags(f"<p>{HOSTILE}</p>").handlers) == {"onerror"}


def test_report_tells_how_the_circuit_was_found(small: RefusalCircuit) -> None:
    first, second = (member.node for member in small.nodes[:2])
    gone = Node("head", 2, 7)
    search = Search(
        ranked=17,
        removed=5,
        minimal=True,
        backups=(Backup(first, second, (first, second), 0.011, 0.122, 0.333, (0.144, 0.255), 0.0166),),
        linked=(small.edges[0].edge,),
        dropped=(gone,),
        cut=("stability: 2 of 5 resamples",),
    )
    section = search_text(replace(small, search=search))
    for part in (
        "first 17 in the ranking of 300 candidate nodes", "took 5 of them away",
        "No further single node can be removed", "keeps 1 of its 16 edges", f"anything: {gone}.",
        f"{first}{second}0.0110.1220.333[0.144, 0.255]0.017yes",
        "1 backup was found", "Left out to save time", "stability: 2 of 5 resamples",
    ):  # fmt: skip
        assert part in section, part
    assert "cut short" not in section
    bare = search_text(replace(small, search=Search(3, 0)))
    assert "No backups" in bare and "before it was known" in bare and "Nothing was cut short" in bare
    assert "Only to connect" not in bare and "left the circuit" not in bare and "Left out" not in bare
    assert "does not say how it was found" in search_text(replace(small, search=None))


def test_the_verdict_comes_first_and_a_failed_check_is_no_proud_number(small: RefusalCircuit) -> None:
    made = (
        Claim("faithfulness", "", 0.9, None, None, "", True),
        Claim("fresh pairs", "", 0.4, None, None, "", False),
        Claim("necessity", "", 1.0, None, 0.6, "", False),
        Claim("sufficiency", "", 0.9, None, 0.01, "", True),
        Claim("stability", "", None, None, None, "", None),
    )
    check = replace(small.verification, necessity=1.0, claims=made)
    page = render_report(replace(small, verification=check))
    head = Tags(page).text.replace("\n", "")
    said = "1 of 4 checks hold: sufficiency2 fail: fresh pairs, necessity1 was not measured: stability"
    assert f"{said}1 holds by construction: faithfulness" in head and head.index("1 of 4 checks") < head.index(
        "candidate parts"
    )
    assert page.count('class="card fails"') == 1 and "Necessity: its check fails" in page, "no fresh pairs here"
    assert page.count('class="card holds-by-construction"') == 1
    assert "Held-out faithfulness: holds by construction" in page and "Random circuits</h2>" in page
    unsure = tuple(replace(claim, passed=None) if claim.name == "necessity" else claim for claim in made)
    undecided = render_report(replace(small, verification=replace(check, claims=unsure)))
    assert "Necessity: its check is undecided" in undecided and 'class="card undecided"' in undecided
    whole = render_report(replace(small, verification=replace(check, claims=())))
    assert "checks hold" not in whole and "its check fails" not in whole


def search_text(circuit: RefusalCircuit) -> str:
    text = Tags(render_report(circuit)).text
    return text[text.index("How the circuit was found") : text.index("The same circuit by role")].replace("\n", "")


def test_at_edge_level_edges_are_counted(small: RefusalCircuit) -> None:
    check = replace(
        small.verification,
        held_out_faithfulness=0.85,
        reached=True,
        curve=(CurvePoint(0.01, 10, 0.1, 0.1), CurvePoint(1.0, 1000, 1.0, 1.0)),
    )
    circuit = replace(small, level="edge", n_candidates=1000, verification=check)
    text = Tags(render_report(circuit)).text
    n = len(circuit.edges)
    assert n != len(circuit.nodes)
    for part in (
        f"{n} of 1000 candidate edges ({percent(n / 1000)}) restore", f"Size{n} of 1000", "they join 12 nodes",
        "10 best edges restore", f"{n} of 1000 (1.6 %) are enough", "small set of edges",
    ):  # fmt: skip
        assert part in text.replace("\n", ""), part
    assert "12 of 1000" not in text
    shown = faithfulness_curve(circuit).data[2]
    assert shown.x[0] == n


@pytest.mark.parametrize(
    ("passed", "said"),
    [
        (True, "): the refusal depends on this circuit more than on a random one."),
        (False, "does not show that the refusal depends on this circuit more than on a random one."),
        (None, "It was not measured whether removing random circuits of its size loses as much."),
    ],
)
def test_necessity_is_said_by_the_verdict_against_random_circuits(passed, said, small: RefusalCircuit) -> None:
    found = Claim("necessity", "", 1.0, None, 0.63, "", passed)
    controls = RandomControls(100, 0.97, 1.0, 0.63)
    check = replace(small.verification, necessity=1.0, necessity_controls=controls, claims=(found,))
    text = necessity(replace(small, verification=check))
    assert said in text and "100 % of the gap is lost" in text
    assert ("random circuits of its size loses 97 %" in text) == (passed is not None)
    assert sum(words in text for words in ("): the refusal depends", "does not show", "not measured")) == 1
