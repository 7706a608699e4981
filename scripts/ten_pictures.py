"""The refusal circuit in ten pictures: slides from stored results, as one HTML file that needs no network, and as PDF.

python scripts/ten_pictures.py [--out docs/ten-pictures]

Each slide has a picture, one sentence of claim and one of caveat. All numbers come from the stored JSON of docs/. The
PDF needs a Chromium; without one the HTML alone is written.
"""

import argparse
import base64
import io
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pages.page import RESULTS, SAVING
from pages.records import load
from pages.statements import Rate

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.output import write_text
from mechsafety.viz import Style, layout_circuit, layout_svg, role_diagram
from mechsafety.viz.marks import Layout

TITLE = "The refusal circuit in ten pictures"
FOLDER = RESULTS.parent / "ten-pictures"
FILES = ("index.html", "ten-pictures.pdf")
NATIVE = "native-model/native-node.json"
STRONG, OTHER, QUIET = "#9C2F6B", "#00588C", "#8A8F98"
VERDICTS = {
    "holds": OTHER,
    "holds by construction": "#B9D3E6",
    "fails": STRONG,
    "undecided": QUIET,
    "not measured": "#FFFFFF",
}
SIZE = (11, 4.6)  # inches of a chart
# what one and what several do: parts of a role, claims of a verdict
DOES = {
    "detection": ("detects", "detect"),
    "relay": ("relays", "relay"),
    "evaluation": ("evaluates", "evaluate"),
    "decision": ("decides", "decide"),
    "production": ("writes", "write"),
}
DO = {
    "holds": ("holds", "hold"),
    "fails": ("fails", "fail"),
    "undecided": ("is undecided", "are undecided"),
    "not measured": ("was not measured", "were not measured"),
}


@dataclass(frozen=True, slots=True)
class Slide:
    """One picture with what it shows.

    Attributes:
        name: Its address on the page.
        claim, caveat: One sentence each.
        shows: What the picture shows, for those who cannot see it too.
        source: The stored file, below ``docs/``.
        picture: A chart, or the layout of a circuit.
    """

    name: str
    claim: str
    caveat: str
    shows: str
    source: str
    picture: Figure | Layout

    @property
    def address(self) -> str:
        """The picture as an image within the page."""
        return "data:image/svg+xml;base64," + base64.b64encode(drawn(self.picture).encode()).decode()


def drawn(picture: Figure | Layout) -> str:
    """A picture as SVG: the same picture gives the same bytes."""
    if isinstance(picture, Layout):
        return layout_svg(picture)
    for axes in picture.axes:
        for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
            label.set_size(13)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "mechsafety"}):
        picture.savefig(text, format="svg", **SAVING[".svg"])
    return text.getvalue()


def slides() -> tuple[Slide, ...]:
    """The ten slides, from the stored results."""
    demo, native = RefusalCircuit.builtin(), RefusalCircuit.load(RESULTS / NATIVE)
    stored = {name: load(RESULTS / f"{name}.json") for name in ("refusal-direction", "robustness", "audit")}
    return (
        behaviour(demo),
        spread(demo),
        circuit(demo),
        controls(demo),
        claims(demo),
        roles(demo),
        another(native),
        direction(stored["refusal-direction"]),
        fragility(stored["robustness"]),
        audit(stored["audit"]),
    )


# --- the slides -----------------------------------------------------------------------------------------------------


def behaviour(demo: RefusalCircuit) -> Slide:
    kinds = ("harmful", "harmless")
    harmful, harmless = (demo.behaviour[kind] for kind in kinds)
    used, tried = known(demo.speaks_for)
    figure, axes = chart("share of prompts that are refused")
    found = [(one.refusal_rate, *one.refusal_ci) for one in (harmful, harmless)]
    columns(axes, [f"{kind} prompts" for kind in kinds], found, [STRONG, OTHER])
    return Slide(
        "behaviour",
        f"The demo model refuses {harmful.refusal_rate:.0%} of {harmful.n} harmful prompts, and "
        f"{harmless.refusal_rate:.0%} of {harmless.n} harmless ones that differ in few words.",
        f"This project trained it to refuse, and its map speaks only for the {used} of {tried} pairs that it refuses "
        "on the harmful side alone.",
        "Shares of refused prompts with 95 % intervals.",
        "gallery/demo.json",
        figure,
    )


def spread(demo: RefusalCircuit) -> Slide:
    check = demo.verification
    ten = next(point for point in check.curve if point.n_nodes == 10)
    fresh = known(check.fresh)
    figure, axes = chart("share of the difference that is restored")
    sizes = [point.n_nodes for point in check.curve]
    axes.plot(sizes, [point.faithfulness for point in check.curve], "o-", color=OTHER, label="pairs of the search")
    axes.plot(sizes, [point.held_out for point in check.curve], "s--", color=STRONG, label="held-out pairs")
    low, high = fresh.ci
    ends = [[fresh.faithfulness - low], [high - fresh.faithfulness]]
    label = "the circuit, fresh pairs"
    axes.errorbar([len(demo)], [fresh.faithfulness], ends, fmt="D", color="black", capsize=4, label=label)
    axes.axhline(check.target, color=QUIET, linestyle=":", label="asked for")
    axes.set(xlabel=f"parts kept of {demo.n_candidates}, the best first", ylim=(-0.05, None))
    axes.legend(frameon=False, fontsize=12)
    return Slide(
        "spread",
        f"Its refusal is spread out: the best 10 of {demo.n_candidates} heads and MLPs restore "
        f"{share(ten.held_out)} of the difference between refusing and answering (held-out pairs), and the {len(demo)} "
        f"of the circuit {fresh.faithfulness:.0%} (fresh pairs).",
        f"On these {fresh.n} pairs, used for nothing before, the 95 % interval is {low:.0%} to {high:.0%}: the claim "
        f"of at least {check.target:.0%} on fresh pairs {DO[verdict(demo, 'fresh pairs')][0]}.",
        "What is restored when the best k parts are kept, and all others have their values from the harmless prompt.",
        "gallery/demo.json",
        figure,
    )


def circuit(demo: RefusalCircuit) -> Slide:
    linked = len(known(demo.search).linked)
    return Slide(
        "circuit",
        f"The map names {len(demo)} of {demo.n_candidates} heads and MLPs and {len(demo.edges)} edges, each with its "
        "measured effect.",
        f"{linked} of these {len(demo.edges)} edges are kept only to connect a part and need not be strong.",
        "Each row is a layer, information flows upward; lanes, shapes and colours are roles; weak parts are folded.",
        "gallery/demo.json",
        layout_circuit(demo, Style(width_mm=230, height_mm=112, caption=False, legend=False)),
    )


def controls(demo: RefusalCircuit) -> Slide:
    check = demo.verification
    alone, removed = check.random_controls, known(check.necessity_controls)
    p = {claim.name: known(claim.p_value) for claim in check.claims if claim.name in ("sufficiency", "necessity")}
    figure = Figure(figsize=SIZE, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, drawn_sets, title in zip(
        panels, (alone, removed), ("restored when kept alone", "lost when removed"), strict=True
    ):
        rows = ["the circuit", f"{drawn_sets.n} random\ncircuits: mean", "random circuits:\nhighest"]
        values = (known(drawn_sets.observed), drawn_sets.mean, drawn_sets.highest)
        columns(axes, rows, [(value, value, value) for value in values], [STRONG, QUIET, QUIET])
        axes.set_title(title, loc="left")
        plain(axes)
    return Slide(
        "controls",
        f"Kept alone, the circuit restores {known(alone.observed):.0%} of the difference on {alone.n_pairs} fresh "
        f"pairs, and {alone.n} random circuits of its size restore {alone.highest:.0%} at most (adjusted p = "
        f"{p['sufficiency']:.3f}).",
        f"Removing the circuit loses {known(removed.observed):.0%} of the difference, but removing random ones loses "
        f"{removed.mean:.0%} on average: that the model needs these parts is not shown (p = {p['necessity']:.2f}).",
        "The circuit beside random circuits with as many heads and MLPs.",
        "gallery/demo.json",
        figure,
    )


def claims(demo: RefusalCircuit) -> Slide:
    tested = demo.verification.tested
    count = {word: sum(claim.verdict == word for claim in tested) for word in DO}
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    every = demo.verification.claims
    for row, claim in enumerate(every):
        axes.scatter([0], [-row], s=170, color=VERDICTS[claim.verdict], edgecolor="black")
        axes.text(0.05, -row, f"{claim.verdict}: {claim.statement}", va="center", fontsize=12)
    axes.set(xlim=(-0.05, 3.2), ylim=(-len(every) + 0.4, 0.6))
    axes.axis("off")
    return Slide(
        "claims",
        f"Of {len(tested)} claims about the circuit that were tested, {counted(count, DO)}.",
        "The first one, faithfulness on the search's own pairs, is not counted, because it holds by construction; a "
        "faithful circuit is no complete explanation.",
        "Every claim with its verdict.",
        "gallery/demo.json",
        figure,
    )


def roles(demo: RefusalCircuit) -> Slide:
    count = {role: len(demo.by_role(role)) for role in DOES}
    return Slide(
        "roles",
        f"By measured role, {counted(count, DOES)}.",
        "Roles are rules applied to measured effects, so that a part near a threshold could have another one.",
        "Boxes are roles; arrows sum the edges between their parts by what they go into (query, key, value, MLP).",
        "gallery/demo.json",
        role_diagram(demo, Style(width_mm=230, height_mm=112, caption=False, legend=False)),
    )


def another(native: RefusalCircuit) -> Slide:
    heads = sum(member.node.kind == "head" for member in native)
    fresh = known(native.verification.fresh)
    used, tried = known(native.speaks_for)
    tested = native.verification.tested
    low, high = fresh.ci
    return Slide(
        "another-model",
        f"In Qwen2.5-Coder-0.5B-Instruct, whose refusals nobody here trained, {heads} heads and {len(native) - heads} "
        f"MLPs restore {fresh.faithfulness:.0%} of the difference.",
        f"The 95 % interval on {fresh.n} fresh pairs is {low:.0%} to {high:.0%}, the map speaks for {used} of {tried} "
        f"pairs, and {sum(claim.passed is True for claim in tested)} of {len(tested)} tested claims hold.",
        "Each row is a layer, information flows upward; lanes, shapes and colours are roles; weak parts are folded.",
        f"results/{NATIVE}",
        layout_circuit(native, Style(width_mm=230, height_mm=112, caption=False, legend=False)),
    )


def direction(record: Any) -> Slide:
    removed, added = record["rates"]["JailbreakBench"], record["rates"]["Alpaca (rest)"]
    shown = {
        "JailbreakBench\nas it is": (removed["as it is"], QUIET),
        "direction\nremoved": (removed["direction removed"], STRONG),
        "random 1\nremoved": (removed["random 1 removed"], OTHER),
        "random 2\nremoved": (removed["random 2 removed"], OTHER),
        "Alpaca\nas it is": (added["as it is"], QUIET),
        "direction\nadded": (added["direction added"], STRONG),
        "random 1\nadded": (added["random 1 added"], OTHER),
        "random 2\nadded": (added["random 2 added"], OTHER),
    }
    rates = {name: Rate.of(pair) for name, (pair, _) in shown.items()}
    figure, axes = chart("share of prompts that are refused")
    found = [(rate.value, rate.low, rate.high) for rate in rates.values()]
    columns(axes, list(rates), found, [colour for _, colour in shown.values()])
    before, after, most, plain_rate = (
        Rate.of(pair)
        for pair in (removed["as it is"], removed["direction removed"], added["direction added"], added["as it is"])
    )
    judged = sum(len(row) for row in record.get("replies", {}).values())
    said = f"judged in {judged} conditions alone" if judged else "not judged here"
    return Slide(
        "direction",
        f"Removing one direction cuts refusals of {before.n} harmful prompts from {before:short} to {after:short}, and "
        f"adding it raises those of {most.n} ordinary ones from {plain_rate:short} to {most:short}; random directions "
        "do neither.",
        f"A reply that no longer refuses may be an answer or babble, which was {said}.",
        "Shares of refused prompts with 95 % intervals.",
        "results/refusal-direction.json",
        figure,
    )


def fragility(record: Any) -> Slide:
    curve = record["curves"]["heads"]
    rows = curve["rows"]
    ten = next(row for row in rows if row["parts"] == 10)
    figure, axes = chart("share of the difference that is lost")
    sizes = [row["parts"] for row in rows]
    low, high = [row["random_low"] for row in rows], [row["random_high"] for row in rows]
    axes.fill_between(sizes, low, high, color=QUIET, alpha=0.45, label="random heads of the same layers, all rankings")
    values = [row["lost"] for row in rows]
    ends = [
        [row["lost"] - row["ci_low"] for row in rows],
        [row["ci_high"] - row["lost"] for row in rows],
    ]
    axes.errorbar(sizes, values, ends, fmt="o-", color=STRONG, capsize=4, label="heads of the circuit")
    axes.set(xlabel="heads ablated, the strongest first", ylim=(-0.3, 1))
    axes.legend(frameon=False, fontsize=12, loc="upper right")
    return Slide(
        "fragility",
        f"Ablating ten heads of the circuit loses {ten['lost']:.0%} of the difference and leaves {ten['refuses']:.0%} "
        f"of the refusals; ten random heads of the same layers lose {ten['random_high']:.0%} at most.",
        f"On these {record['pairs']} pairs p = {ten['p_value']:.3f}, the smallest that so few random rankings can give,"
        f" and {ten['degenerate']:.0%} of the replies are degenerate then.",
        "Loss over the number of ablated heads, with 95 % intervals over pairs.",
        "results/robustness.json",
        figure,
    )


def audit(record: Any) -> Slide:
    alarms, benign, low, high = record["false_alarms"]
    caught, tampered = record["caught"]
    tried = [copy for copy in record["copies"] if copy["role"] == "adaptive"]
    evaded = sum(copy["score"] < 1 for copy in tried)
    figure, axes = chart("")
    attacker = "by an attacker who\nhas the fingerprint"
    names = {"benign": "benign copies", "tampered": "tampered copies", "adaptive": attacker}
    for row, (role, colour) in enumerate(zip(names, (OTHER, STRONG, "#B36B00"), strict=True)):
        scores = sorted(copy["score"] for copy in record["copies"] if copy["role"] == role)
        heights = [row + 0.6 * (k % 9 - 4) / 9 for k in range(len(scores))]
        axes.scatter(scores, heights, s=26, color=colour, alpha=0.75)
    axes.axvline(1, color="black", linestyle="--")
    axes.text(1.05, -0.62, "alarm at 1 and above", fontsize=11)
    axes.set_yticks(range(len(names)), names.values())
    axes.set(xscale="log", xlabel="score of the audit", ylim=(2.6, -0.8))
    return Slide(
        "audit",
        f"An audit against a fingerprint catches {caught} of {tampered} tampered copies, with {alarms} false alarms on "
        f"{benign} benign ones (95 % interval of the rate {low:.1%} to {high:.1%}).",
        "Some tampered copies resemble those that the limits were chosen on, which flatters the figure, and of "
        f"{len(tried)} attempts by an attacker who has the fingerprint {evaded} evade it.",
        "Every point is a copy of the demo model; points are spread in height only to be seen.",
        "results/audit.json",
        figure,
    )


# --- how they are drawn ---------------------------------------------------------------------------------------------


def chart(label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_ylabel(label)
    plain(axes)
    return figure, axes


def plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=12)


def columns(
    axes: Axes, names: Sequence[str], found: Sequence[tuple[float, float, float]], colours: Sequence[str]
) -> None:
    """Columns with their interval and number."""
    values = [value for value, _, _ in found]
    ends = [[value - low for value, low, _ in found], [high - value for value, _, high in found]]
    axes.bar(names, values, 0.6, color=colours, yerr=ends if any(map(any, ends)) else None, capsize=4)
    for place, (value, _, high) in enumerate(found):
        axes.text(place, high + 0.02, f"{value:.0%}", ha="center", fontsize=12)
    axes.set_ylim(0, 1.12)


def share(value: float) -> str:
    """A share of the difference in words: what rounds to 0, or is below it, is nothing."""
    return f"{value:.1%}" if value >= 0.0005 else "nothing"


def verdict(found: RefusalCircuit, name: str) -> str:
    return next(claim.verdict for claim in found.verification.claims if claim.name == name)


def counted(numbers: Mapping[str, int], words: Mapping[str, tuple[str, str]]) -> str:
    """Numbers with the words for one and for several; what does not occur is left out.

    Example:
        >>> counted({"holds": 1, "fails": 5, "not measured": 0, "undecided": 3}, DO)
        '1 holds, 5 fail and 3 are undecided'
    """
    said = [f"{n} {words[name][n != 1]}" for name, n in numbers.items() if n]
    return " and ".join(filter(None, [", ".join(said[:-1]), said[-1]]))


def known(value: Any) -> Any:
    """A value that a slide cannot do without."""
    if value is None:
        raise SystemExit("a stored result misses a number that a slide shows")
    return value


def page(shown: Sequence[Slide]) -> str:
    """The slides as one file."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "pages" / "templates"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("ten-pictures.html.j2").render(title=TITLE, slides=shown)


def print_pdf(html: Path, pdf: Path, chromium: str) -> None:
    """The page as PDF, one slide a page, printed by a browser without network."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        sheet = browser.new_page()
        sheet.goto(html.resolve().as_uri())
        sheet.pdf(path=pdf, prefer_css_page_size=True, print_background=True)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the ten pictures.")
    parser.add_argument("--out", type=Path, default=FOLDER)
    out = parser.parse_args().out
    write_text(out / FILES[0], page(slides()))
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("no Chromium: the PDF is not printed", file=sys.stderr)
        return
    print_pdf(out / FILES[0], out / FILES[1], chromium)


if __name__ == "__main__":
    main()
