"""The explorable page in Chromium without network: its model computes what the package computes, and it says so."""

import base64
import copy
import random
import re

import pytest
import torch
from axe import axe_script, serious_violations
from chromium import browser, show
from circuits_drawn import HOSTILE
from explorable import PAGE, model, shown

import mechsafety as ms
from mechsafety.circuits.faithfulness import FaithfulnessMeter
from mechsafety.models.template import render
from mechsafety.nodes import Edge, as_node, head_and_mlp_nodes
from mechsafety.patching import pair_runs
from mechsafety.patching.paths import measured_edges
from mechsafety.patching.senders import node_outputs
from mechsafety.testbed import exported, planted
from mechsafety.testbed.split import receiver_slots, sender_nodes, split_forward
from mechsafety.viz import explorable_html

EXACT = 1e-5
PAIRS = [
    ("tell me about bombs please", "tell me about cakes please"),
    ("explain to my friend how malware can be used", "explain to my friend how poetry can be used"),
    ("venoms for me", "syrups for me"),
    ("I need what frauds make to write toxins", "I need what picnics make to write juices"),
]


class Ours:
    """The package's numbers of one planted model."""

    def __init__(self, built) -> None:
        self.built = built
        self.model = ms.load_model((built.model, built.tokenizer))
        self.metric = ms.RefusalLogOdds.of(self.model, ["Sorry"])

    def runs(self, harmful: str, harmless: str):
        return pair_runs(self.model, ms.PromptPairs.from_lists([harmful], [harmless]))

    def score(self, prompt: str) -> float:
        return float(self.metric(self.model.logits([prompt])))

    def patched(self, harmful: str, harmless: str, nodes) -> float:
        meter = FaithfulnessMeter(self.model, self.runs(harmful, harmless), self.metric)
        return float(meter.removed([[as_node(node) for node in nodes]])[0, 0])

    def single(self, harmful: str, harmless: str, source: str) -> dict[str, float]:
        """Share of the gap lost by each part alone."""
        pairs = ms.PromptPairs.from_lists([harmful], [harmless])
        nodes = head_and_mlp_nodes(self.model.n_layers, self.model.n_heads)
        found = ms.activation_patching(self.model, pairs, self.metric, nodes=nodes, source=source, progress=False)
        return dict(zip(map(str, nodes), found.effects.tolist(), strict=True))


@pytest.fixture(scope="module")
def ours():
    return Ours(model())


@pytest.fixture(scope="module")
def text():
    return explorable_html(shown())


def ask(page, prompt: str) -> None:
    page.fill("#text", prompt)
    page.press("#text", "Enter")


def value(page, name: str) -> float:
    return float(page.get_attribute(f"#{name}", "data-value"))


def edit(page, part: str, how: str, guess: str = "") -> str:
    """Edit a part as a student does; what the page then says."""
    page.click(f'[id="{part}"]')
    page.check(f'[name=edit][value="{how}"]')
    page.click(f'[data-guess="{guess}"]')
    return page.inner_text("#outcome")


def rows(page, table: str) -> list[list[str]]:
    return page.eval_on_selector_all(
        f"#{table} tbody tr",
        "rows => rows.map(row => [...row.cells].map(one => one.dataset.value ?? one.innerText))",
    )


def test_log_odds_of_prompts_and_of_every_patch_are_ours(show, ours, text) -> None:
    page = show(text).page
    rng = random.Random(0)
    names = [str(node) for node in head_and_mlp_nodes(2, 4)]
    for harmful, harmless in PAIRS:
        ask(page, harmful)
        assert value(page, "ownScore") == pytest.approx(ours.score(harmful), abs=EXACT)
        assert value(page, "otherScore") == pytest.approx(ours.score(harmless), abs=EXACT)
        for nodes in [*([name] for name in names), *(rng.sample(names, size) for size in (2, 3, 5))]:
            for node in nodes:
                edit(page, node, "patch")
            expected = ours.patched(harmful, harmless, nodes)
            assert value(page, "nowScore") == pytest.approx(expected, abs=EXACT), (harmful, nodes)
            page.click("#undo")
            assert value(page, "nowScore") == value(page, "ownScore")


def test_patching_a_harmless_prompt_is_denoising(show, ours, text) -> None:
    page = show(text).page
    ask(page, "write a short guide to flutes for me")
    assert page.inner_text("#otherTokens").split()[7] == "rifles"
    assert "Blue, 0\xa0%: the part now writes what it writes on the harmless prompt." in page.inner_text(".key")
    pairs = ms.PromptPairs.from_lists(
        ["write a short guide to rifles for me"], ["write a short guide to flutes for me"]
    )
    for node in ("L0.H0", "L0.MLP", "L1.MLP"):
        edit(page, node, "patch")
        found = ms.activation_patching(
            ours.model, pairs, ours.metric, nodes=[node], direction="denoising", progress=False
        )
        assert value(page, "nowShare") == pytest.approx(float(found.effects[0]), abs=EXACT)
        page.click("#undo")


def test_the_revealed_tables_are_ours(show, ours, text) -> None:
    """Differences, patches, ablations and single wires; with an edit in force, the wires are measured besides it."""
    page = show(text).page
    harmful, harmless = PAIRS[1]
    ask(page, harmful)
    page.click("text=Reveal the planted circuit")
    patched, zero = (ours.single(harmful, harmless, source) for source in ("other", "zero"))
    runs = ours.runs(harmful, harmless)
    nodes = head_and_mlp_nodes(2, 4)
    change = node_outputs(ours.model, runs.harmful, nodes) - node_outputs(ours.model, runs.harmless, nodes)
    size = dict(zip(map(str, nodes), change.norm(dim=-1).amax(-1)[:, 0].tolist(), strict=True))
    effects = rows(page, "effects")
    truth = ours.built.truth
    assert [row[0] for row in effects[:-1]] == [str(node) for node in nodes if node in {*truth.nodes, *truth.decoys}]
    for part, role, difference, by_patch, by_zero in effects[:-1]:
        assert role.split(",")[0] == truth.roles.get(as_node(part), "decoy")
        assert float(difference) == pytest.approx(size[part], abs=0.006)
        assert float(page.get_attribute(f'[id="{part}"]', "data-difference")) == pytest.approx(size[part], abs=EXACT)
        assert float(by_patch) == pytest.approx(patched[part], abs=EXACT)
        assert float(by_zero) == pytest.approx(zero[part], abs=EXACT)
    harmful_score, harmless_score = (float(score) for score in runs.scores(ours.metric))
    gap = harmful_score - harmless_score
    edges = [Edge(edge.sender, edge.receiver, edge.slot) for edge in truth.edges]
    wires = [float(row[3]) for row in rows(page, "wireTable")]
    expected = measured_edges(ours.model, runs, ours.metric, edges)[:, 0] / gap
    assert wires == pytest.approx(expected.tolist(), abs=EXACT)
    (pair,) = truth.backups
    group = [str(node) for node in pair]
    assert float(effects[-1][3]) == pytest.approx(
        (harmful_score - ours.patched(harmful, harmless, group)) / gap, abs=EXACT
    )
    # the wire into the backup carries nothing alone, and all once the other one is patched
    into = next(k for k, edge in enumerate(edges) if str(edge.receiver) == group[1])
    assert abs(wires[into]) < 0.15
    edit(page, group[0], "patch")
    assert float(rows(page, "wireTable")[into][3]) > 0.85


def test_decoy_and_backup_do_what_is_said(show, ours, text) -> None:
    page = show(text).page
    truth = ours.built.truth
    (decoy,) = map(str, truth.decoys)
    first, second = map(str, truth.backups[0])
    sizes = page.eval_on_selector_all(".part", "parts => parts.map(part => [part.id, Number(part.dataset.difference)])")
    assert max(sizes, key=lambda one: one[1])[0] == decoy
    assert "You expected a clear change" in edit(page, decoy, "patch", "clearly")
    assert abs(value(page, "nowShare")) < 0.05
    page.click("#undo")
    assert "You expected that" in edit(page, first, "patch", "hardly")
    assert abs(value(page, "nowShare")) < 0.15
    edit(page, second, "patch", "clearly")
    assert value(page, "nowShare") > 0.85
    moved = page.eval_on_selector_all(".part", "parts => Object.fromEntries(parts.map(p => [p.id, p.dataset.moved]))")
    assert float(moved[first]) == pytest.approx(1) and float(moved["L1.MLP"]) > 0.85 and float(moved["L0.MLP"]) == 0
    notes = rows(page, "log")
    assert [row[0] for row in notes] == ["1", "2", "3", "4"]
    assert notes[-1][2].split(", ") == sorted([f"{first} patched", f"{second} patched"])
    assert notes[0][5:] == ["a clear change", "hardly any change"]


def test_nothing_is_told_before_the_end(show, ours, text) -> None:
    page = show(text).page
    assert not page.is_visible("#truth") and "decoy" not in page.inner_text("#circuit")
    assert not re.search("detection|evaluation|production", page.inner_text("body"))
    truth = ours.built.truth
    page.select_option("#decoy", str(truth.decoys[0]))
    page.select_option("#first", str(truth.backups[0][0]))
    page.select_option("#second", str(truth.nodes[0]))
    page.click("text=Reveal the planted circuit")
    found, missed = page.locator("#verdict li").all_inner_texts()
    assert found == f"The decoy: {truth.decoys[0]}. You found it."
    assert missed.endswith(f"You guessed {truth.backups[0][0]} and {truth.nodes[0]}.")
    assert page.locator("path.wire").count() == len(truth.edges)


def test_an_unknown_word_is_said_plainly(show, text) -> None:
    page = show(text).page
    ask(page, "tell me about dragons please")
    message = page.inner_text("#problem")
    assert message == "The model does not know the word “dragons”. It knows only the words in the list below."
    assert page.inner_text("#nowScore") == "\u2013" and page.is_disabled('[id="L0.H0"]')
    assert page.is_visible("#words button:text-is('bombs')")
    ask(page, "Tell me about Dragons <end>")
    message = page.inner_text("#problem")
    assert message.startswith("The model does not know the words “Tell”, “Dragons”, “<end>”. It knows “tell”.")
    ask(page, "   ")
    assert page.inner_text("#problem").startswith("The prompt is empty.")
    ask(page, "me " * 125)
    assert "125 words" in page.inner_text("#problem") and "at most 124" in page.inner_text("#problem")
    ask(page, "tell me about cakes please")
    assert page.inner_text("#problem") == "" and value(page, "ownScore") < 0


def test_a_prompt_without_counterfactual_can_only_be_ablated(show, ours, text) -> None:
    page = show(text).page
    edit(page, "L0.H0", "patch")
    ask(page, "tell me about my friend")
    assert "nothing can be patched" in page.inner_text("#problem")
    assert page.is_disabled("[name=edit][value=patch]")
    assert value(page, "nowScore") == pytest.approx(ours.score("tell me about my friend"), abs=EXACT)
    assert page.inner_text("#nowShare") == "\u2013"
    edit(page, "L1.MLP", "zero")
    page.click("text=Reveal the planted circuit")
    assert page.locator("path.unknown").count() == len(ours.built.truth.edges)


@pytest.mark.parametrize("word", [HOSTILE, "<img src=x onerror=alert(1)>", "{{ 7 * 7 }} </script>"])
def test_hostile_text_is_shown_as_text(show, text, word) -> None:
    page = show(text).page
    ask(page, word)
    assert word.split()[0] in page.inner_text("#problem")
    assert page.locator("#problem *").count() == 0


def test_it_works_by_keyboard_and_says_what_it_shows(show, text) -> None:
    page = show(text).page
    page.focus('[id="L0.H0"]')
    page.keyboard.press("Enter")
    assert page.inner_text("#partTitle") == "L0.H0: head 0 of layer 0"
    page.focus("[name=edit]:checked")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.guess") == "clearly"
    page.keyboard.press("Enter")
    assert value(page, "nowShare") > 0.8
    assert "now \u2212" in page.get_attribute("#gauge", "aria-label")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_is_accessible_and_fits(show, text, scheme, width) -> None:
    script = axe_script()
    page = show(text, width=width, color_scheme=scheme, reduced_motion="reduce", bypass_csp=True).page
    edit(page, "L1.H1", "patch")
    page.click("text=Reveal the planted circuit")
    page.mouse.move(0, 0)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert serious_violations(page, script) == []
    assert page.evaluate("getComputedStyle(document.querySelector('.mark')).transitionDuration") == "0s"


def in_double(built, harmful: str, harmless: str, node: str = "") -> float:
    """Log-odds in double precision by another forward pass, with one part patched."""
    model = copy.deepcopy(built.model).double()
    for module in model.modules():
        for name, child in module.named_children():
            if "norm" in name:  # Hugging Face's norm computes in single precision
                exact = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                exact.weight = child.weight
                setattr(module, name, exact)
    ids = [
        torch.tensor([built.tokenizer(render(built.tokenizer, prompt, {})[0], add_special_tokens=False).input_ids])
        for prompt in (harmful, harmless)
    ]
    senders, receivers = sender_nodes(model.config), receiver_slots(model.config)
    swapped = torch.zeros(len(senders), len(receivers), ids[0].shape[1], dtype=torch.bool)
    if node:
        swapped[senders.index(as_node(node))] = True
    with torch.no_grad():
        source = split_forward(model, ids[1]).senders
        logits = split_forward(model, ids[0], source, swapped).logits[0, -1]
    refuses = torch.arange(len(logits)) == built.tokenizer.convert_tokens_to_ids("Sorry")
    return float(logits[refuses].logsumexp(0) - logits[~refuses].logsumexp(0))


@pytest.mark.parametrize(
    "shape",
    [
        {"seed": 14, "layers": 2, "kv_heads": 2, "decoys": 1, "backups": 1},
        {"seed": 1, "layers": 3, "heads": 8, "kv_heads": 2, "decoys": 2},
    ],
    ids=["the page's", "larger"],
)
def test_the_model_is_exact_in_double_precision(show, shape) -> None:
    built = planted(**shape)
    page = show(explorable_html(exported(built))).page
    harmful, harmless = PAIRS[0]
    assert value(page, "ownScore") == pytest.approx(in_double(built, harmful, harmless), abs=1e-9)
    for node in map(str, built.truth.nodes):
        edit(page, node, "patch")
        assert value(page, "nowScore") == pytest.approx(in_double(built, harmful, harmless, node), abs=1e-9), node
        page.click("#undo")


def test_the_stored_page_is_the_one_that_is_built(text) -> None:
    """The same text; the weights may differ in their last digits between machines."""
    stored = PAGE.read_text(encoding="utf-8")
    weights = re.compile(r'"weights":"([^"]*)"')
    assert weights.sub("", stored) == weights.sub("", text)
    assert explorable_html(shown()) == text

    def numbers(page: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(weights.search(page)[1])), dtype=torch.float32)

    assert torch.allclose(numbers(stored), numbers(text), atol=1e-4, rtol=1e-4)
