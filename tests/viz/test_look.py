"""A paper's own texts, words, font and colours: in every medium, checked where they are given."""

import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.textpath import TextPath

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import Node
from mechsafety.viz import (
    Style,
    circuit_html,
    circuit_pdf,
    circuit_svg,
    circuit_tikz,
    compare_html,
    compare_layouts,
    layout_circuit,
    layout_pdf,
    layout_png,
    layout_svg,
    layout_tikz,
    role_diagram,
)
from mechsafety.viz.pdf import layout_figure
from mechsafety.viz.tikz import tex

MAP = RefusalCircuit.load(Path(__file__).parents[2] / "docs" / "gallery" / "demo.json")
WORDS = {
    "detection": "Erkennung",
    "evaluation": "Bewertung",
    "relay": "Weitergabe",
    "decision": "Entscheidung",
    "production": "Ausgabe",
    "none": "ohne Rolle",
}
GERMAN = Style(
    labels={"14.2": "Schloss", Node("mlp", 20): "M20*", "embed": "Eingabe", "logits": "Antwort"},
    role_names=WORDS,
    colours={"detection": "navy", "decision": "#7B3294"},
)


def texts(layout) -> list[str]:
    marks = (*layout.nodes, *layout.edges)
    return [label.text for label in (*layout.labels, *(label for mark in marks for label in mark.labels))]


def colours(layout) -> set[str]:
    marks = (*layout.nodes, *layout.edges)
    shapes = (*layout.backdrop, *(shape for mark in marks for shape in mark.shapes))
    return {colour.lower() for shape in shapes for colour in (shape.fill, shape.stroke) if colour}


@pytest.mark.parametrize("draw", [layout_circuit, role_diagram])
def test_every_word_for_a_role_is_the_papers_own(draw) -> None:
    layout = draw(MAP, GERMAN)
    said = " ".join([*texts(layout), layout.description, *(mark.title for mark in layout.nodes)])
    said += " ".join(mark.title for mark in layout.edges) if draw is role_diagram else ""
    present = {member.role for member in MAP.nodes}
    assert all(WORDS[role] in said for role in present)
    assert not re.findall(r"\b(detection|evaluation|relay|decision|production|no role)\b", said)


def test_texts_stand_in_place_of_names() -> None:
    layout, plain = layout_circuit(MAP, GERMAN), layout_circuit(MAP)
    marks = {mark.key: mark for mark in layout.nodes}
    assert [marks[key].labels[0].text for key in ("L14.H2", "L20.MLP", "embed", "logits")] == [
        "Schloss", "M20*", "Eingabe", "Antwort",
    ]  # fmt: skip
    assert marks["L14.H2"].title.startswith("Schloss (L14.H2): effect")
    assert "Schloss is head 2 of layer 14" in layout.description and "14.2 is head 2 of layer 14" in plain.description
    assert any("Schloss" in text for text in texts(role_diagram(MAP, GERMAN)))
    # what is left out is counted in the paper's words
    assert re.search(r"left out: .*\d+ Bewertung", layout_circuit(MAP, replace(GERMAN, top=9)).description)


def test_a_role_has_its_colour_in_pictures_and_legends() -> None:
    for layout in (layout_circuit(MAP, GERMAN), role_diagram(MAP, GERMAN)):
        assert {"#000080", "#7b3294"} <= colours(layout) and not {"#0072b2", "#d55e00"} & colours(layout)
    shades = colours(layout_circuit(MAP, replace(GERMAN, grayscale=True)))
    assert all(shade[1:3] == shade[3:5] == shade[5:7] for shade in shades)


def test_files_of_every_kind_have_them(tmp_path: Path) -> None:
    svg, latex = circuit_svg(MAP, GERMAN), circuit_tikz(MAP, GERMAN)
    for text in ("Schloss", "Eingabe", "Erkennung", "Ausgabe"):
        assert f">{text}</text>" in svg and f"{{{tex(text)}}};" in latex
    assert "#000080" in svg and "{c000080}{HTML}{000080}" in latex
    drawn = {text.get_text() for text in layout_figure(layout_circuit(MAP, GERMAN)).axes[0].texts}
    assert {"Schloss", "Eingabe", "Erkennung"} <= drawn
    assert circuit_pdf(MAP, tmp_path / "a.pdf", GERMAN).read_bytes().startswith(b"%PDF")
    assert layout_png(role_diagram(MAP, GERMAN), tmp_path / "a.png").stat().st_size > 5000


def test_the_page_has_them() -> None:
    page = circuit_html(MAP, GERMAN)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    assert data["words"]["labels"]["L14.H2"] == "Schloss" and data["words"]["roles"] == WORDS
    assert data["nodes"]["L14.H2"]["rows"][3] == WORDS[next(m.role for m in MAP.nodes if str(m.node) == "L14.H2")]
    body = page[page.index("<body>") :]
    assert "Erkennung</label>" in body and "background:#000080" in body and "<span>Bewertung</span>" in body
    grey_page = circuit_html(MAP, replace(GERMAN, grayscale=True))
    assert "background:#000080" not in grey_page


def test_a_comparison_has_them() -> None:
    fewer = MAP.subset([member.node for member in MAP.nodes[5:]])
    both = compare_layouts(MAP, fewer, ("all", "fewer"), GERMAN)
    for layout in (both.first, both.second, both.difference):
        marks = {mark.key: mark.labels[0].text for mark in layout.nodes}
        assert marks["L14.H2"] in ("Schloss", "(Schloss)") and marks["embed"] == "Eingabe"
        assert "Erkennung" in texts(layout) and "detection" not in texts(layout)
    assert "Erkennung" in compare_html(MAP, fewer, ("all", "fewer"), GERMAN)


@pytest.mark.parametrize(
    ("font", "latex", "drawn"),
    [
        ("sans-serif", r"\sffamily", "DejaVu Sans"),
        ("serif", r"\rmfamily", "DejaVu Serif"),
        ("monospace", r"\ttfamily", "DejaVu Sans Mono"),
    ],
)
def test_a_font_is_taken_by_every_medium(small: RefusalCircuit, font: str, latex: str, drawn: str) -> None:
    style = Style(font=font, width_mm=178)
    for layout in (layout_circuit(small, style), role_diagram(small, style)):
        family = ElementTree.fromstring(layout_svg(layout)).get("font-family")
        assert family.endswith(f", {font}") and f"'{drawn}'" in family
        written = re.findall(r"font=(\\\w+family)", layout_tikz(layout))
        assert set(written) == {latex}
        figure = layout_figure(layout)
        assert {text.get_fontfamily()[0] for text in figure.axes[0].texts} == {drawn}
        for text in figure.axes[0].texts:  # no text leaves the picture, however wide the font is
            path = TextPath((0, 0), text.get_text(), size=text.get_fontsize() * 96 / 72, prop=text.get_fontproperties())
            assert path.get_extents().width <= layout.width
    assert json.loads(re.search(r'id="data">(.*?)</script>', circuit_html(small, style), re.S)[1])["latex"] == [
        latex,
        "",
    ]


def test_an_installed_font_is_drawn_and_latex_refuses_it(small: RefusalCircuit, tmp_path: Path) -> None:
    style = Style(font="STIXGeneral")  # comes with matplotlib
    layout = layout_circuit(small, style)
    assert ElementTree.fromstring(layout_svg(layout)).get("font-family").startswith("'STIXGeneral', ")
    assert b"STIXGeneral" in layout_pdf(layout, tmp_path / "a.pdf").read_bytes()
    with pytest.raises(MechsafetyError, match=r"^font='STIXGeneral' in LaTeX; expected one of \('sans-serif', "):
        circuit_tikz(small, style)
    assert "LaTeX has no font STIXGeneral" in circuit_html(small, style)


def test_a_text_that_a_medium_cannot_draw_is_refused(small: RefusalCircuit, tmp_path: Path) -> None:
    """The SVG's reader may have the letters; what draws with fonts of its own says that it lacks them."""
    style = Style(role_names={"detection": "检测"})
    assert "检测" in circuit_svg(small, style)
    with pytest.raises(MechsafetyError, match=r"^the text '检测' in PDF or PNG: font 'DejaVu Sans' lacks '检测'; expe"):
        circuit_pdf(small, tmp_path / "a.pdf", style)
    with pytest.raises(
        MechsafetyError, match=r"^the text '检测' in LaTeX: its standard fonts lack '检测'; expected La"
    ):
        circuit_tikz(small, style)
    assert r"D\'{e}tection" in circuit_tikz(small, Style(role_names={"detection": "Détection"}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": {"L14H2": "a"}}, "no node is named 'L14H2'; expected a name such as 'L14.H2', 'L26.MLP' or"),
        ({"labels": {"14.2": "a", "L14.H2": "b"}}, "labels name L14.H2 twice; expected one text per node"),
        ({"labels": {"14.2": " "}}, "the label of L14.H2 is ' '; expected 1 to 60 letters that can be printed"),
        ({"labels": {"14.2": 3}}, "the label of L14.H2 is 3; expected a text"),
        ({"role_names": {"detector": "a"}}, "role_names names the role 'detector'; expected some of ('detection', "),
        (
            {"role_names": {"relay": "decision"}},
            "the roles 'relay' and 'decision' are both called 'decision'; expected a name of its own per role",
        ),
        ({"colours": {"Detection": "red"}}, "colours names the role 'Detection'; expected some of"),
        ({"colours": {"detection": "navi"}}, "the colour of the role 'detection' is 'navi'; expected a colour such as"),
        ({"font": "DejaVu Serrif"}, "font='DejaVu Serrif' is not installed; expected one of ('sans-serif', 'serif', "),
        ({"roles": ("detecton",)}, "roles names the role 'detecton'; expected some of"),
        ({"roles": "detecton"}, "roles names the role 'detecton'; expected some of"),
        ({"font": "Comic Sans"}, "font='Comic Sans' is not installed; expected one of ('sans-serif', 'serif', "),
        ({"grayscale": "yes"}, "grayscale='yes'; expected True or False"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(options, message) -> None:
    with pytest.raises(MechsafetyError) as caught:
        Style(**options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "right"),
    [
        ({"labels": {"L14H2": "a"}}, "L14.H2"),
        ({"role_names": {"detector": "a"}}, "detection"),
        ({"colours": {"Detection": "red"}}, "detection"),
        ({"colours": {"detection": "navi"}}, "navy"),
        ({"font": "DejaVu Serrif"}, "DejaVu Serif"),
        ({"font": "sans"}, "sans-serif"),
        ({"roles": ("detecton",)}, "detection"),
    ],
)
def test_the_nearest_right_name_is_proposed(options, right: str) -> None:
    with pytest.raises(MechsafetyError, match=f"did you mean '{right}'\\?$"):
        Style(**options)


@pytest.mark.parametrize("draw", [layout_circuit, role_diagram])
def test_a_label_of_a_node_that_is_not_there_is_refused(draw) -> None:
    text = r"^labels names L14\.H3, which is not in this circuit; expected nodes .*; did you mean 'L14\.H2'\?$"
    with pytest.raises(MechsafetyError, match=text):
        draw(MAP, Style(labels={"14.3": "a"}))


def test_a_long_label_makes_its_own_node_wider_and_no_other() -> None:
    named = Style(width_mm=85, labels={"14.2": "Schlosskopf", "M26": "letztes MLP"})
    plain, long = layout_circuit(MAP, Style(width_mm=85)), layout_circuit(MAP, named)
    wide = {mark.key: mark.width for mark in long.nodes}
    assert "Schlosskopf" in texts(long)
    assert wide["L14.H2"] > 1.5 * wide["L13.MLP"]
    assert sum("." in key for key in wide) > 0.6 * sum("." in mark.key for mark in plain.nodes)


@pytest.mark.parametrize(("path", "write"), [("a.jpg", layout_png), ("a.pdf", layout_png), ("a.png", layout_pdf)])
def test_a_name_of_another_kind_of_picture_is_refused(small: RefusalCircuit, tmp_path, path, write) -> None:
    with pytest.raises(MechsafetyError, match=rf"^'{path}' is no name of a P.F|^'{path}' is no name of a PNG"):
        write(layout_circuit(small), tmp_path / path)
    assert not list(tmp_path.iterdir())
