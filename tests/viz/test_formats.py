"""SVG, PDF, TikZ and HTML: same bytes, well-formed, escaped, no network."""

import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import HOSTILE

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.errors import MechsafetyError
from mechsafety.viz import circuit_fragment, circuit_html, circuit_pdf, circuit_svg, circuit_tikz, mimebundle
from mechsafety.viz.html import safe_json
from mechsafety.viz.layout import layout_circuit
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
    assert len(groups) - len(nodes) == min(60, len(circuit.edges))
    assert not [el.tag for el in root.iter() if el.tag in (f"{SVG}image", f"{SVG}script", f"{SVG}use", f"{SVG}style")]


def test_svg_reaches_nothing_outside(circuit: RefusalCircuit) -> None:
    text = circuit_svg(circuit).replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|href=|url\(|@import|src=[\"']", text)


def test_svg_caption_has_the_numbers(small: RefusalCircuit) -> None:
    text = circuit_svg(small)
    for part in ("12 of 300 candidate nodes", "Held-out faithfulness 0.89", "[0.84, 0.93]", "p\xa0=\xa00.005"):
        assert part in text
    assert "refusal_log_odds" in text


def test_html_is_inert_whatever_the_model_is_called(hostile: RefusalCircuit) -> None:
    page = assert_inert(circuit_html(hostile), scripts=2)
    assert "<img src=x onerror=alert(1)>" in page.text
    assert "default-src 'none'" in circuit_html(hostile)
    data = json.loads(page.scripts[0])
    assert set(data["nodes"]) == {str(member.node) for member in hostile.nodes}


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


def test_pdf_is_vector_and_the_same_twice(circuit: RefusalCircuit, tmp_path: Path) -> None:
    first, second = (circuit_pdf(circuit, tmp_path / f"{name}.pdf").read_bytes() for name in "ab")
    assert first == second and first.startswith(b"%PDF")
    assert b"/Subtype /Image" not in first and b"CreationDate" not in first and b"FontFile2" in first


def test_pdf_leaves_matplotlib_as_it_was(small: RefusalCircuit, tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    circuit_pdf(small, tmp_path / "a.pdf")
    assert dict(matplotlib.rcParams) == before
    with pytest.raises(MechsafetyError, match=r"no such folder: .*; expected an existing folder"):
        circuit_pdf(small, tmp_path / "none" / "a.pdf")


def test_tikz_is_balanced_plain_ascii_with_every_node(circuit: RefusalCircuit) -> None:
    text = circuit_tikz(circuit)
    assert text.isascii() and text.count(r"\begin{") == text.count(r"\end{") == 2
    bare = re.sub(r"\\[{}\\]", "", text)
    assert bare.count("{") == bare.count("}")
    colours = set(re.findall(r"definecolor\{(\w+)\}", text))
    assert set(re.findall(r"(?:fill|draw|text)=(\w+)", text)) <= colours
    nodes = [mark for mark in layout_circuit(circuit).nodes if mark.node.kind == "head"]
    assert all(f"{{{mark.label.text}}};" in text for mark in nodes)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("50 % & a_b #1", r"50 \% \& a\_b \#1"),
        ("\\x^2~{$}", r"\textbackslash{}x\textasciicircum{}2\textasciitilde{}\{\$\}"),
        ("é ﬁ 漢", "e fi ?"),
        ("\u2212<", r"\ensuremath{-}\textless{}"),
    ],
)
def test_tex_escapes(given: str, expected: str) -> None:
    assert tex(given) == expected


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
