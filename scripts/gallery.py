"""Pictures for the README and the docs: every kind of figure, as SVG and as a small PNG.

python scripts/gallery.py [CIRCUIT.json ...] [--out docs/gallery]

The maps of the demo model (docs/gallery/demo.json) and of a model that nobody here trained (its study's map by nodes),
or those given as arguments in their place, are drawn by role, by part and as role diagram. They are also drawn for the
column and the page of a paper, in colours and in greys. A test-bed model whose circuit is known is mapped here and
drawn. The other pictures are of synthetic circuits (circuits_drawn.py), whose numbers mean nothing. With a Chromium,
the interactive page and the charts of docs/questions.md are photographed too.
"""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuits_drawn import build, large_circuit, neuron_circuit, small_circuit
from pages.gallery import PAGE
from pages.native_model import CIRCUITS
from pages.page import RESULTS, WIDTH
from pages.render import publish

import mechsafety as ms
from mechsafety import testbed
from mechsafety.circuits.circuit import Node, RefusalCircuit
from mechsafety.viz import (
    Style,
    circuit_html,
    compare_html,
    compare_layouts,
    layout_circuit,
    layout_png,
    layout_svg,
    role_diagram,
)
from mechsafety.viz.marks import Layout

if TYPE_CHECKING:
    import plotly.graph_objects as go

LARGE = 600_000  # bytes of a PNG
PAPER_DPI = 170  # of a PNG with a width on paper
DEMO = PAGE.folder / "demo.json"
NATIVE = RESULTS / CIRCUITS.format("native", "node")
# a paper in German, in a serif font
OWN = Style(
    role_names={
        "detection": "Erkennung",
        "evaluation": "Bewertung",
        "relay": "Weitergabe",
        "decision": "Entscheidung",
        "production": "Ausgabe",
        "none": "ohne Rolle",
    },
    labels={"embed": "Eingabe", "logits": "Antwort"},
    font="serif",
    colours={"detection": "#4B6BB3", "decision": "#A8336B"},
)
NO_CAPTION = Style(caption=False)
NOTE = "Synthetic: drawn to show the figure; its numbers mean nothing."


def pictures(paths: list[Path]) -> Iterator[tuple[str, str, Layout, float | None]]:
    """Name, what it shows, layout and width on paper of every picture."""
    for path in paths:
        circuit = RefusalCircuit.load(path)
        name = re.sub(r"\W+", "-", circuit.provenance.model.lower()).strip("-")[:40]
        model = circuit.provenance.model
        yield f"{name}-roles", f"{model}: lanes by role", layout_circuit(circuit), None
        yield f"{name}-parts", f"{model}: lanes by part", layout_circuit(circuit, Style(columns="part")), None
        folded = Style(fold=("detection",), caption=False)
        yield f"{name}-folded", f"{model}: detection heads folded", layout_circuit(circuit, folded), None
        yield f"{name}-diagram", f"{model}: role diagram, made from the circuit", role_diagram(circuit), None
        yield from on_paper(circuit, name, model)
        words = role_diagram(circuit, replace(OWN, width_mm=85))
        yield f"{name}-words", f"{model}: role diagram in a paper's own words, font and colours", words, 85
    for level in ("node", "neuron"):
        circuit = planted_circuit(level)
        text = f"A test-bed model with decoys and a backup, mapped by {level}s"
        yield f"planted-{level}s", f"{text}: what was planted, and no decoy", layout_circuit(circuit, NO_CAPTION), None
        yield from on_paper(circuit, f"planted-{level}s", text)
    small, large = small_circuit(), large_circuit()
    yield "small", f"Twelve nodes: slots, statuses, signs. {NOTE}", layout_circuit(small), None
    paper = Style(width_mm=85, font_pt=7, grayscale=True, caption=False)
    yield "paper-column", f"The same in greys for a column of 85 mm. {NOTE}", layout_circuit(small, paper), 85
    by_position = Style(columns="position", caption=False)
    yield "positions", f"Lanes by where in the prompt a node acts. {NOTE}", layout_circuit(small, by_position), None
    by_part = Style(columns="part", caption=False)
    yield "neurons", f"Single neurons beside heads and MLPs. {NOTE}", layout_circuit(neuron_circuit(), by_part), None
    yield (
        "large",
        f"200 nodes, the 60 strongest of 120 edges and the strongest of each node. {NOTE}",
        layout_circuit(large, NO_CAPTION),
        None,
    )
    comparison = compare_layouts(small, changed(), ("aligned", "base"), NO_CAPTION)
    yield "difference", f"Two circuits: what is new, gone, stronger. {NOTE}", comparison.difference, None


def on_paper(circuit: RefusalCircuit, name: str, of: str) -> Iterator[tuple[str, str, Layout, float | None]]:
    """The circuit and its role diagram for a column and a page, in colours and in greys."""
    for key, place, width in (("column", "a column of 85 mm", 85), ("page", "the width of a page, 178 mm", 178)):
        for grayscale in (False, True):
            style = Style(width_mm=width, grayscale=grayscale)
            tone, said = ("-grey", ", in greys") if grayscale else ("", "")
            yield f"{name}-{key}{tone}", f"{of}: fitted to {place}{said}", layout_circuit(circuit, style), width
            diagram = role_diagram(circuit, style)
            yield f"{name}-diagram-{key}{tone}", f"{of}: role diagram for {place}{said}", diagram, width


def planted_circuit(level: str) -> RefusalCircuit:
    """The map of a test-bed model; an error if it is not what was planted."""
    made = testbed.planted(seed=5, layers=4, heads=4, decoys=3, backups=1)
    model = ms.load_model((made.model, made.tokenizer))
    found = ms.map_refusal_circuit(model, made.pairs, options=ms.MapOptions(level=level, limit=12), progress=False)
    score = testbed.score(found, made.truth)
    assert score.found_nodes is not None and score.found_nodes.f1 == 1.0 and not score.decoys_found
    return found


def changed() -> RefusalCircuit:
    """The small circuit with two nodes fewer and two others."""
    nodes = [member.node for member in small_circuit().nodes[2:]]
    return build([*nodes, Node("head", 9, 1), Node("mlp", 15)], 14, seed=4)


def shrink(path: Path) -> None:
    """At most `WIDTH` wide; in true colours, unless that makes a large file."""
    from PIL import Image

    with Image.open(path) as image:
        height = round(image.height * min(1.0, WIDTH / image.width))
        small = image.convert("RGB").resize((min(WIDTH, image.width), height), Image.Resampling.LANCZOS)
    small.save(path, optimize=True)
    if path.stat().st_size > LARGE:
        # the median cut keeps the lanes' tints apart, which other palettes merge
        small.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(path, optimize=True)


def photographs(paths: list[Path], out: Path) -> Iterator[tuple[str, str]]:
    """Charts, and the interactive page: light, dark with a card open, comparing. Nothing without a browser."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("no Chromium: the interactive page is not photographed", file=sys.stderr)
        return
    from playwright.sync_api import sync_playwright

    first = RefusalCircuit.load(paths[0])
    strongest = max((m for m in first.nodes if m.node.kind == "head"), key=lambda member: abs(member.effect))
    small = small_circuit()
    dark = circuit_html(small, theme="dark")
    sides = compare_html(small, changed(), ("aligned", "base"), theme="light")
    shots = (
        ("page", "The interactive page, a node's paths and card", circuit_html(first, theme="light"), strongest.node),
        ("page-dark", f"A head's card with its attention, on a dark page. {NOTE}", dark, "L4.H3"),
        ("page-compare", f"Two circuits side by side. {NOTE}", sides, "both"),
    )
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for name, text, figure in charts():
            page = browser.new_page(viewport={"width": 1000, "height": 900}, device_scale_factor=1.25)
            page.set_content(figure.to_html(include_plotlyjs=True, config={"displayModeBar": False}))
            page.locator(".plotly-graph-div .main-svg").first.screenshot(path=out / f"{name}.png")
            shrink(out / f"{name}.png")
            yield name, text
        page = browser.new_page(viewport={"width": 960, "height": 700}, device_scale_factor=1.25)
        for name, text, html, action in shots:
            page.set_content(html)
            if action == "both":
                page.check("#views input[value='1']")
            elif action:
                page.fill("#search", str(action))
                page.press("#search", "Enter")  # goes to it and shows its paths
                page.fill("#search", "")
            page.screenshot(path=out / f"{name}.png")
            shrink(out / f"{name}.png")
            yield name, text
        browser.close()


def charts() -> Iterator[tuple[str, str, "go.Figure"]]:
    """The figures of docs/questions.md, from its own calls on its own model."""
    built = testbed.planted()
    model = ms.load_model((built.model, built.tokenizer))
    pairs = built.pairs.sample(8)
    metric = ms.RefusalLogOdds.detect(model, pairs)
    quiet: dict[str, Any] = {"progress": False}
    of = "A test-bed model whose circuit is known"
    one = ms.PromptPairs(pairs.pairs[:1])
    found = ms.activation_patching(model, one, metric, positions="each", **quiet)
    yield "question-positions", f"{of}: each node patched at each token", found.plot()
    at = ("instruction", "suffix")
    inside, after = (ms.activation_patching(model, pairs, metric, positions=span, **quiet) for span in at)
    both = ms.patching.compare_effects(inside, after, ("at the instruction", "at the suffix"))
    yield "question-compare", f"{of}: effects at the instruction and at the suffix", both.plot()
    seen = model.attention(pairs.harmful[0], ["L1.H0", "L3.H2"])
    yield "question-attention", f"{of}: what one head looks at", seen.plot("L1.H0")
    cards = ms.attribution.describe_nodes(model, ["L3.MLP", "L3.H2"], pairs)
    yield "question-promoted", f"{of}: tokens that an MLP promotes and suppresses", cards.plot()


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the gallery.")
    parser.add_argument("circuits", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=PAGE.folder)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    DEMO.write_text(RefusalCircuit.builtin().to_json(), encoding="utf-8", newline="\n")
    paths = options.circuits or [DEMO, NATIVE]
    listed = []
    for name, text, layout, width in pictures(paths):
        (options.out / f"{name}.svg").write_text(layout_svg(layout, width_mm=width), encoding="utf-8", newline="\n")
        dpi = max(110.0, 96 * WIDTH / layout.width) if width is None else PAPER_DPI
        layout_png(layout, options.out / f"{name}.png", dpi=dpi)
        shrink(options.out / f"{name}.png")
        listed.append({"name": name, "text": text, "svg": True})
    listed += [{"name": name, "text": text, "svg": False} for name, text in photographs(paths, options.out)]
    publish("gallery", {"pictures": listed}, options.out)


if __name__ == "__main__":
    main()
