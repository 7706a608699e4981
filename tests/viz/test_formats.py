"""SVG, PDF, TikZ and HTML: same bytes, well-formed, escaped, no network."""

import html
import json
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

import pytest
from circuits_drawn import HOSTILE, build
from matplotlib.textpath import TextPath

from mechsafety.circuits.circuit import Node, RefusalCircuit
from mechsafety.errors import MechsafetyError
from mechsafety.nodes import as_node
from mechsafety.viz import (
    Style,
    circuit_fragment,
    circuit_html,
    circuit_pdf,
    circuit_png,
    circuit_svg,
    circuit_tikz,
    compare_html,
    compare_layouts,
    layout_circuit,
    layout_pdf,
    layout_png,
    layout_svg,
    layout_tikz,
    mimebundle,
    role_diagram,
)
from mechsafety.viz.html import SOURCES, safe_json
from mechsafety.viz.pdf import layout_figure
from mechsafety.viz.tikz import tex

SVG = "{http://www.w3.org/2000/svg}"


class Tags(HTMLParser):
    """Collects tags, addresses, event handlers and the frames' own pages."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.frames: list[str] = []
        self.scripts: list[str] = []
        self.style = ""
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")
        for name, value in attrs:
            if name in ("src", "href", "action", "data", "poster"):
                self.addresses.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "srcdoc":
                self.frames.append(value or "")
            if name == "style":
                self.style += value or ""

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data
        elif self.cdata_elem == "style":
            self.style += data
        else:
            self.text += data


def assert_inert(text: str, scripts: int) -> Tags:
    """No image, handler or network address, and exactly the scripts that the page brings itself."""
    page = Tags(text)
    assert "img" not in page.tags and not page.handlers
    assert page.tags.count("script") == scripts
    assert all(address.startswith("#") for address in page.addresses), page.addresses
    assert "@import" not in page.style and "url(" not in page.style
    return page


@pytest.mark.parametrize("draw", [circuit_svg, circuit_tikz, circuit_html, circuit_fragment])
def test_same_circuit_gives_same_text(draw, circuit: RefusalCircuit) -> None:
    assert draw(circuit) == draw(circuit)


def test_every_map_is_read_back_from_either_form(circuit: RefusalCircuit, tmp_path: Path) -> None:
    text = circuit.to_json()
    assert RefusalCircuit.from_json(text).to_json() == text
    whole = RefusalCircuit.load(circuit.save(tmp_path / "map"))
    assert whole.to_json() == text and (whole.details is None) == (circuit.details is None)
    assert circuit_svg(whole) == circuit_svg(circuit)


def test_same_bytes_in_another_process(small: RefusalCircuit, tmp_path: Path) -> None:
    path = tmp_path / "circuit.json"
    small.save(path)
    code = (
        "import sys; from mechsafety.circuits.circuit import RefusalCircuit; from mechsafety.viz import circuit_svg;"
        "sys.stdout.write(circuit_svg(RefusalCircuit.load(sys.argv[1])))"
    )
    command = [sys.executable, "-X", "utf8", "-c", code, str(path)]
    seen = [subprocess.run(command, env={"PYTHONHASHSEED": seed}, capture_output=True, check=True) for seed in "12"]
    assert seen[0].stdout == seen[1].stdout == circuit_svg(RefusalCircuit.load(path)).encode()


def test_svg_is_well_formed_and_names_every_part(circuit: RefusalCircuit) -> None:
    root = ElementTree.fromstring(circuit_svg(circuit))
    assert root.find(f"{SVG}title").text.startswith("Refusal circuit of") and root.find(f"{SVG}desc").text
    nodes = {group.get("data-node") for group in root.iter(f"{SVG}g") if group.get("class") == "node"}
    assert nodes == {str(member.node) for member in circuit.nodes} | {"embed", "logits"}
    groups = [group for group in root.iter(f"{SVG}g") if group.get("class") in ("node", "edge")]
    assert all(group.find(f"{SVG}title").text for group in groups)
    assert len(groups) - len(nodes) == len(layout_circuit(circuit).edges)
    assert "data-effect" not in circuit_svg(circuit)
    assert not [el.tag for el in root.iter() if el.tag in (f"{SVG}image", f"{SVG}script", f"{SVG}use", f"{SVG}style")]


def test_svg_reaches_nothing_outside(circuit: RefusalCircuit) -> None:
    text = circuit_svg(circuit).replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|href=|url\(|@import|src=[\"']", text)


def test_svg_caption_has_the_numbers(small: RefusalCircuit) -> None:
    text = circuit_svg(small)
    for part in ("12 of 300 candidate nodes", "Held-out faithfulness 0.89", "[0.84, 0.93]", "p\xa0=\xa00.005"):
        assert part in text
    flat = " ".join(re.sub("<[^>]+>", " ", text).split())
    assert "Metric: log-odds of a refusal's first token. An effect is the share of the" in flat
    strongest = sorted(small.nodes, key=lambda member: -abs(member.effect))
    head, mlp = (next(m.node for m in strongest if m.node.kind == kind) for kind in ("head", "mlp"))
    assert f"Names: {head.short} is head {head.index} of layer {head.layer}, {mlp.short} is the MLP of layer" in flat


def test_html_is_inert_whatever_the_model_is_called(hostile: RefusalCircuit) -> None:
    page = assert_inert(circuit_html(hostile), scripts=2)
    assert "<img src=x onerror=alert(1)>" in page.text
    assert "default-src 'none'" in circuit_html(hostile)
    data = json.loads(page.scripts[0])
    assert set(data["nodes"]) == {str(member.node) for member in hostile.nodes}


def test_page_is_small_without_attention(large: RefusalCircuit, small: RefusalCircuit) -> None:
    bare = replace(large, details=None)
    # 300 nodes, a fifth of which work against refusal and are marked so, with every measurement that a role rests on
    assert len(circuit_html(bare).encode()) < 320_000
    assert len(circuit_html(replace(small, details=None)).encode()) < 100_000
    rng = random.Random(2)
    every = [Node("head", layer, head) for layer in range(24) for head in range(16)]
    huge = build(rng.sample(every, 300), 200, n_layers=24, n_heads=16)
    assert len(circuit_html(replace(huge, details=None)).encode()) < 320_000


def test_pages_script_is_its_sources_in_one_function(small: RefusalCircuit) -> None:
    script = Tags(circuit_html(small)).scripts[1]
    assert script.startswith('(() => {\n"use strict";\n') and script.endswith("start();\n})();")
    sources = [(files("mechsafety.viz") / "templates" / f"circuit-{part}.js").read_text("utf-8") for part in SOURCES]
    places = [script.index(source) for source in sources]
    assert places == sorted(places) and len(script) - sum(map(len, sources)) < 60


def test_pages_theme_is_checked(small: RefusalCircuit) -> None:
    assert 'data-theme="dark"' in circuit_html(small, theme="dark")
    with pytest.raises(MechsafetyError, match=r"theme='neon'; expected one of \('auto', 'light', 'dark'\)"):
        circuit_html(small, theme="neon")


def test_every_medium_has_the_same_coordinates(small: RefusalCircuit) -> None:
    def boxes(text: str) -> dict[str, list[str]]:
        root = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
        nodes = [group for group in root.iter(f"{SVG}g") if group.get("class") == "node"]
        return {group.get("data-node"): [path.get("d") for path in group.iter(f"{SVG}path")] for group in nodes}

    picture, page = boxes(circuit_svg(small)), boxes(circuit_html(small))
    assert {key: page[key] for key in picture} == picture
    tikz = circuit_tikz(small)
    for paths in picture.values():
        x, y = re.match(r"M([\d.]+) ([\d.]+)", paths[0]).groups()
        assert f"] ({x},{y}) --" in tikz


def test_page_has_every_edge_and_starts_with_the_strongest(large: RefusalCircuit) -> None:
    text = circuit_html(large)
    assert text.count('<g class="edge"') == 120
    threshold = json.loads(Tags(text).scripts[0])["edgeThreshold"]
    effects = [abs(float(value)) for value in re.findall(r'class="edge".*?data-effect="([^"]+)"', text)]
    assert sum(effect >= threshold for effect in effects) == 60


def test_fragment_is_a_sandboxed_frame_around_the_page(hostile: RefusalCircuit) -> None:
    text = circuit_fragment(hostile)
    frame = Tags(text)
    assert frame.tags == ["iframe"] and frame.frames == [circuit_html(hostile).replace("\r", "\n")]
    assert 'sandbox="allow-scripts allow-downloads"' in text and "allow-same-origin" not in text


def test_mimebundle_holds_three_forms(small: RefusalCircuit) -> None:
    bundle = mimebundle(small)
    assert set(bundle) == {"text/html", "image/svg+xml", "text/plain"}
    assert bundle["image/svg+xml"] == circuit_svg(small) and bundle["text/plain"] == repr(small)


def test_script_json_cannot_leave_its_element() -> None:
    text = safe_json({"a": HOSTILE + "<!--\u2028"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": HOSTILE + "<!--\u2028"}


def test_png_is_the_same_picture_at_a_resolution(circuit: RefusalCircuit, tmp_path: Path) -> None:
    sizes = {}
    for dpi in (72, 144):
        path = circuit_png(circuit, tmp_path / f"{dpi}.png", Style(width_mm=85), dpi=dpi)
        data = path.read_bytes()
        assert (
            data.startswith(b"\x89PNG") and data == circuit_png(circuit, path, Style(width_mm=85), dpi=dpi).read_bytes()
        )
        sizes[dpi] = int.from_bytes(data[16:20], "big")
    assert sizes[144] == pytest.approx(2 * sizes[72], abs=2) and sizes[72] == pytest.approx(85 / 25.4 * 72, abs=2)


def test_pdf_is_vector_and_the_same_twice(circuit: RefusalCircuit, tmp_path: Path) -> None:
    first, second = (circuit_pdf(circuit, tmp_path / f"{name}.pdf").read_bytes() for name in "ab")
    assert first == second and first.startswith(b"%PDF")
    assert b"/Subtype /Image" not in first and b"CreationDate" not in first and b"FontFile2" in first


def test_pdf_leaves_matplotlib_as_it_was(small: RefusalCircuit, tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    circuit_pdf(small, tmp_path / "a.pdf")
    assert dict(matplotlib.rcParams) == before


def test_tikz_is_balanced_plain_ascii_with_every_node(circuit: RefusalCircuit) -> None:
    text = circuit_tikz(circuit)
    assert text.isascii()
    assert text.count(r"\begin{tikzpicture}") == text.count(r"\end{tikzpicture}") == 1
    assert text.count(r"\begin{document}") == text.count(r"\end{document}") == 1
    bare = re.sub(r"\\[{}\\]", "", text)
    assert bare.count("{") == bare.count("}")
    colours = set(re.findall(r"definecolor\{(\w+)\}", text))
    assert set(re.findall(r"(?:fill|draw|text)=(\w+)", text)) <= colours
    nodes = [mark for mark in layout_circuit(circuit).nodes if mark.kind == "head"]
    assert nodes and all(f"{{{mark.labels[0].text}}};" in text for mark in nodes)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("50 % & a_b #1", r"50 \% \& a\_b \#1"),
        ("\\x^2~{$}", r"\textbackslash{}x\textasciicircum{}2\textasciitilde{}\{\$\}"),
        ("é ﬁ 漢 \u03b1 Ω Ł 🙂", r"\'{e} fi [U+6F22] \ensuremath{\alpha} \ensuremath{\Omega} \L{} [U+1F642]"),
        ("\u2212<\x00", r"\ensuremath{-}\ensuremath{<}[U+0000]"),
    ],
)
def test_tex_escapes(given: str, expected: str) -> None:
    assert tex(given) == expected


def compile_tex(folder: Path, text: str) -> Path:
    (folder / "paper.tex").write_text(text)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    return folder / "paper.pdf"


needs_latex = pytest.mark.skipif(
    shutil.which("pdflatex") is None, reason="no pdflatex here: apt-get install texlive-latex-base texlive-pictures"
)
DEMO = Path(__file__).parents[2] / "docs" / "gallery" / "demo.json"


@needs_latex
@pytest.mark.parametrize("font", ["sans-serif", "serif", "monospace"])
def test_latex_draws_the_demo_map_at_its_size(tmp_path: Path, font: str) -> None:
    """One page, as wide as was asked for, in fonts that scale; with a plain TeX Live, too."""
    circuit = RefusalCircuit.load(DEMO)
    style = Style(width_mm=85, font=font, role_names={"detection": "Détection"}, labels={"14.2": "a_b & c"})
    for layout in (layout_circuit(circuit, style), role_diagram(circuit, style)):
        written = compile_tex(tmp_path, layout_tikz(layout)).read_bytes()
        page = re.search(rb"/MediaBox \[\s*0 0 (\S+) (\S+)", written) or re.search(
            rb"MediaBox\[0 0 (\S+) (\S+)\]", written
        )
        log = (tmp_path / "paper.log").read_text(errors="replace")
        assert (
            "Output written on paper.pdf (1 page" in log and "Overfull" not in log and "size substitutions" not in log
        )
        assert page is None or float(page[1]) == pytest.approx(85 / 25.4 * 72, abs=6)


@needs_latex
def test_tikz_compiles_alone(hostile: RefusalCircuit, tmp_path: Path) -> None:
    assert compile_tex(tmp_path, circuit_tikz(hostile)).stat().st_size > 5000


@needs_latex
def test_tikz_compiles_inside_a_paper(hostile: RefusalCircuit, tmp_path: Path) -> None:
    style = Style(width_mm=85, caption=False, grayscale=True)
    (tmp_path / "circuit.tex").write_text(circuit_tikz(hostile, style))
    (tmp_path / "roles.tex").write_text(layout_tikz(role_diagram(hostile, replace(style, width_mm=120))))
    body = r"\begin{document}before \input{circuit} \input{roles} after\end{document}"
    paper = r"\documentclass{article}\usepackage{tikz}" + body
    assert compile_tex(tmp_path, paper).stat().st_size > 5000


def test_sizes_are_the_papers(small: RefusalCircuit, tmp_path: Path) -> None:
    style = Style(width_mm=85)
    root = ElementTree.fromstring(circuit_svg(small, style))
    assert root.get("width") == "85mm" and root.get("height").endswith("mm")
    page = re.search(rb"/MediaBox \[ 0 0 (\S+)", circuit_pdf(small, tmp_path / "a.pdf", style).read_bytes())
    assert float(page[1]) == pytest.approx(85 / 25.4 * 72, abs=0.1)
    points = re.search(r"rectangle \((\S+),", circuit_tikz(small, style))
    assert 0.75 * float(points[1]) == pytest.approx(85 / 25.4 * 72, abs=0.1)


def test_png_is_a_png(small: RefusalCircuit, tmp_path: Path) -> None:
    layout = layout_circuit(small)
    first, second = (layout_png(layout, tmp_path / f"{name}.png").read_bytes() for name in "ab")
    assert first == second and first.startswith(b"\x89PNG")


def test_roles_are_boxes_and_arrows_sum_edges(small: RefusalCircuit) -> None:
    layout = role_diagram(small)
    boxes = {mark.key for mark in layout.nodes}
    role_of = {str(member.node): member.role for member in small.nodes}
    assert boxes == {"embed", "logits", *role_of.values()}
    sums: dict[tuple[str, str, str], float] = {}
    for member in small.edges:
        ends = [role_of.get(str(node), node.kind) for node in (member.edge.sender, member.edge.receiver)]
        if ends[0] != ends[1]:
            key = (*ends, member.edge.slot)
            sums[key] = sums.get(key, 0.0) + member.effect
    drawn = {(mark.sender, mark.receiver, mark.slot): mark.effect for mark in layout.edges}
    assert drawn.keys() == sums.keys()
    assert all(drawn[key] == pytest.approx(sums[key]) for key in drawn)
    key = max(sums, key=lambda one: abs(sums[one]))
    label = next(mark.labels[0].text for mark in layout.edges if (mark.sender, mark.receiver, mark.slot) == key)
    assert label.startswith(f"{key[2]} {sums[key]:.2f}".replace("-", "\u2212"))


def test_role_diagram_texts_do_not_overlap(circuit: RefusalCircuit) -> None:
    assert_texts_are_apart(role_diagram(circuit))


def straight_lines(commands) -> list[tuple[float, float, float, float]]:
    """Left, top, right and bottom of the straight pieces of a path."""
    found, at = [], commands[0][1]
    for letter, values in commands[1:]:
        end = values[-2:]
        if letter == "L":
            found.append((min(at[0], end[0]), min(at[1], end[1]), max(at[0], end[0]), max(at[1], end[1])))
        at = end
    return found


def assert_texts_are_apart(layout) -> None:
    boxes = [label.box for mark in (*layout.nodes, *layout.edges) for label in mark.labels]
    boxes += [label.box for label in layout.labels]
    for i, (a, b, c, d) in enumerate(boxes):
        assert a >= 0 and c <= layout.width and d <= layout.height
        assert not any(min(c, g) - max(a, e) > 0.1 and min(d, h) - max(b, f) > 0.1 for e, f, g, h in boxes[:i])


def test_role_diagram_keeps_to_a_width_and_says_what_it_leaves_out(large: RefusalCircuit) -> None:
    layout = role_diagram(large, Style(width_mm=120))
    assert layout.width == pytest.approx(120 * 96 / 25.4)
    assert len(layout.edges) == 18 and f"{layout.n_edges - 18} weaker arrows are left out." in layout.description


@pytest.mark.parametrize("width", [85.0, 178.0, 260.0])
@pytest.mark.parametrize("points", [None, 6.0, 8.0])
def test_role_diagram_fits_a_column_at_the_font(circuit: RefusalCircuit, width: float, points: float | None) -> None:
    """No text is under 6 points, nothing leaves the picture, no texts meet, and no line crosses a text."""
    layout = role_diagram(circuit, Style(width_mm=width, font_pt=points))
    assert layout.width == pytest.approx(width * 96 / 25.4) and layout.height <= 230 * 96 / 25.4
    inside = [label for mark in layout.nodes for label in mark.labels]
    texts = [*layout.labels, *inside, *(label for mark in layout.edges for label in mark.labels)]
    titles = [mark.labels[0].size for mark in layout.nodes if mark.kind == "role"]
    assert max(titles) * 72 / 96 == pytest.approx(points or 7)
    assert min(label.size for label in texts) * 72 / 96 >= 6 - 1e-6
    assert_texts_are_apart(layout)
    boxes = [mark for mark in layout.nodes if mark.kind == "role"]
    assert all(mark.x - mark.width / 2 > 0 and mark.x + mark.width / 2 < layout.width for mark in boxes)
    for mark in boxes:
        left, right = mark.x - mark.width / 2, mark.x + mark.width / 2
        assert all(left <= label.box[0] and label.box[2] <= right for label in mark.labels), mark.key
    lines = [line for mark in layout.edges for line in straight_lines(mark.shapes[0].commands)]
    for label in (label for mark in layout.edges for label in mark.labels):
        left, top, right, bottom = label.box
        assert not [1 for a, b, c, d in lines if a < right and c > left and b < bottom - 1 and d > top + 1], label.text


def test_role_diagram_drops_weak_arrows_before_text_gets_small(large: RefusalCircuit) -> None:
    wide, narrow = (role_diagram(large, Style(width_mm=width)) for width in (178, 60))
    assert len(narrow.edges) < len(wide.edges) == 18
    strongest = sorted((abs(mark.effect) for mark in wide.edges), reverse=True)[: len(narrow.edges)]
    assert sorted((abs(mark.effect) for mark in narrow.edges), reverse=True) == strongest
    assert f"{narrow.n_edges - len(narrow.edges)} weaker arrows are left out." in narrow.description
    with pytest.raises(
        MechsafetyError, match=r"^a role diagram of 30 x 230 mm with 12 pt text; expected at least \d+ mm"
    ):
        role_diagram(large, Style(width_mm=30, font_pt=12))
    with pytest.raises(MechsafetyError, match=r"^a role diagram of 85 x 40 mm with 7 pt text; .* a height for 8 boxes"):
        role_diagram(large, Style(width_mm=85, height_mm=40))


def test_side_arrows_end_at_their_boxes(circuit: RefusalCircuit) -> None:
    """Head and tail of each arrow lie on the rims of its boxes, slanted or not."""
    layout = role_diagram(circuit, Style(width_mm=85))
    boxes = {mark.key: mark for mark in layout.nodes}
    sides = 0
    for mark in layout.edges:
        commands = mark.shapes[0].commands
        for key, (x, y) in ((mark.receiver, commands[0][1][-2:]), (mark.sender, commands[-1][1][-2:])):
            box = boxes[key]
            reach_x, reach_y = abs(x - box.x) / box.width, abs(y - box.y) / box.height
            assert max(reach_x, reach_y) <= 0.5 + 1e-6
            assert reach_x >= 0.44 or reach_y == pytest.approx(0.5)
            sides += reach_x >= 0.44
    assert sides or len(circuit.edges) < 3


@pytest.mark.parametrize("points", [7.0, 10.0])
def test_pdf_text_has_the_size_that_was_asked_for(small: RefusalCircuit, points: float) -> None:
    layout = layout_circuit(small, Style(width_mm=178, font_pt=points))
    figure = layout_figure(layout)
    sizes = {text.get_text(): text.get_fontsize() for text in figure.axes[0].texts}
    names = [(mark, label) for mark in layout.nodes if mark.member for label in mark.labels]
    assert max(sizes[label.text] for _, label in names) == pytest.approx(points)
    # no text is wider than its room
    rooms = [label.box[2] - label.box[0] for label in layout.labels]
    rooms += [mark.width for mark in layout.nodes for _ in mark.labels]
    for text, room in zip(figure.axes[0].texts, rooms, strict=True):
        path = TextPath((0, 0), text.get_text(), size=text.get_fontsize() * 96 / 72, prop=text.get_fontproperties())
        assert path.get_extents().width <= room * 1.01, text.get_text()


def test_difference_tells_what_is_new_gone_and_changed(small: RefusalCircuit) -> None:
    fewer = replace(small, nodes=small.nodes[2:], edges=small.edges[3:])
    changed = replace(fewer.nodes[0], effect=fewer.nodes[0].effect + 0.3)
    comparison = compare_layouts(small, replace(fewer, nodes=(changed, *fewer.nodes[1:])), ("aligned", "base"))
    marks = {mark.key: mark for mark in comparison.difference.nodes}
    gone = marks[str(small.nodes[0].node)]
    assert gone.labels[0].text == f"({as_node(gone.key).short})" and gone.shapes[0].dashes
    assert "not in this circuit in base" in gone.title
    more = marks[str(changed.node)]
    same = marks[str(small.nodes[5].node)]
    assert not more.shapes[0].dashes and more.shapes[0].fill != same.shapes[0].fill
    assert "10 nodes in both, 2 only in aligned" in comparison.difference.description
    back = compare_layouts(fewer, small, ("base", "aligned")).difference
    assert next(m for m in back.nodes if m.key == gone.key).labels[0].text == f"[{as_node(gone.key).short}]"
    places = {mark.key: (mark.x, mark.y) for mark in comparison.difference.nodes}
    for layout in (comparison.first, comparison.second):
        assert all(places[mark.key] == (mark.x, mark.y) for mark in layout.nodes)


def test_compared_pages_are_inert(hostile: RefusalCircuit, small: RefusalCircuit) -> None:
    page = assert_inert(compare_html(hostile, small, ("a<b>", "c")), scripts=2)
    assert page.tags.count("svg") == 4  # three pictures and a legend


def test_layouts_of_every_kind_can_be_written(small: RefusalCircuit, tmp_path: Path) -> None:
    other = replace(small, nodes=small.nodes[:-2])
    for layout in (role_diagram(small, Style(grayscale=True)), compare_layouts(small, other, ("a", "b")).difference):
        ElementTree.fromstring(layout_svg(layout))
        assert layout_tikz(layout).isascii() and layout_pdf(layout, tmp_path / "a.pdf").stat().st_size > 5000


def test_hostile_names_reach_svg_as_text(hostile: RefusalCircuit) -> None:
    root = ElementTree.fromstring(circuit_svg(hostile))
    assert "</script><img src=x onerror=alert(1)> & % _ \\" in root.find(f"{SVG}title").text
    assert html.escape("</script>") in circuit_svg(hostile)


def test_import_is_light() -> None:
    code = (
        "import sys, mechsafety.viz;"
        "bad = {'plotly', 'matplotlib', 'circuitsvis', 'jinja2', 'torch'} & set(sys.modules); sys.exit(bool(bad))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
