"""Reports, notebooks, several figures on a page, CircuitsVis' views and the widget in Chromium without network."""

import json
import re
from dataclasses import replace
from pathlib import Path

import circuits_drawn as drawn
import nbconvert
import nbformat
import numpy as np
import pytest
from axe import axe_script, serious_violations
from chromium import browser, show
from notebook_pages import PLOTLY, notebook_page

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.robustness import Entanglement, FragilityCurve, Redundancy, RefusalDepth, RobustnessReport
from mechsafety.viz import (
    attention_html,
    circuit_fragment,
    circuit_html,
    circuit_svg,
    circuit_widget,
    compare_html,
    figures_page,
    mimebundle,
    neurons_html,
    render_report,
    tokens_html,
)
from mechsafety.viz.cards import Ablation
from mechsafety.viz.robustness_page import render_robustness

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "docs" / "gallery" / "demo.json"


@pytest.fixture(scope="module")
def small():
    return drawn.small_circuit()


@pytest.fixture(scope="module")
def hostile():
    return drawn.small_circuit(drawn.HOSTILE)


def test_two_figures_on_one_page_do_not_clash(show, small) -> None:
    other = drawn.neuron_circuit()
    page = show(
        f"<!DOCTYPE html><title>two</title>{circuit_fragment(small)}{circuit_fragment(other)}", height=2200
    ).page
    first, second = page.frames[1:]
    for frame in (first, second):
        frame.wait_for_selector("#nodeCount:has-text('nodes shown')")
    first.eval_on_selector("#nodeSlider", "el => { el.value = 190; el.dispatchEvent(new Event('input')); }")
    first.click('[data-fold="evaluation"]')
    assert first.inner_text("#nodeCount") != "12 of 12 nodes shown"
    assert second.inner_text("#nodeCount") == "16 of 16 nodes shown"
    assert second.locator(".edge.summed").count() == 0


def test_wheel_scrolls_the_outer_page_until_the_picture_is_clicked(show, small) -> None:
    page = show(f"<!DOCTYPE html><title>long</title>{circuit_fragment(small)}<div style='height:3000px'></div>").page
    frame = page.frames[1]
    frame.wait_for_selector("#hint:has-text('click the picture')")
    before = frame.get_attribute(".pane svg", "viewBox")
    page.mouse.move(300, 300)
    page.mouse.wheel(0, 200)
    page.wait_for_function("window.scrollY > 0")
    assert frame.get_attribute(".pane svg", "viewBox") == before


def notebook(bundles: list[dict[str, str]]) -> str:
    """The page that nbconvert makes of a notebook with these outputs."""
    cells = []
    for bundle in bundles:
        cell = nbformat.v4.new_code_cell("circuit")
        cell.outputs = [nbformat.v4.new_output("display_data", data=bundle)]
        cells.append(cell)
    text = nbformat.writes(nbformat.v4.new_notebook(cells=cells))
    exporter = nbconvert.HTMLExporter(template_name="basic")
    return exporter.from_notebook_node(nbformat.reads(text, 4))[0]


def test_the_mimebundle_survives_nbconvert(show, small) -> None:
    body = notebook([mimebundle(small), mimebundle(drawn.neuron_circuit())])
    page = show(f"<!DOCTYPE html><meta charset='utf-8'><title>notebook</title>{body}", height=2600).page
    assert len(page.frames) == 3
    for frame, total in zip(page.frames[1:], (12, 16), strict=True):
        frame.wait_for_selector(f"#nodeCount:has-text('{total} of {total} nodes shown')")


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_stored_notebook_opens_as_a_page_with_its_charts(show, path) -> None:
    page = show(notebook_page(path)).page
    kept = [output.get("data", {}) for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]
    page.wait_for_function("window.Plotly || !document.querySelector('.plotly-graph-div')")
    charts = page.locator(".js-plotly-plot svg.main-svg:first-child")
    assert charts.count() == sum(PLOTLY in data for data in kept)
    assert "is not able to be represented" not in page.content()
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 1280, "nothing sticks out"


def test_the_map_in_the_notebook_of_maps_is_alive(show) -> None:
    """A click on a node shows its card; the slider hides weak nodes."""
    (path,) = (ROOT / "notebooks").glob("07_*.ipynb")
    circuit = RefusalCircuit.builtin()
    page = show(notebook_page(path)).page
    picture = page.locator("iframe[srcdoc]")
    assert picture.count() == 1
    picture.scroll_into_view_if_needed()
    frame = picture.element_handle().content_frame()
    frame.wait_for_selector(f"#nodeCount:has-text('{len(circuit)} of {len(circuit)} nodes shown')")
    frame.click("#fit")  # the whole picture
    frame.locator('.node[data-node="L14.H2"]').click()
    frame.wait_for_selector("#card:has-text('L14.H2')")
    frame.eval_on_selector("#nodeSlider", "el => { el.value = 190; el.dispatchEvent(new Event('input')); }")
    assert frame.inner_text("#nodeCount") != f"{len(circuit)} of {len(circuit)} nodes shown"


def test_report_opens_whole(show, hostile) -> None:
    page = show(render_report(hostile)).page
    assert page.locator("img").count() == 0
    assert page.locator(".chart.wide svg:visible").count() == 3 and page.locator(".chart.narrow:visible").count() == 0
    page.locator("#attention").scroll_into_view_if_needed()
    page.locator(".attention-figure [class]").first.wait_for()
    assert page.locator(".attention-figure select:not([aria-label])").count() == 0
    shown = page.inner_text("#attention")
    assert "<img src=x onerror=alert(1)>" in shown and "&lt;" not in shown
    ids = page.eval_on_selector_all("nav a", "all => all.map(el => el.getAttribute('href').slice(1))")
    assert len(ids) > 8 and all(page.locator(f"#{name}").count() == 1 for name in ids)


WIDTHS = (1280, 820, 390)
SCHEMES = ("light", "dark")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["demo", "hostile"])
def test_report_is_accessible(show, hostile, kind: str, width: int, scheme: str) -> None:
    script = axe_script()
    circuit = RefusalCircuit.load(DEMO) if kind == "demo" else hostile
    page = show(render_report(circuit), width=width, height=800, color_scheme=scheme).page
    page.eval_on_selector("iframe", "frame => { frame.loading = 'eager'; }")
    page.frames[1].wait_for_selector("#nodeCount:has-text('nodes shown')")
    if kind == "hostile":
        page.locator(".attention-figure select[aria-label]").first.wait_for()
    assert serious_violations(page, script) == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_report_fits_the_window(show, width: int, scheme: str) -> None:
    """Nothing scrolls sideways but tables in their own boxes, all is dark on a dark system, all labels can be read."""
    page = show(render_report(RefusalCircuit.load(DEMO)), width=width, height=800, color_scheme=scheme).page
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("iframe").bounding_box()["height"] <= 800
    page.locator("iframe").scroll_into_view_if_needed()
    frame = page.frames[1]
    frame.wait_for_selector("#nodeCount:has-text('nodes shown')")
    paper = "getComputedStyle(document.body).backgroundColor"
    assert {page.evaluate(paper), frame.evaluate(paper)} == {
        "light": {"rgb(255, 255, 255)"}, "dark": {"rgb(20, 24, 29)"}
    }[scheme]  # fmt: skip
    sizes = """selector => [...document.querySelectorAll(selector)]
        .filter(el => el.checkVisibility() && !el.closest('.gone'))
        .map(el => parseFloat(getComputedStyle(el).fontSize) * el.ownerSVGElement.getScreenCTM().a)"""
    for found in (page.evaluate(sizes, ".chart text, .diagram text"), frame.evaluate(sizes, ".pane svg text")):
        assert len(found) > 20 and min(found) > 10.9


def test_first_screen_tells_the_story(show) -> None:
    page = show(render_report(RefusalCircuit.load(DEMO)), width=1280, height=800).page
    for selector in ("h1", ".lead .verdict", ".finding", ".flow li:last-child", ".card:last-child", "#contents"):
        box = page.locator(selector).first.bounding_box()
        assert box["y"] + box["height"] <= 800, selector
    shown = page.eval_on_selector_all(
        ".card", "all => all.map(el => [el.className, getComputedStyle(el.querySelector('.value')).fontSize])"
    )
    assert {size for name, size in shown if name == "card"} == {"25px"}
    assert {size for name, size in shown if name != "card"} == {"16px"}


def test_report_is_reached_by_the_keyboard(show, small) -> None:
    page = show(render_report(small), width=1280, height=800).page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the details"
    assert page.locator(".skip").first.bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    assert page.url.endswith("#details")
    scrolling = page.eval_on_selector_all(
        ".box", "all => all.filter(el => el.scrollWidth > el.clientWidth + 1 || el.scrollHeight > el.clientHeight + 1)"
        ".map(el => el.tabIndex)"
    )  # fmt: skip
    assert scrolling and set(scrolling) == {0}


def hostile_robustness():
    """A report on robustness of stored measurements, of a model with a hostile name."""
    steps = ROOT / "docs" / "results" / "robustness" / "steps"
    curve = FragilityCurve.load(steps / "curve heads")
    shared, needs = Redundancy.load(steps / "redundancy"), Entanglement.load(steps / "entanglement")
    origin = replace(curve.provenance, model=drawn.ATTACK)
    return RobustnessReport(origin, True, 300, curve, shared, needs, RefusalDepth.load(steps / "depth"))


def views():
    """Every view of the package with hostile texts as tokens, as the model's name and as prompts."""
    attack = drawn.small_circuit(drawn.ATTACK, model=drawn.ATTACK)
    tokens = [drawn.ATTACK, " a", "javascript:alert(7)"]
    heads = attack.details.attention
    plain = "<!DOCTYPE html><meta charset='utf-8'><title>around</title>"
    return {
        "circuit": lambda: circuit_html(attack, ablate=True),
        "comparison": lambda: compare_html(attack, drawn.small_circuit(), (drawn.ATTACK, "other")),
        "report": lambda: render_report(attack),
        "fragment": lambda: plain + circuit_fragment(attack),
        "notebook": lambda: plain + notebook([mimebundle(attack)]),
        "svg": lambda: plain + circuit_svg(attack),
        "attention": lambda: plain + attention_html(heads, view="patterns"),
        "attention heads": lambda: plain + attention_html(heads, view="heads"),
        "figures": lambda: figures_page(
            drawn.ATTACK,
            tokens_html(tokens, [0.5, -0.5, 0.1], title=drawn.ATTACK, script=False),
            neurons_html([(tokens, np.ones((3, 1, 2)))], layers=[3], neurons=[drawn.ATTACK, "N2"], script=False),
        ),
        "robustness": lambda: render_robustness(hostile_robustness()),
    }


@pytest.mark.parametrize("name", [*views()])
def test_hostile_tokens_run_nothing_in_any_view(show, name) -> None:
    """No script, no request, no dialog (`show` says which), no element made of a text, and no script refused by the
    policy that was the page's own. Everything that can be hovered is hovered, in frames too."""
    opened = show(views()[name]())
    page = opened.page
    page.wait_for_timeout(300)
    for frame in page.frames:
        for selector in (".node[data-role]", ".edge", "[data-view] span", "select"):
            for place in range(min(4, frame.locator(selector).count())):
                frame.locator(selector).nth(place).dispatch_event("pointerenter")
                frame.locator(selector).nth(place).dispatch_event("click")
        found = frame.evaluate("""() => [
            document.querySelectorAll('img, base, link, object, embed, [onerror], [onload]').length,
            document.querySelectorAll('a[href^="javascript"]').length,
            [...document.scripts].filter(one => one.textContent.startsWith('alert')).length,
            [...document.querySelectorAll('iframe')].filter(one => !one.srcdoc).length,
        ]""")
        assert found == [0, 0, 0, 0], frame.url
    assert "<script>alert(1)" in "".join(
        frame.evaluate("document.documentElement.textContent") for frame in page.frames
    )


def test_a_script_that_is_not_the_pages_own_does_not_run(show) -> None:
    """What the policy is for: a page into which somebody has put a script, an image or a frame of another site."""
    for text in (circuit_html(drawn.small_circuit()), render_report(drawn.small_circuit())):
        opened = show(
            text.replace("</body>", "<script>document.title='taken'</script><img src=x onerror='alert(1)'></body>")
        )
        assert opened.page.title() != "taken"
        refused, opened.errors = opened.errors, []
        assert any("Content Security Policy" in one for one in refused)
        opened.requests = []


def test_report_tables_sort_and_download(show, hostile, tmp_path: Path) -> None:
    page = show(render_report(hostile)).page
    column = "#nodes td:nth-child(3)"
    page.click("#nodes th:nth-child(3) button")
    effects = page.eval_on_selector_all(column, "all => all.map(el => Number(el.dataset.sort))")
    assert effects == sorted(effects, reverse=True)
    page.click("#nodes th:nth-child(3) button")
    assert page.eval_on_selector_all(column, "all => all.map(el => Number(el.dataset.sort))") == effects[::-1]
    with page.expect_download() as waiting:
        page.click("a[download='edges.csv']")
    waiting.value.save_as(tmp_path / "edges.csv")
    assert len((tmp_path / "edges.csv").read_text().splitlines()) == len(hostile.edges) + 1


def test_circuitsvis_views_draw_tokens_as_text(show, small) -> None:
    tokens = [drawn.HOSTILE[:44], " a", "b<i>c</i>"]
    page = show(
        figures_page(
            "views",
            attention_html(small.details.attention, view="heads", script=False),
            tokens_html(tokens, [0.5, -0.5, 0.1], title="coloured", script=False),
            neurons_html([(tokens, np.ones((3, 1, 2)))], layers=[3], neurons=["N1", "N2"], script=False),
        )
    ).page
    figures = page.locator("figure")
    assert figures.count() == 4 and page.locator("img").count() == 0
    for place in range(4):
        page.wait_for_function(f"document.querySelectorAll('figure')[{place}].innerText.length > 3")
    for place in (2, 3):
        text = figures.nth(place).inner_text()
        assert "b<i>c</i>" in text and "<img·src=x" in text and "&lt;" not in text, text
    assert page.locator("figure i").count() == 0


def test_widget_reports_selection_and_reruns(show, small) -> None:
    pytest.importorskip("anywidget")
    asked = []

    def on_ablate(nodes):
        asked.append(nodes)
        return Ablation("without", nodes, (3.0, 1.0), {small.nodes[4].node: 0.01})

    widget = circuit_widget(small, on_ablate=on_ablate)
    traits = {name: getattr(widget, name) for name in ("page", "height", "ablation", "selected", "ablated", "message")}
    module = re.sub(r"export default \{ render \};", "", widget._esm)
    data = json.dumps(traits).replace("</", "<\\/")
    host = f"""<!DOCTYPE html><meta charset="utf-8"><title>widget</title><div id="el"></div><script>
    const state = {data}, handlers = {{}};
    const model = {{ get: (k) => state[k], set: (k, v) => {{ state[k] = v; }}, save_changes: () => {{}},
      on: (name, f) => {{ handlers[name] = f; }} }};
    window.state = state; window.send = (k, v) => {{ state[k] = v; handlers["change:" + k](); }};
    {module}
    render({{ model, el: document.getElementById("el") }});</script>"""
    page = show(host).page
    frame = page.frames[1]
    key = str(small.nodes[0].node)
    frame.wait_for_selector(f'.node[data-node="{key}"]')
    frame.locator(f'.node[data-node="{key}"]').click()
    page.wait_for_function(f"window.state.selected === '{key}'")
    frame.check(f'[data-ablate="{key}"]')
    page.wait_for_function("window.state.ablated.length === 1")
    # what the kernel would do with the trait, and back
    widget.ablated = page.evaluate("window.state.ablated")
    assert asked == [(small.nodes[0].node,)]
    page.evaluate("value => window.send('ablation', value)", dict(widget.ablation))
    frame.wait_for_selector("#ablationText:has-text('metric 3.00 before, 1.00 after')")
    assert "ablated" in frame.get_attribute(f'.node[data-node="{key}"]', "class")
    frame.uncheck(f'[data-ablate="{key}"]')
    page.wait_for_function("window.state.ablated.length === 0")
    widget.ablated = []
    page.evaluate("value => window.send('ablation', value)", dict(widget.ablation))
    frame.wait_for_selector(".ablated", state="detached")  # the page's policy forbids to evaluate text
