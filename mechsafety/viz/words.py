"""The numbers of a circuit in words: captions, tooltips and the verdict on how spread out the mechanism is."""

import math
import re

from mechsafety.circuits.circuit import Ablation, Behaviour, CircuitEdge, CircuitNode, CurvePoint, RefusalCircuit
from mechsafety.nodes import Node
from mechsafety.results import reads_where
from mechsafety.viz.look import PLAIN, Look
from mechsafety.viz.marks import magnitude

NO_BREAK, DASH = "\xa0", "\u2013"
CONCENTRATED_BELOW, MODERATE_BELOW = 0.10, 1 / 3
EVIDENCE_WORDS = {
    "backup_of": "backup of",
    "in_circuit": "in the circuit: share of the gap lost without it",
    "from_embed": "share of the gap that it reads straight from the embeddings",
    "from_detection": "share of the gap that it reads from detection nodes",
    "from_evaluation": "share of the gap that it reads from evaluation nodes",
    "alike": "share of the gap that it reads from nodes whose writing it repeats",
    "direct": "share of the gap that it sends straight to the logits",
    "to_production": "share of the gap that it sends to production nodes",
    "to_production_or_logits": "share of the gap that it sends to production nodes and the logits together",
    "to_evaluation_or_decision": "share of the gap that it sends to evaluation nodes, decision nodes and relays",
    "at_instruction": "effect at instruction positions alone",
    "at_suffix": "effect at suffix positions alone",
    "joint": "effect together with its primary node",
    "together": "its MLP, whose neurons in the circuit were measured together",
}
STATUS_WORDS = {
    "estimated": "estimated by gradient only",
    "measured": "measured exactly",
    "verified": "measured, significant, and needed by the circuit",
    "rejected": "rejected by the measurement",
}

# what the embedded model's short names stand for
EMBEDDED = {
    "demo": "SmolLM2-135M-Instruct with mechsafety's refusal adapter (demo)",
    "demo-helpful": "SmolLM2-135M-Instruct with mechsafety's adapter for short answers (demo-helpful)",
    "demo-base": "SmolLM2-135M-Instruct without an adapter (demo-base)",
}
METRICS = {
    "refusal_log_odds": "log-odds of a refusal's first token",
    "logit_difference": "logit of a refusal's first token less that of an answer's",
    "whole_opener_log_odds": "log-odds of a refusal's whole opener",
}
# how a figure names nodes, by an example of each kind
NAMES = {
    "head": "{name} is head {node.index} of layer {node.layer}",
    "mlp": "{name} is the MLP of layer {node.layer}",
    "neuron": "N{node.index} in row L{node.layer} is neuron {node.index} of that layer",
}
# an edge's tooltip; a page's script fills in the same words
EDGE_TITLE = "<sender> → <receiver>, slot <slot>: effect <effect>, <status>"
ESTIMATE_TITLE, LINKING_TITLE = " (gradient estimate <estimate>)", "; kept only to connect a node"
# of several edges: of one, of more
SUM_TITLES = (
    "<sender> to <receiver>, slot <slot>: 1 edge, effect <effect>",
    "<sender> to <receiver>, slot <slot>: <n> edges, effects sum to <effect>",
)
STRONGEST = "the strongest in all and of each node"


def filled(template: str, **parts: object) -> str:
    """A template with its ``<names>`` replaced.

    Example:
        >>> filled("<n> edges", n=3)
        '3 edges'
    """
    return re.sub(r"<(\w+)>", lambda found: str(parts[found[1]]), template)


def number(value: float | None, digits: int = 3) -> str:
    """A number for people; an en dash where there is none.

    Example:
        >>> number(0.12345), number(0.5, 1)
        ('0.123', '0.5')
    """
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{value:.{digits}f}"
    return text.replace("-", "\u2212") if float(text) else f"{0:.{digits}f}"


def percent(value: float | None) -> str:
    """A share as a percentage, with one decimal below 10 %.

    Example:
        >>> percent(0.034), percent(0.8)
        ('3.4 %', '80 %')
    """
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{100 * value:.1f}" if 0 < abs(value) < 0.0995 else f"{100 * value:.0f}"
    return (text.removesuffix(".0").replace("-", "\u2212") if float(text) else "0") + " %"


def share(value: float, ends: tuple[float, float]) -> str:
    """A share with its interval.

    Example:
        >>> share(0.5, (0.09, 0.91))
        '50 % (9 % to 91 %)'
    """
    return f"{percent(value)} ({percent(ends[0])} to {percent(ends[1])})"


def replies_changed(ablation: Ablation) -> str:
    """How an ablation changed the replies, empty if not measured; every refusal rate comes with the other kinds."""
    if ablation.replies is None:
        return ""
    before, after = ablation.replies
    ends = []
    for name, said in (("before", before), ("after", after)):
        refused, babble = (share(said.share(kind), said.interval(kind)) for kind in ("refuses", "degenerate"))
        ends.append(f"{name}: refused {refused}, degenerate {babble}, perplexity {said.perplexity:.3g}")
    note = after.lost_note(before)
    return "; ".join([*ends, note] if note else ends)


def degenerate(behaviour: Behaviour) -> str:
    """Share of a model's own replies that are degenerate."""
    if behaviour.kinds is None:
        return "not measured"
    value, low, high = behaviour.kinds.share("degenerate")
    return share(value, (low, high))


def interval(value: tuple[float, float] | None, digits: int = 3) -> str:
    """An interval in brackets."""
    return f"[{number(value[0], digits)}, {number(value[1], digits)}]" if value else DASH


def p_value(value: float | None) -> str:
    """A p-value with its relation sign.

    Example:
        >>> p_value(0.0002), p_value(0.03)
        ('p < 0.001', 'p = 0.03')
    """
    if value is None or not math.isfinite(value):
        return "p not measured"
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def plain(text: str, limit: int = 0) -> str:
    """One line of text without control characters; cut in the middle if longer than ``limit``."""
    flat = " ".join(re.sub(r"[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text).split())
    if limit and len(flat) > limit:
        return flat[: limit * 2 // 3 - 1] + "…" + flat[-(limit // 3) :]
    return flat


def model_name(circuit: RefusalCircuit) -> str:
    """The full name of the circuit's model."""
    name = circuit.provenance.model
    return plain(EMBEDDED.get(name, name))


def edges_drawn(drawn: int, total: int) -> str:
    """How many of the edges are drawn, on one line of a caption."""
    return f"{drawn} of {total} edges drawn".replace(" ", NO_BREAK)


def caption(
    circuit: RefusalCircuit,
    drawn: int,
    which: str = STRONGEST,
    left_out: tuple[str, ...] = (),
    look: Look = PLAIN,
    *,
    upward: bool = True,
) -> tuple[str, ...]:
    """The sentences under the picture.

    Args:
        circuit: The whole circuit.
        drawn: Number of edges that are drawn.
        which: What these edges are, where they are not all.
        left_out: Sentences on nodes that are not drawn.
        look: Names of nodes and roles.
        upward: Whether every edge is drawn upward.
    """
    check = circuit.verification
    controls = check.random_controls
    edges = edges_drawn(drawn, len(circuit.edges))
    edges += f" ({which})" if drawn < len(circuit.edges) else ""
    linked = len(circuit.linked)
    edges += f", {linked} of the circuit's edges kept only to connect a node" if linked else ""
    model = plain(circuit.provenance.model, 60)
    held = f"{size(circuit)} of {circuit.n_candidates} candidate {units(circuit)}"
    if circuit.level == "edge":
        held = f"{len(circuit.nodes)} nodes, {held}"
    first = (first_look(circuit),) if first_look(circuit) else ()
    if not check.measured:
        return (
            *first,
            f"{model}: {held}; {edges}.",
            *left_out,
            "Not verified: nothing was measured on this circuit as a whole.",
            _metric(circuit, look, upward),
        )
    fresh = ""
    if check.fresh is not None:
        fresh = f"; on fresh pairs {number(check.fresh.faithfulness, 2)} {interval(check.fresh.ci, 2)}"
    others = "; no random circuits were drawn"
    if controls.n:
        others = f"; {controls.n} random circuits of this size reach {number(controls.mean, 2)} on average "
        others += f"({p_value(check.random_p).replace(' ', NO_BREAK)})"
    return (
        *first,
        f"{model}: {held}; {edges}.",
        *left_out,
        f"Held-out faithfulness {number(check.held_out_faithfulness, 2)}, 95 % interval "
        f"{interval(check.held_out_ci, 2)}{fresh}{others}.",
        _metric(circuit, look, upward),
    )


def _metric(circuit: RefusalCircuit, look: Look, upward: bool) -> str:
    """The metric in words, what an effect is, and how nodes are named, by the strongest of each kind."""
    name = plain(str(circuit.metric.get("name", "unnamed")), 60)
    where = f", {plain(reads_where(circuit.metric), 80)}" if circuit.metric.get("opener") else ""
    weakest_first = sorted(circuit.by_mlp().nodes, key=lambda member: (magnitude(member.effect), str(member.node)))
    kinds = {member.node.kind: member.node for member in weakest_first}
    names = [_example(kinds[kind], look) for kind in NAMES if kind in kinds]
    return (
        f"Metric: {METRICS.get(name, name)}{where}. An effect is the share of the "
        "harmful\u2212harmless gap of this metric."
        + (" Information flows upward." if upward else "")
        + (f" Names: {', '.join(names)}." if names else "")
    )


def _example(node: Node, look: Look) -> str:
    if node.kind == "neuron" and node in look.labels:
        return f"{look.labels[node]} is neuron {node.index} of layer {node.layer}"
    return NAMES[node.kind].format(node=node, name=look.short(node))


def node_title(member: CircuitNode, look: Look = PLAIN) -> str:
    """A node's tooltip."""
    parts = [f"{look.full(member.node)}: effect {number(member.effect)}"]
    parts += [f"95 % interval {interval(member.ci)}"] if member.ci else []
    parts += [p_value(member.p_value)] if member.p_value is not None else []
    parts += ["works against refusal"] if member.opposes else []
    role = look.role(member.role)
    role = f"role {role}" if member.role != "none" or member.role in look.role_names else role
    return "; ".join([*parts, role, STATUS_WORDS[member.status]])


def edge_title(member: CircuitEdge, linking: bool = False) -> str:
    """An edge's tooltip."""
    edge = member.edge
    template = EDGE_TITLE
    template += ESTIMATE_TITLE if member.estimate is not None and member.status != "estimated" else ""
    template += LINKING_TITLE if linking else ""
    return filled(
        template,
        sender=edge.sender,
        receiver=edge.receiver,
        slot=edge.slot,
        effect=number(member.effect),
        status=member.status,
        estimate=number(member.estimate),
    )


def sum_title(sender: str, receiver: str, slot: str, n: int, effect: float) -> str:
    """The tooltip of several edges that are drawn as one."""
    template = SUM_TITLES[n > 1]
    return filled(template, sender=sender, receiver=receiver, slot=slot, n=n, effect=number(effect))


def evidence(member: CircuitNode) -> tuple[str, ...]:
    """What a node's role rests on, one phrase per measurement."""
    words = list(EVIDENCE_WORDS.values())
    return tuple(f"{words[place]}: {value}" for place, value in evidence_values(member))


def evidence_values(member: CircuitNode) -> list[tuple[int, str]]:
    """The same as indices into `EVIDENCE_WORDS` and values; measurements that were not made are left out."""
    shared = member.evidence.together is not None  # the MLP's own row has the rest
    names = {"together"} if shared else set(EVIDENCE_WORDS)
    values = [getattr(member.evidence, name, None) if name in names else None for name in EVIDENCE_WORDS]
    return [
        (place, value if isinstance(value, str) else percent(value))
        for place, value in enumerate(values)
        if value is not None
    ]


def size(circuit: RefusalCircuit) -> int:
    """Number of candidates that the circuit holds: its edges if the search chose edges, otherwise its nodes."""
    return len(circuit.edges if circuit.level == "edge" else circuit.nodes)


def size_share(circuit: RefusalCircuit) -> float:
    """Size of the circuit as a share of the candidates."""
    return size(circuit) / circuit.n_candidates if circuit.n_candidates else math.nan


def units(circuit: RefusalCircuit, n: int = 2) -> str:
    """Word for the candidates: edges or nodes."""
    return ("edge" if circuit.level == "edge" else "node") + ("" if n == 1 else "s")


def sizes(circuit: RefusalCircuit) -> list[CurvePoint]:
    """The curve's points and the circuit shown, by size."""
    check = circuit.verification
    shown = CurvePoint(size_share(circuit), size(circuit), check.faithfulness, check.held_out_faithfulness)
    points = [point for point in check.curve if point.held_out is not None and math.isfinite(point.held_out)]
    known = {point.n_nodes for point in points}
    return sorted(points + ([shown] if shown.n_nodes not in known else []), key=lambda point: point.n_nodes)


def pairs(circuit: RefusalCircuit) -> list[str]:
    """The share of the pairs that the map speaks for, and the pairs that were left out before."""
    share = []
    if circuit.speaks_for is not None:
        used, tried = circuit.speaks_for
        share = [
            f"The map speaks for {used} of the {tried} pairs that were tried: those whose harmful prompt the model "
            "refuses and whose harmless prompt it answers."
        ]
    return share + [f"Before that: {note}." for note in circuit.provenance.options.get("left_out", [])]


def concentration(circuit: RefusalCircuit) -> str:
    """How small a share of the candidates restores the target, in a word or two.

    Returns:
        ``concentrated`` (below 10 %), ``moderately spread`` (10 to 33 %), ``spread out`` (above 33 %),
        ``target not reached``, or ``not measured``.
    """
    needed = first_reaching(circuit)
    if not any(math.isfinite(point.held_out) for point in sizes(circuit)):
        return "not measured"
    if needed is None:
        return "target not reached"
    if needed.k < CONCENTRATED_BELOW:
        return "concentrated"
    return "moderately spread" if needed.k <= MODERATE_BELOW else "spread out"


def first_reaching(circuit: RefusalCircuit) -> CurvePoint | None:
    """The smallest size that reaches the target on held-out pairs, if any does."""
    target = circuit.verification.target
    # a NaN reaches no target
    return next((point for point in sizes(circuit) if point.held_out >= target), None)


def verdict(circuit: RefusalCircuit) -> str:
    """Plain words on how concentrated or spread out the mechanism is, from the held-out curve."""
    points, target, total = sizes(circuit), circuit.verification.target, circuit.n_candidates
    needed = first_reaching(circuit)
    if not any(math.isfinite(point.held_out) for point in points):
        return "There is no curve of faithfulness over size."
    small = next((point for point in points if point.n_nodes >= 10), points[-1])
    unit = units(circuit, small.n_nodes)
    best_ones = f"{small.n_nodes} best {unit} restore" if small.n_nodes > 1 else f"best {unit} restores"
    opening = f"The {best_ones} {percent(small.held_out)} of the gap on held-out pairs"
    if needed is None:
        best = max(points, key=lambda point: (point.held_out, -point.n_nodes))
        return (
            f"{opening}. The target of {percent(target)} is never reached: the most faithful size tried, "
            f"{best.n_nodes} of {total} {units(circuit)}, restores {percent(best.held_out)}. These {units(circuit)} do "
            "not explain the refusal; read the picture as a partial account."
        )
    amount = f"{needed.n_nodes} of {total} ({percent(needed.k)}) are enough for {percent(target)}"
    parts = "edges" if circuit.level == "edge" else "parts"
    if needed.k < CONCENTRATED_BELOW:
        close = f"this refusal mechanism is concentrated in a small set of {parts}."
    elif needed.k <= MODERATE_BELOW:
        close = f"this refusal mechanism is moderately spread: a sizeable minority of the {parts} carries it."
    else:
        amount = amount.replace("are enough", "are needed")
        close = f"this refusal mechanism is spread out; the circuit is not a small set of {parts}."
    return f"{opening}; {amount}: {close}"


def judged(circuit: RefusalCircuit) -> float:
    """Faithfulness on the pairs that the random controls were measured on."""
    check = circuit.verification
    if check.random_controls.observed is not None:
        return check.random_controls.observed
    return check.held_out_faithfulness if check.fresh is None else check.fresh.faithfulness


def checked_on(circuit: RefusalCircuit) -> str:
    """Name of the pairs that the checks were measured on."""
    return "held-out pairs" if circuit.verification.fresh is None else "fresh pairs"


def some_pairs(circuit: RefusalCircuit, n_pairs: int | None) -> str:
    """That random circuits were measured on some of the pairs, where they were."""
    check = circuit.verification
    if n_pairs is None or check.fresh is None or n_pairs >= check.fresh.n:
        return ""
    return f" on {n_pairs} of the {check.fresh.n} fresh pairs"


def chance(circuit: RefusalCircuit) -> str:
    """Plain words on the random controls."""
    controls = circuit.verification.random_controls
    if not controls.n:
        return "Not measured: no random circuits were drawn."
    text = (
        f"{controls.n} circuits of the same size, drawn at random, restore {percent(controls.mean)} on average and "
        f"{percent(controls.highest)} at best{some_pairs(circuit, controls.n_pairs)}, "
        f"against {percent(judged(circuit))} for this one ({p_value(circuit.verification.random_p)})."
    )
    if circuit.verification.random_p < 0.05:
        return f"{text} The circuit is better than chance."
    chosen = f"the data do not support this choice of {units(circuit)}."
    return f"{text} By the usual 0.05 rule the circuit is not better than chance: {chosen}"


def necessity(circuit: RefusalCircuit) -> str:
    """Plain words on what is lost without the circuit."""
    lost = circuit.verification.necessity
    if not math.isfinite(lost):
        return "Not measured: the circuit as a whole was not taken out."
    text = (
        "When the whole circuit gets its values from the harmless run and every other part keeps its own, "
        f"{percent(lost)} of the gap is lost on {checked_on(circuit)}."
    )
    text += f" {_against_random_removal(circuit)}"
    if lost >= 0.8:
        return text
    if lost >= 0.3:
        return f"{text} Parts outside the circuit keep up some of the refusal."
    return f"{text} Most of the refusal survives without the circuit: other parts can replace it."


def _against_random_removal(circuit: RefusalCircuit) -> str:
    """Plain words on whether the refusal needs this circuit more than random circuits of its size."""
    check = circuit.verification
    claim = next((claim for claim in check.claims if claim.name == "necessity"), None)
    controls = check.necessity_controls
    if controls is None or claim is None or claim.passed is None:
        return "It was not measured whether removing random circuits of its size loses as much."
    text = (
        f"Removing one of {controls.n} random circuits of its size loses {percent(controls.mean)} on average"
        f"{some_pairs(circuit, controls.n_pairs)} ({p_value(claim.p_value)})"
    )
    if claim.passed:
        return f"{text}: the refusal depends on this circuit more than on a random one."
    return f"{text}: this does not show that the refusal depends on this circuit more than on a random one."


def first_look(circuit: RefusalCircuit) -> str:
    """What a reader has to know first: that there is no circuit, or that a map is only a first look; or nothing."""
    no_circuit = "No circuit: the time budget ended before edges and roles were measured. These parts are a ranking."
    preliminary = "Preliminary: a first look on few pairs, with fewer checks."
    return " ".join([no_circuit] * circuit.unfinished + [preliminary] * circuit.preliminary)


def ablation(circuit: RefusalCircuit) -> str:
    """What everything outside a circuit takes while it is measured."""
    if circuit.ablation == "mean":
        return "While a circuit is measured, every part outside it takes its mean over the harmless prompts."
    if circuit.ablation == "optimal":
        return (
            "While a circuit is measured, every part outside it takes a constant, which was learned on the discovery "
            "pairs so that it changes the metric least."
        )
    return "While a circuit is measured, every part outside it takes its value in the pair's harmless prompt."


def checks(circuit: RefusalCircuit) -> list[tuple[str, str]]:
    """The verdict on the circuit: how many checks hold, then the names of the checks with each verdict."""
    tested, found = circuit.verification.tested, circuit.verification.by_verdict
    if not tested:
        return []
    held = found.get("holds", ())
    first = f"{circuit.verification.tally} {'checks hold' if len(tested) > 1 else 'check holds'}"
    verbs = {  # of one check, of more
        "fails": ("fails", "fail"),
        "undecided": ("is undecided", "are undecided"),
        "not measured": ("was not measured", "were not measured"),
        "holds by construction": ("holds by construction", "hold by construction"),
    }
    rows = [(first, ", ".join(held))]
    for verdict, (one, more) in verbs.items():
        names = found.get(verdict, ())
        rows += [(f"{len(names)} {one if len(names) == 1 else more}", ", ".join(names))] if names else []
    return rows


def finding(circuit: RefusalCircuit) -> str:
    """The result in a few sentences."""
    check = circuit.verification
    what = "edges" if circuit.level == "edge" else "parts"
    if not math.isfinite(check.held_out_faithfulness):
        return f"{size(circuit)} of {circuit.n_candidates} candidate {what}; not verified as a whole."
    asked = percent(check.target) if check.goal == "reach" else f"{percent(check.target)} to {percent(check.aim.most)}"
    enough = "which meets" if check.reached else "which misses"
    where = "held-out topics" if any(check.held_out_topics) else "held-out pairs"
    text = (
        f"{size(circuit)} of {circuit.n_candidates} candidate {what} ({percent(size_share(circuit))}) restore "
        f"{percent(check.held_out_faithfulness)} of the difference between refusing and complying on {where}, "
        f"{enough} the goal of {'at least ' if check.goal == 'reach' else ''}{asked}. This goal set their number"
    )
    if check.fresh is not None:
        text += f". On {check.fresh.n} fresh pairs, which were used for nothing before, they restore "
        text += percent(check.fresh.faithfulness)
    if check.overshoots:
        text += f". On {' and on '.join(check.overshoots)} they restore more than the whole model: parts that work"
        text += " against refusal are missing, and the goal match asks for a circuit that holds them"
    against = sum(member.opposes for member in circuit.nodes)
    if against:
        text += f". {against} of the nodes work" if against > 1 else ". One of the nodes works"
        text += " against refusal"
    if not check.random_controls.n:
        return f"{text}. No random sets of the same size were drawn."
    return f"{text}. Random sets of the same size restore {percent(check.random_controls.mean)} on average."
