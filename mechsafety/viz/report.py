"""One self-contained page that says what was found, how well it is supported, and what was not measured."""

import base64
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mechsafety.circuits.circuit import ROLES, AttentionExample, Behaviour, CircuitEdge, CircuitNode, RefusalCircuit
from mechsafety.results import parting, reads_where
from mechsafety.viz import words
from mechsafety.viz.attention import attention_html, bundle
from mechsafety.viz.chart_svg import DARK_FRAME, NARROW, WIDE, chart_svg, heat_colours
from mechsafety.viz.charts import effect_distribution, faithfulness_curve, node_heatmap
from mechsafety.viz.flow import flow
from mechsafety.viz.glossary import GLOSSARY, METHODS
from mechsafety.viz.html import circuit_fragment, dark_rules, document
from mechsafety.viz.look import PLAIN, ROLE_COLOURS
from mechsafety.viz.marks import magnitude
from mechsafety.viz.role_diagram import role_diagram
from mechsafety.viz.search import search_section
from mechsafety.viz.style import Style
from mechsafety.viz.svg import layout_svg

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

ROLE_WORDS = {
    "detection": "reads what it passes on straight from the embeddings",
    "relay": "passes on mostly what it reads",
    "evaluation": "reads other nodes, and decision nodes or relays read it",
    "decision": "production nodes read it",
    "production": "acts on the logits directly",
    "none": "has an effect, but fits no rule for a role",
}
HEADS_IN_TEXT = 6
DIAGRAM_PT = 9.75  # its smallest labels then have eleven pixels
# What a card says beside its title. A number whose check does not hold is shown small.
VERDICT_WORDS = {
    "fails": "its check fails",
    "undecided": "its check is undecided",
    "not measured": "its check was not measured",
    "holds by construction": "holds by construction",
}


def render_report(circuit: RefusalCircuit) -> str:
    """The report as HTML; it opens without network, and the same circuit gives the same text.

    Sections without data are named as missing (``circuit.details`` is None after loading).

    Raises:
        MechsafetyError: The circuit cannot be drawn (a node listed twice, no candidates, misshapen attention).

    Example:
        >>> page = ms.viz.render_report(circuit)
        >>> path = (folder / "report.html").write_text(page, encoding="utf-8")
    """
    details, check, linked = circuit.details, circuit.verification, circuit.linked
    return document(
        "report.html.j2",
        made=[bundle()] if details and details.attention else [],
        model=words.model_name(circuit),
        checks=words.checks(circuit),
        finding=words.finding(circuit),
        concentration=words.concentration(circuit),
        verdict=words.verdict(circuit),
        chance=words.chance(circuit),
        necessity=words.necessity(circuit),
        cards=_cards(circuit),
        behaviour=[_behaviour(kind, value) for kind, value in circuit.behaviour.items()],
        pairs=words.pairs(circuit),
        flow=flow(circuit),
        circuit=circuit_fragment(circuit),
        diagram=layout_svg(role_diagram(circuit, Style(caption=False, font_pt=DIAGRAM_PT))),
        claims=_claims(circuit),
        ablation=words.ablation(circuit),
        first_look=words.first_look(circuit),
        downloads=_downloads(circuit),
        steps=METHODS,
        options=[(key, _shown(value)) for key, value in circuit.provenance.options.items()],
        search=search_section(circuit),
        curve=_chart(faithfulness_curve(circuit), "Faithfulness over the number of best parts kept"),
        heatmap=_chart(node_heatmap(circuit), "Effect of every head and MLP, by layer"),
        effects=_chart(effect_distribution(circuit), "Effects of the circuit's nodes, by role"),
        dark=[*dark_rules(PLAIN), *heat_colours(), *DARK_FRAME.items()],
        roles=_roles(circuit),
        nodes=[
            _node(member, (check.minimality or {}).get(str(member.node)))
            for member in sorted(_rows_of(circuit), key=lambda member: -magnitude(member.effect))
        ],
        edges=[_edge(member, member.edge in linked) for member in circuit.edges],
        n_measured=sum(member.status != "estimated" for member in circuit.edges),
        attention=attention_html(_strongest_heads(circuit)) if details and details.attention else None,
        samples=_samples(circuit),
        glossary=GLOSSARY,
        provenance=_provenance(circuit),
        unmeasured=unmeasured(circuit),
        minimality=bool(check.minimality),
        completeness=words.number(check.completeness) if check.completeness is not None else None,
        no_scores=details is None,
        missing=_missing(circuit),
    )


def _strongest_heads(circuit: RefusalCircuit) -> list[AttentionExample]:
    """Attention of the six strongest heads with a pattern: CircuitsVis shows no more; the cards have the others."""
    sizes = {member.node: magnitude(member.effect) for member in circuit.nodes}
    examples = []
    for example in circuit.details.attention if circuit.details else ():
        order = sorted(range(len(example.heads)), key=lambda k: -sizes.get(example.heads[k], 0.0))[:HEADS_IN_TEXT]
        kept = sorted(order)
        heads = tuple(example.heads[k] for k in kept)
        examples.append(replace(example, heads=heads, patterns=example.patterns[kept]))
    return examples


def unmeasured(circuit: RefusalCircuit) -> list[tuple[str, str]]:
    """What this report cannot tell, each with the reason."""
    check = circuit.verification
    gaps = []
    if math.isfinite(check.necessity):
        gaps.append(
            (
                "Replies without the circuit",
                "not generated: necessity is measured on the metric alone. measure_ablation(model, pairs, metric, "
                "nodes, replies=True) shows whether the model then answers or babbles.",
            )
        )
    if not check.measured:
        gaps.append(("Verification", "not done: nothing was measured on this circuit as a whole."))
    if check.completeness is None:
        gaps.append(("Completeness", "not measured: parts that matter may be missing from the circuit."))
    if check.minimality is None:
        gaps.append(("Minimality", "not measured: single nodes of the circuit may be superfluous."))
    estimated = sum(member.status == "estimated" for member in circuit.nodes)
    if estimated:
        gaps.append(("Exact node effects", f"not measured for {estimated} of {len(circuit.nodes)} nodes (estimates)."))
    estimated = sum(member.status == "estimated" for member in circuit.edges)
    if estimated:
        gaps.append(("Exact edge effects", f"not measured for {estimated} of {len(circuit.edges)} edges (estimates)."))
    return gaps


def _claims(circuit: RefusalCircuit) -> list[dict[str, str]]:
    """The claims that the circuit lists, those that failed first."""
    rows = []
    for claim in circuit.verification.claims:
        interval, p = claim.interval, claim.p_value
        figure = [words.number(claim.value)] if claim.value is not None else []
        figure += [words.interval(interval)] if interval else []
        figure += [words.p_value(p)] if p is not None else []
        rows.append(
            {
                "name": claim.name,
                "statement": claim.statement,
                "figure": ", ".join(figure + [claim.reason] * bool(claim.reason)) or words.DASH,
                "criterion": claim.criterion,
                "verdict": claim.verdict,
            }
        )
    order = list(circuit.verification.by_verdict)
    return sorted(rows, key=lambda row: order.index(row["verdict"]))


def _downloads(circuit: RefusalCircuit) -> list[tuple[str, str]]:
    """File names and data addresses of the tables; nothing is fetched."""
    import pandas as pd

    edges = [
        {"from": str(m.edge.sender), "to": str(m.edge.receiver), "slot": m.edge.slot, "effect": m.effect,
         "status": m.status, "estimate": m.estimate}
        for m in circuit.edges
    ]  # fmt: skip
    curve = [
        {"k": p.k, "n_nodes": p.n_nodes, "discovery": p.faithfulness, "held_out": p.held_out}
        for p in circuit.verification.curve
    ]
    tables = {"nodes.csv": circuit.to_dataframe(), "edges.csv": pd.DataFrame(edges), "curve.csv": pd.DataFrame(curve)}
    if circuit.details is not None:
        tables["scores.csv"] = circuit.scores_dataframe()
    texts = {
        name: table.to_csv(index=False, float_format="%.6g", lineterminator="\n") for name, table in tables.items()
    }
    texts["circuit.json"] = circuit.to_json()
    return [
        (name, "data:text/plain;base64," + base64.b64encode(text.encode()).decode()) for name, text in texts.items()
    ]


def _missing(circuit: RefusalCircuit) -> list[str]:
    if circuit.details is None:
        return ["scores of candidates outside the circuit", "generated replies", "attention of found heads"]
    missing = [] if circuit.details.samples else ["generated replies"]
    return missing if circuit.details.attention else [*missing, "attention of found heads"]


def _chart(figure: "Figure", title: str) -> str:
    """A chart twice, for a wide and for a narrow window; the style sheet shows one of them."""
    wide, narrow = (chart_svg(figure, title, paper) for paper in (WIDE, NARROW))
    return f'<div class="chart wide">{wide}</div><div class="chart narrow">{narrow}</div>'


def _cards(circuit: RefusalCircuit) -> list[dict[str, str]]:
    """The cards, each with the verdict of the check that its number belongs to."""
    check = circuit.verification
    verdicts = {claim.name: claim.verdict for claim in check.claims}
    controls = check.random_controls
    held = f"95 % interval {words.interval(check.held_out_ci, 2)}; "
    held += f"{'meets' if check.reached else 'misses'} the goal, {check.aim.words}"
    drawn = f"mean of {controls.n} of the same size{words.some_pairs(circuit, controls.n_pairs)}; "
    drawn += words.p_value(check.random_p)
    return [
        *_behaviour_card(circuit),
        {"name": "Size", "value": f"{words.size(circuit)} of {circuit.n_candidates}", "note": _size_note(circuit)},
        _card("Held-out faithfulness", check.held_out_faithfulness, held, verdicts.get("faithfulness")),
        *_fresh_card(circuit, verdicts.get("fresh pairs")),
        _card("Random circuits", controls.mean, drawn, verdicts.get("sufficiency")),
        _card("Necessity", check.necessity, _necessity_note(circuit), verdicts.get("necessity")),
    ]


def _card(name: str, value: float, note: str, verdict: str | None) -> dict[str, str]:
    """A card; if its number was not measured, its note says only that."""
    note = note if math.isfinite(value) else "not measured"
    return {"name": name, "value": words.number(value, 2), "note": note} | (
        {"said": VERDICT_WORDS[verdict], "verdict": verdict.replace(" ", "-")} if verdict in VERDICT_WORDS else {}
    )


def _behaviour_card(circuit: RefusalCircuit) -> list[dict[str, str]]:
    """How often the model refuses, where both kinds of prompts were asked."""
    asked = [circuit.behaviour.get(kind) for kind in ("harmful", "harmless")]
    if None in asked:
        return []
    harmful, harmless = (words.percent(one.refusal_rate) for one in asked if one)
    return [{"name": "Refused", "value": harmful, "note": f"of harmful prompts; {harmless} of harmless ones"}]


def _size_note(circuit: RefusalCircuit) -> str:
    share = words.percent(words.size_share(circuit))
    if circuit.level == "edge":
        return f"{share} of the candidate edges; they join {len(circuit.nodes)} nodes"
    return f"{share} of the candidate parts"


def _necessity_note(circuit: RefusalCircuit) -> str:
    controls = circuit.verification.necessity_controls
    note = "share of the gap that is lost without the circuit"
    return note if controls is None else f"{note}; without a random one {words.number(controls.mean, 2)} on average"


def _fresh_card(circuit: RefusalCircuit, verdict: str | None) -> list[dict[str, str]]:
    fresh = circuit.verification.fresh
    if fresh is None:
        return []
    note = f"95 % interval {words.interval(fresh.ci, 2)}; {fresh.n} pairs that played no part in the search"
    return [_card("Faithfulness on fresh pairs", fresh.faithfulness, note, verdict)]


def _behaviour(kind: str, value: Behaviour) -> dict[str, Any]:
    low, high = value.refusal_ci
    return {
        "kind": kind,
        "n": value.n,
        "degenerate": words.degenerate(value),
        "rate": words.percent(value.refusal_rate),
        "rate_ci": f"{words.percent(low)} to {words.percent(high)}",
        "bar": [100 * min(1.0, magnitude(part)) for part in (value.refusal_rate, low, high)],
        "score": words.number(value.score_mean, 2),
        "score_ci": words.interval(value.score_ci, 2),
    }


def _roles(circuit: RefusalCircuit) -> list[dict[str, Any]]:
    rows = []
    for role in ROLES:
        members = sorted(circuit.by_role(role), key=lambda member: -magnitude(member.effect))
        names = ", ".join(str(member.node) for member in members[:6]) + (" …" if len(members) > 6 else "")
        total = sum(member.effect or 0.0 for member in members)
        row = {"role": role, "words": ROLE_WORDS[role], "count": len(members), "names": names or words.DASH}
        rows.append(row | {"colour": ROLE_COLOURS[role], "total": words.number(total)})
    return rows


def _rows_of(circuit: RefusalCircuit) -> list[CircuitNode]:
    """The nodes of the table: of neurons that were measured together, their MLP and those also measured alone."""
    alone = [member for member in circuit.nodes if member.evidence.together and member.ci]
    return [*circuit.by_mlp().nodes, *alone]


def _node(member: CircuitNode, lost: float | None) -> dict[str, Any]:
    layer, part, index = member.node.order
    return {
        "name": str(member.node),
        "order": layer * 1_000_000 + part * 100_000 + index,
        "role": PLAIN.role(member.role),
        "colour": ROLE_COLOURS[member.role],
        "effect": words.number(member.effect, 4),
        "raw": _sortable(member.effect),
        "ci": words.interval(member.ci, 4),
        "p": words.p_value(member.p_value).removeprefix("p ").removeprefix("= "),
        "p_raw": _sortable(member.p_value, empty=2.0),
        "status": member.status,
        "evidence": words.evidence(member),
        "lost": words.number(lost, 4),
        "lost_raw": _sortable(lost),
    }


def _edge(member: CircuitEdge, linking: bool) -> dict[str, Any]:
    return {
        "sender": str(member.edge.sender),
        "receiver": str(member.edge.receiver),
        "slot": member.edge.slot,
        "effect": words.number(member.effect, 4),
        "raw": _sortable(member.effect),
        "estimate": words.number(member.estimate, 4),
        "status": f"{member.status}; only connects" if linking else member.status,
    }


def _samples(circuit: RefusalCircuit) -> list[dict[str, Any]]:
    samples = circuit.details.samples if circuit.details else ()
    return [
        {"prompt": s.prompt, "kind": s.kind, "reply": s.reply, "refused": s.refused, "score": words.number(s.score, 2)}
        for s in samples
    ]


def _provenance(circuit: RefusalCircuit) -> list[tuple[str, str]]:
    origin, check = circuit.provenance, circuit.verification
    rows: list[tuple[str, Any]] = [
        ("model", origin.model),
        ("weights, SHA-256", origin.weights_sha256),
        ("data type, device", f"{origin.dtype}, {origin.device}"),
        ("chat template, SHA-256", origin.template_sha256),
        *((f"template option: {key}", value) for key, value in origin.template_options.items()),
        ("seed", origin.seed),
        *([("metric: where it is read", reads_where(circuit.metric))] if parting(circuit.metric) else []),
        *((f"metric: {key.replace('_', ' ')}", v) for key, v in circuit.metric.items() if key != "tried"),
        *((f"metric: AUROC {where}", value) for where, value in parting(circuit.metric)),
        ("held-out topics", check.held_out_topics),
        ("CMD, CPR", f"{words.number(check.cmd)}, {words.number(check.cpr)}"),
        *((f"version: {key}", value) for key, value in origin.versions.items()),
    ]
    return [(name, _shown(value)) for name, value in rows]


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return words.plain(value)
    if isinstance(value, Iterable):
        return ", ".join(repr(item) if isinstance(item, str) else str(item) for item in value)
    return str(value)


def _sortable(value: float | None, empty: float = 0.0) -> str:
    return f"{value:.6g}" if value is not None and math.isfinite(value) else f"{empty:g}"
