"""The interactive page in Chromium without network: each control does what it says."""

import random
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from chromium import browser, show
from circuits_drawn import HOSTILE, build, large_circuit, small_circuit

from mechsafety.circuits.circuit import Node, RefusalCircuit
from mechsafety.viz import Ablation, Notes, Style, circuit_html, circuit_svg, circuit_tikz, compare_html, layout_circuit
from mechsafety.viz.svg import path_data

DEMO = Path(__file__).parents[2] / "docs" / "gallery" / "demo.json"
VISIBLE = ".node:not(.gone)"


@pytest.fixture(scope="module")
def small():
    return small_circuit()


@pytest.fixture(scope="module")
def large():
    return large_circuit()


def count(page, selector: str) -> int:
    return page.locator(selector).count()


def card(page) -> str:
    return page.inner_text("#card")


def node(page, key: str):
    return page.locator(f'.pane:not([hidden]) .node[data-node="{key}"]')


def numbers(path: str) -> np.ndarray:
    return np.array([float(part) for part in re.findall(r"-?[\d.]+", path)])


def view_box(page) -> list[float]:
    return [float(part) for part in page.get_attribute(".pane:not([hidden]) svg", "viewBox").split()]


def set_slider(page, name: str, value: int) -> None:
    page.eval_on_selector(f"#{name}", f"el => {{ el.value = {value}; el.dispatchEvent(new Event('input')); }}")


def check_compiles(drawing: str, folder: Path) -> None:
    """pdflatex, where there is one, takes a TikZ drawing."""
    if shutil.which("pdflatex"):
        page = "\\documentclass{article}\\usepackage{tikz}\\begin{document}\n" + drawing + "\\end{document}"
        (folder / "a.tex").write_text(page)
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "a.tex"]
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
        assert done.returncode == 0, done.stdout[-1500:].decode(errors="replace")


def of_300_nodes():
    rng = random.Random(2)
    every = [Node("head", layer, head) for layer in range(24) for head in range(16)] + [
        Node("mlp", k) for k in range(24)
    ]
    return build(rng.sample(every, 300), 200, n_layers=24, n_heads=16)


@pytest.mark.parametrize("circuit", [lambda: RefusalCircuit.load(DEMO), of_300_nodes], ids=["demo", "300"])
def test_a_page_is_small_and_a_click_touches_little(show, circuit) -> None:
    """What makes a page slow, counted: its bytes, its elements, what one click changes. Seconds are the machine's."""
    drawn = circuit()
    text = circuit_html(drawn)
    page, parts = show(text).page, len(drawn.nodes) + len(drawn.edges)
    assert count(page, ".node[data-role]") == len(drawn.nodes)
    assert len(text) < 60_000 + 800 * parts and count(page, "*") < 400 + 6 * parts
    changes = page.evaluate("""() => {
        const watcher = new MutationObserver(() => {});
        watcher.observe(document.body, {subtree: true, childList: true, attributes: true});
        document.querySelector('.node[data-role]').dispatchEvent(new MouseEvent('click', {bubbles: true}));
        return watcher.takeRecords().length;
    }""")
    assert 0 < changes < 2 * parts


def test_hovering_shows_a_card(show, small) -> None:
    page = show(circuit_html(small)).page
    member = next(member for member in small.nodes if member.ci)
    node(page, str(member.node)).hover()
    text = card(page)
    for part in (
        str(member.node),
        "95 % interval",
        "p, adjusted",
        member.role.replace("none", "no role"),
        "what the role rests on",
    ):
        assert part in text
    page.mouse.move(5, 5)
    assert "Nothing selected" in card(page)
    edge = page.locator(".edge:not(.gone)").last
    edge.dispatch_event("pointerenter")
    assert "slot" in card(page) and "→" in card(page)


def test_clicking_highlights_the_paths(show, small) -> None:
    page = show(circuit_html(small)).page
    member = small.edges[0]
    key = str(member.edge.sender)
    if key == "embed":
        key = str(member.edge.receiver)
    node(page, key).click()
    up, down = reach(small, key, forward=False), reach(small, key, forward=True)
    bright = set(
        page.eval_on_selector_all(".node:not(.dim):not([data-kind=group])", "all => all.map(el => el.dataset.node)")
    )
    assert bright == up | down | {key}
    assert f"{len(up)} nodes upstream, {len(down)} downstream" in card(page)
    page.keyboard.press("Escape")
    assert count(page, ".dim") == 0


def reach(circuit, key: str, *, forward: bool) -> set[str]:
    found, waiting = set(), [key]
    while waiting:
        at = waiting.pop()
        for member in circuit.edges:
            ends = (str(member.edge.sender), str(member.edge.receiver))
            start, end = ends if forward else ends[::-1]
            if start == at and end not in found:
                found.add(end)
                waiting.append(end)
    return found


def test_thresholds_hide_nodes_and_edges(show, large) -> None:
    page = show(circuit_html(large)).page
    assert page.inner_text("#edgeCount") == "60 of 120 edges shown"
    set_slider(page, "edgeSlider", 0)
    assert page.inner_text("#edgeCount") == "120 of 120 edges shown" and count(page, ".edge:not(.gone)") == 120
    set_slider(page, "nodeSlider", 100)
    limit = max(abs(member.effect) for member in large.nodes) / 4
    kept = sum(abs(member.effect) >= limit for member in large.nodes)
    assert page.inner_text("#nodeCount") == f"{kept} of 200 nodes shown"
    assert count(page, f"{VISIBLE}[data-role]") == kept
    hidden = set(page.eval_on_selector_all(".node.gone", "all => all.map(el => el.dataset.node)"))
    ends = page.eval_on_selector_all(".edge:not(.gone)", "all => all.flatMap(el => [el.dataset.from, el.dataset.to])")
    assert not hidden & set(ends)
    page.click("#reset")
    assert page.inner_text("#nodeCount") == "200 of 200 nodes shown"


def test_roles_can_be_hidden(show, large) -> None:
    page = show(circuit_html(large)).page
    page.uncheck("#roles input[value=decision]")
    assert count(page, f'{VISIBLE}[data-role="decision"]') == 0
    assert count(page, f"{VISIBLE}[data-role]") == 200 - len(large.by_role("decision"))


def test_groups_fold_and_unfold(show, large) -> None:
    page = show(circuit_html(large)).page
    group = node(page, "group:detection")
    assert not group.is_visible()
    page.click('[data-fold="detection"]')
    assert group.is_visible() and count(page, f'{VISIBLE}[data-role="detection"]') == 0
    summed = count(page, ".edge.summed")
    assert summed > 0
    ends = page.eval_on_selector_all(".edge.summed", "all => all.flatMap(el => [el.dataset.from, el.dataset.to])")
    assert ends.count("group:detection") == summed
    # the same curves as Python's own folded picture
    python = layout_circuit(large, Style(fold=("detection",), max_edges=None))
    set_slider(page, "edgeSlider", 0)
    drawn = page.eval_on_selector_all(
        ".edge.summed",
        """all => all.map(el => [el.querySelector('title').textContent, [...el.children].slice(1).map(
        p => ['d', 'fill', 'stroke', 'stroke-width', 'stroke-dasharray'].map(name => p.getAttribute(name)))])""",
    )
    paths = dict(drawn)
    folded = {mark.title: mark for mark in python.edges if "group:detection" in (mark.sender, mark.receiver)}
    assert paths.keys() == folded.keys() and len(drawn) == len(folded) > 0
    for title, mark in folded.items():
        assert paths[title][0][0] == path_data(mark.shapes[0].commands)
        # the marks too, which the page makes as large as the sum is strong
        for shape, (path, fill, stroke, width, dashes) in zip(mark.shapes, paths[title], strict=True):
            assert (shape.fill or "none", shape.stroke) == (fill, stroke)
            assert float(width) == pytest.approx(shape.width, abs=0.01)
            assert numbers(dashes or "") == pytest.approx(np.array(shape.dashes), abs=0.02)
            if shape is not mark.shapes[0]:
                values = np.array([value for _, part in shape.commands for value in part])
                assert np.abs(numbers(path) - values).max() < 0.11
    group.focus()
    page.keyboard.press("f")
    assert not group.is_visible() and count(page, ".edge.summed") == 0


def test_paths_go_through_folded_groups(show, small) -> None:
    page = show(circuit_html(small)).page
    set_slider(page, "edgeSlider", 0)
    role_of = {str(member.node): member.role for member in small.nodes}
    group = "evaluation"
    stands = {key: f"group:{group}" if role == group else key for key, role in role_of.items()}
    page.click(f'[data-fold="{group}"]')
    for key in ("embed", f"group:{group}"):
        reached = {key}
        for forward in (True, False):
            seen, waiting = {key}, [key]
            while waiting:
                at = waiting.pop()
                for member in small.edges:
                    ends = [stands.get(str(n), str(n)) for n in (member.edge.sender, member.edge.receiver)]
                    start, end = ends if forward else ends[::-1]
                    if start == at and end not in seen:
                        seen.add(end)
                        waiting.append(end)
            reached |= seen
        page.evaluate(
            f"""document.querySelector('.node[data-node="{key}"]')
            .dispatchEvent(new MouseEvent('click', {{bubbles: true}}))"""
        )
        bright = page.eval_on_selector_all(".node:not(.dim):not(.gone)", "all => all.map(el => el.dataset.node)")
        assert set(bright) == reached
        assert f"group:{group}" in reached and len(reached) > 3
        sums = page.eval_on_selector_all(
            ".edge.summed", "all => all.map(el => [el.dataset.from, el.dataset.to, el.classList.contains('dim')])"
        )
        assert sums and all(dim == ((a not in reached) or (b not in reached)) for a, b, dim in sums)
        page.keyboard.press("Escape")
        assert count(page, ".dim") == 0


def test_folded_sums_hold_weak_edges_too(show, large) -> None:
    page = show(circuit_html(large)).page
    page.click('[data-fold="detection"]')
    hidden = {str(member.node) for member in large.by_role("detection")}
    sums: dict[tuple[str, ...], list[float]] = {}
    for member in large.edges:
        ends = [str(node) for node in (member.edge.sender, member.edge.receiver)]
        if len(hidden & set(ends)) == 1:
            key = tuple("group:detection" if end in hidden else end for end in ends)
            sums.setdefault((*key, member.edge.slot), []).append(member.effect)
    threshold = sorted((abs(member.effect) for member in large.edges), reverse=True)[59]
    expected = {key: values for key, values in sums.items() if abs(sum(values)) >= threshold * 0.9999}
    titles = page.eval_on_selector_all(".edge.summed title", "all => all.map(el => el.textContent)")
    assert len(titles) == len(expected)
    for (start, end, slot), values in expected.items():
        many = f"{len(values)} edges, effects sum to" if len(values) > 1 else "1 edge, effect"
        total = f"{sum(values):.3f}".replace("-", "\u2212")
        assert f"{start} to {end}, slot {slot}: {many} {total}" in titles


def test_pins_keep_cards(show, small) -> None:
    page = show(circuit_html(small)).page
    first, second = (str(member.node) for member in small.nodes[:2])
    node(page, first).click()
    page.click("#card [data-pin]")
    node(page, second).focus()
    page.keyboard.press("p")
    assert first in page.inner_text("#pins") and second in page.inner_text("#pins")
    page.click(f'#pins [data-pin="{first}"]')
    assert first not in page.inner_text("#pins")
    assert count(page, ".node.pinned") == 1


def test_search_marks_and_goes_to_what_it_finds(show, small) -> None:
    notes = {small.nodes[3].node: Notes(promotes=(" Sorry",))}
    page = show(circuit_html(small, notes=notes)).page
    page.keyboard.press("/")
    page.keyboard.type("12.8")
    assert page.inner_text("#found") == "1 found" and count(page, ".node.hit") == 1
    page.keyboard.press("Enter")
    assert "L12.H8" in card(page)
    box = node(page, "L12.H8").bounding_box()
    stage = page.locator("#stage").bounding_box()
    assert abs(box["x"] + box["width"] / 2 - stage["x"] - stage["width"] / 2) < 3
    page.fill("#search", "sorry")
    assert page.eval_on_selector_all(".node.hit", "all => all.map(el => el.dataset.node)") == [str(small.nodes[3].node)]
    page.fill("#search", "nothing like it")
    assert page.inner_text("#found") == "0 found"


def test_wheel_zooms_and_drag_pans(show, small) -> None:
    page = show(circuit_html(small)).page
    before = view_box(page)
    page.mouse.move(400, 300)
    page.mouse.wheel(0, -400)
    for _ in range(2400):  # two minutes; the page's policy forbids what wait_for_function does
        if page.evaluate("document.querySelector('.pane svg').viewBox.baseVal.width") < before[2] - 1:
            break
        page.wait_for_timeout(50)
    assert page.evaluate("document.querySelector('.pane svg').viewBox.baseVal.width") < before[2] - 1
    zoomed = view_box(page)
    page.mouse.down()
    page.mouse.move(460, 300, steps=4)
    page.mouse.up()
    panned = view_box(page)
    assert panned[0] < zoomed[0] and panned[2] == zoomed[2]
    page.click("#fit")
    assert view_box(page)[:2] == [0, 0]


def test_keys_reach_everything(show, small) -> None:
    page = show(circuit_html(small)).page
    strongest = max(
        (m for m in small.edges if str(m.edge.sender) != "embed" and str(m.edge.receiver) != "logits"),
        key=lambda m: abs(m.effect),
    )
    sender = str(strongest.edge.sender)
    outgoing = [m for m in small.edges if str(m.edge.sender) == sender]
    target = str(max(outgoing, key=lambda m: abs(m.effect)).edge.receiver)
    node(page, sender).focus()
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.dataset.node") == target
    page.keyboard.press("Enter")
    assert "upstream" in card(page)
    page.keyboard.press("Escape")
    before = view_box(page)
    page.keyboard.press("+")
    page.keyboard.press("Shift+ArrowRight")
    after = view_box(page)
    assert after[2] < before[2] and after[0] > before[0]
    page.keyboard.press("?")
    assert "along its strongest edge" in page.inner_text("#dialog")


def test_the_picture_is_one_stop_of_the_tab_key(show, small) -> None:
    page = show(circuit_html(small)).page
    assert count(page, ".pane [tabindex='0']") == 0
    page.focus("#stage")
    page.keyboard.press("ArrowUp")
    strongest = max(small.nodes, key=lambda m: abs(m.effect))
    assert page.evaluate("document.activeElement.dataset.node") == str(strongest.node)
    assert str(strongest.node) in card(page)
    page.keyboard.press("ArrowDown")
    there = page.evaluate("document.activeElement.dataset.node")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "stage"
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.dataset.node") == there
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "in"


def test_two_fingers_zoom(show, large) -> None:
    page = show(circuit_html(large), width=390, height=800, has_touch=True).page
    before = view_box(page)
    driver = page.context.new_cdp_session(page)

    def touch(kind: str, *places: tuple[float, float]) -> None:
        points = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(places)]
        driver.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    page.focus("#stage")
    middle = page.locator("#stage").bounding_box()["y"] + 150
    touch("touchStart", (150, middle), (210, middle))
    for step in range(1, 6):
        touch("touchMove", (150 - 10 * step, middle), (210 + 10 * step, middle))
    touch("touchEnd")
    after = view_box(page)
    assert after[2] < 0.6 * before[2]
    assert before[0] < after[0] and after[0] + after[2] < before[0] + before[2]
    assert count(page, ".picked") == 0


def test_dark_mode_follows_the_system_and_the_button(show, small) -> None:
    page = show(circuit_html(small), color_scheme="dark").page
    background = "getComputedStyle(document.querySelector('.paper')).fill"
    assert page.evaluate(background) == "rgb(20, 24, 29)"
    page.click("#theme")
    assert page.evaluate(background) == "rgb(255, 255, 255)"
    page.emulate_media(media="print")
    page.keyboard.press("Escape")
    assert page.evaluate("getComputedStyle(document.querySelector('aside')).display") == "none"
    assert (
        show(circuit_html(small, theme="light"), color_scheme="dark").page.evaluate(background) == "rgb(255, 255, 255)"
    )


def test_dark_text_can_be_read(show, small) -> None:
    page = show(circuit_html(small, theme="dark")).page
    fills = page.eval_on_selector_all(".backdrop text", "all => all.map(el => getComputedStyle(el).fill)")
    assert fills and all(min(int(part) for part in re.findall(r"\d+", fill)) > 120 for fill in fills)


def test_saved_svg_is_what_is_shown(show, large, tmp_path: Path) -> None:
    page = show(circuit_html(large)).page
    page.uncheck("#roles input[value=production]")
    with page.expect_download() as waiting:
        page.click("#saveSvg")
    waiting.value.save_as(tmp_path / "circuit.svg")
    root = ElementTree.parse(tmp_path / "circuit.svg").getroot()
    nodes = [el for el in root.iter() if el.get("data-role")]
    assert len(nodes) == 200 - len(large.by_role("production"))
    assert not [el for el in root.iter() if el.get("tabindex") or el.get("class") == "gone"]
    assert not any(el.get("data-role") == "production" for el in nodes)


def test_copied_tikz_compiles(show, tmp_path: Path) -> None:
    circuit = small_circuit(model=HOSTILE)
    page = show(circuit_html(circuit)).page
    page.click("#copyTikz")
    # unfolded, it is Python's own, path by path, and text by text but for the digits of their sizes
    for kind in (r"\\path\[fill.*", r"\\node\[.*"):
        shown, python = (
            {re.sub(r"fontsize\{\S*\}", "", line) for line in re.findall(kind, text)}
            for text in (page.input_value("#dialogArea"), circuit_tikz(circuit))
        )
        assert shown == python and len(shown) > 30
    page.click("#dialog button")
    page.click('[data-fold="evaluation"]')
    page.click("#copyTikz")
    text = page.input_value("#dialogArea")
    assert "15~of~16~edges~drawn" in text
    assert text.startswith("\\begingroup") and text.isascii() and "tikzpicture" in page.inner_text("#dialog") + text
    check_compiles(text, tmp_path)


def test_attention_opens_over_the_prompt(show, small) -> None:
    page = show(circuit_html(small)).page
    example = small.details.attention[0]
    head = str(example.heads[1])
    node(page, head).click()
    assert count(page, "#card canvas") == 1
    shown = page.eval_on_selector_all("#card .looks span", "all => all.map(el => el.textContent)")
    assert shown[:4] == ["<|im_start|>", "user", "⏎", "How"]
    row = np.asarray(example.patterns)[1, 7]
    best = int(row.argmax())
    page.locator("#card .looks span").nth(6).hover()
    page.locator("#card .looks span").nth(7).hover()
    assert page.inner_text("#card .small") == f"{shown[7]} looks at {shown[best]}: {row[best]:.2f}"
    page.select_option("#card select", "1")
    assert "melon" in page.inner_text("#card select option:checked")


def test_heads_without_attention_say_so(show, small) -> None:
    page = show(circuit_html(small)).page
    recorded = {str(head) for head in small.details.attention[0].heads}
    other = next(str(m.node) for m in small.nodes if m.node.kind == "head" and str(m.node) not in recorded)
    mlp = next(str(m.node) for m in small.nodes if m.node.kind == "mlp")
    for key, said in ((other, True), (next(iter(recorded)), False), (mlp, False)):
        node(page, key).dispatch_event("pointerenter")
        assert ("attention not recorded for this head" in card(page)) is said


def test_notes_show_tokens_spans_and_activations(show, small) -> None:
    member = small.nodes[0].node
    notes = {member: Notes((" Sorry", HOSTILE), ("Sure",), {"instruction": 0.31}, (((" kill", "x"), (0.5, -0.1)),))}
    page = show(circuit_html(small, notes=notes)).page
    node(page, str(member)).hover()
    text = card(page)
    for part in ("raises these tokens", "·Sorry", "lowers these tokens", "0.31", "activation over text", "·kill"):
        assert part in text
    assert count(page, "#card img") == 0 and "<img·src=x" in text


def test_an_ablation_switches_before_and_after(show, small) -> None:
    gone, left = small.nodes[0].node, next(m.node for m in small.nodes[1:] if m.status in ("measured", "verified"))
    ablation = Ablation("without it", (gone,), (3.1, -0.4), {left: 0.0})
    page = show(circuit_html(small, ablations=[ablation])).page
    body = f'.node[data-node="{left}"] path'
    before = page.get_attribute(body, "fill")
    page.select_option("#ablationSelect", "0")
    assert page.inner_text("#ablationText") == "metric 3.10 before, \u22120.40 after"
    assert page.get_attribute(body, "fill") == "#ffffff" != before
    assert "ablated" in page.get_attribute(f'.node[data-node="{gone}"]', "class")
    node(page, str(left)).hover()
    assert "after ablation\n0.000" in card(page)
    page.select_option("#ablationSelect", "")
    assert page.get_attribute(body, "fill") == before and count(page, ".ablated") == 0


def test_comparison_switches_between_difference_and_sides(show, small) -> None:
    other = build([member.node for member in small.nodes[2:]] + [Node("head", 9, 1)], 14, seed=4)
    page = show(compare_html(small, other, ("aligned", "base"))).page
    assert page.locator('[data-pane="difference"]').is_visible()
    labels = page.eval_on_selector_all('[data-pane="difference"] .node text', "all => all.map(el => el.textContent)")
    assert "[9.1]" in labels and sum(label.startswith("(") for label in labels) == 2
    page.check("#views input[value='1']")
    assert not page.locator('[data-pane="difference"]').is_visible()
    assert page.locator('[data-pane="aligned"]').is_visible() and page.locator('[data-pane="base"]').is_visible()
    key = str(small.nodes[3].node)
    places = [
        page.locator(f'[data-pane="{side}"] .node[data-node="{key}"]').get_attribute("data-at")
        for side in ("aligned", "base")
    ]
    assert places[0] == places[1]
    page.mouse.move(300, 300)
    page.mouse.wheel(0, -300)
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    boxes = page.eval_on_selector_all(".pane svg", "all => all.map(el => el.getAttribute('viewBox'))")
    assert len(set(boxes)) == 1
    node(page, "L9.H1").hover()
    assert "in aligned\nnot in this circuit" in card(page)


def test_comparison_shows_every_role_and_filters_by_the_change(show, small) -> None:
    first = replace(small, nodes=small.nodes[:8], edges=edges_among(small, small.nodes[:8]))
    gone = [replace(m, role="none" if m.role == "evaluation" else m.role) for m in small.nodes[4:]]
    second = replace(small, nodes=tuple(gone), edges=edges_among(small, gone))
    page = show(compare_html(first, second, ("one", "two"))).page
    roles = {m.node: m.role for circuit in (first, second) for m in circuit.nodes}
    only_first = set(roles.values()) - {m.role for m in second.nodes}
    assert only_first
    shown = page.eval_on_selector_all(
        "#roles .role",
        "all => all.map(el => [el.querySelector('input').value, Number(el.lastElementChild.textContent)])",
    )
    assert sorted(shown) == sorted([role, list(roles.values()).count(role)] for role in set(roles.values()))
    assert sum(n for _, n in shown) == len(roles)
    pane = '[data-pane="difference"] .node[data-role]:not(.gone)'
    assert count(page, pane) == len(roles)
    assert page.inner_text("label[for=nodeSlider]").startswith("nodes with |change|")
    effects = [{m.node: m.effect for m in circuit.nodes} for circuit in (first, second)]
    changes = {str(node): abs(effects[1].get(node, 0) - effects[0].get(node, 0)) for node in roles}
    assert min(changes.values()) == 0 < max(changes.values())
    set_slider(page, "nodeSlider", 60)
    kept = page.eval_on_selector_all(pane, "all => all.map(el => el.dataset.node)")
    limit = max(changes.values()) * 0.09
    assert set(kept) == {key for key, change in changes.items() if change >= limit} and len(kept) < len(roles)


def edges_among(circuit, members) -> tuple:
    ends = {m.node for m in members} | {Node("embed"), Node("logits")}
    return tuple(e for e in circuit.edges if {e.edge.sender, e.edge.receiver} <= ends)


def test_comparison_side_by_side_is_exported_whole(show, small, tmp_path: Path) -> None:
    other = build([member.node for member in small.nodes[2:]] + [Node("head", 9, 1)], 14, seed=4)
    page = show(compare_html(small, other, ("aligned & co", "base"))).page
    assert not page.locator("#key").is_visible()
    page.check("#views input[value='1']")
    assert page.locator("#key").is_visible() and "verified" in page.text_content("#key svg")
    name, picture = page.locator('[data-pane="base"] .name'), page.locator('[data-pane="base"] svg')
    assert name.bounding_box()["y"] + name.bounding_box()["height"] <= picture.bounding_box()["y"] + 1
    with page.expect_download() as waiting:
        page.click("#saveSvg")
    waiting.value.save_as(tmp_path / "both.svg")
    root = ElementTree.parse(tmp_path / "both.svg").getroot()
    inner = root.findall("{http://www.w3.org/2000/svg}svg")
    names = [len([el for el in one.iter() if el.get("data-role")]) for one in inner]
    assert names == [12, 11]
    assert float(inner[1].get("x")) >= float(inner[0].get("width"))
    assert [el.text for el in root.findall("{http://www.w3.org/2000/svg}text")] == ["aligned & co", "base"]
    page.click("#copyTikz")
    text = page.input_value("#dialogArea")
    assert text.count("\\begin{scope}") == text.count("\\end{scope}") == 2 and "aligned \\& co" in text
    assert "{9.1}" in text and "{4.3}" in text
    check_compiles(text, tmp_path)


def test_hostile_text_stays_text(show) -> None:
    opened = show(circuit_html(small_circuit(HOSTILE)))
    page = opened.page
    assert count(page, "img") == 0 and "<img src=x onerror=alert(1)>" in page.inner_text("h1")
    head = page.locator(".node[data-role]").first
    for place in range(page.locator(".node[data-role]").count()):
        page.locator(".node[data-role]").nth(place).dispatch_event("pointerenter")
        assert count(page, "img") == 0
    head.hover()
    assert count(page, "script") == 2
    # SVG alone, as a document of its own
    alone = show(circuit_svg(small_circuit(HOSTILE)))
    assert count(alone.page, "img") == 0


def test_a_small_window_stacks_the_page(show, small) -> None:
    page = show(circuit_html(small), width=420, height=800).page
    stage, side = page.locator("#stage").bounding_box(), page.locator("aside").bounding_box()
    assert side["y"] >= stage["y"] + stage["height"] - 1 and stage["width"] <= 420
