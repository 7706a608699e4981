"""What every number in a report means, with its formula in plain text."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Entry:
    """One term of the report's glossary."""

    term: str
    meaning: str
    formula: str = ""


GLOSSARY = (
    Entry(
        "Harmful and harmless prompts",
        "Pairs of prompts that differ in whether the request is harmful. Nodes are ranked on discovery pairs. Held-out "
        "pairs, of other topics where pairs have topics, set the size of the circuit, so faithfulness on them lies "
        "just above the target by construction. Fresh pairs are used for the checks alone: the figure to trust.",
    ),
    Entry(
        "Metric, score",
        "One number a prompt, read from the model's next-token logits: high when it is about to refuse, low when it is "
        "about to comply. It is read where the reply begins, or after the first words that its replies share (the "
        "opener): then the last token of each prompt is the opener's. Its name, tokens and opener stand under "
        "Provenance.",
    ),
    Entry(
        "Refusal rate",
        "Share of greedy replies judged to be refusals (a refusal phrase in the first sentence; where the user chose "
        "the refusal tokens: share of prompts with a metric above 0), with Wilson's 95 % interval.",
        "(p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), z = 1.96",
    ),
    Entry(
        "Degenerate reply",
        "A reply that is no text: empty, a loop (over half of its runs of four words were said before), or mostly in a "
        "script that the prompt does not use. After an intervention also one that the unedited model finds less likely "
        "than sound text that answers something else. A model that babbles refuses less, and does not comply.",
    ),
    Entry(
        "Gap",
        "The difference that refusal makes to the metric. All effects are shares of it.",
        "gap = mean score on harmful prompts - mean score on harmless prompts",
    ),
    Entry(
        "Node",
        "A part that the search could choose: an attention head (L4.H3: layer 4, head 3; in pictures 4.3), a "
        "layer's MLP (L4.MLP; in pictures M4), or one MLP neuron (L4.N17; in pictures N17).",
    ),
    Entry(
        "Effect of a node",
        "Share of the gap that is lost when this node alone is given the values it has on the paired harmless "
        "prompt. 1 would mean that the gap vanishes; negative, that the node works against refusal.",
        "effect = (score - score with the node's harmless-run values) / gap",
    ),
    Entry(
        "Gradient estimate",
        "The same effect guessed from one gradient instead of a run of its own: cheap, and often off for large or "
        "saturating parts. It ranks candidates; it is not evidence.",
    ),
    Entry(
        "95 % interval",
        "Interval over prompts (or pairs): what the number would range over with other prompts of this "
        "kind. It says nothing about other kinds of prompts.",
    ),
    Entry(
        "p, adjusted",
        "Chance of an effect at least this large if its sign were random from prompt to prompt (sign-flip "
        "permutation), adjusted by Benjamini and Hochberg over all measured nodes.",
    ),
    Entry(
        "Status",
        "estimated: gradient only. measured: exact. verified: measured, positive with adjusted p below 0.05, and "
        "without it the circuit's faithfulness on fresh pairs falls. rejected: only in files made elsewhere, a part "
        "whose measurement did not bear its estimate out; a map never assigns it.",
    ),
    Entry(
        "Role",
        "production: at least half of the node's effect is direct, through the logits. detection: a head, at least "
        "half of whose effect is what it moves from instruction tokens. decision: at least half of its effect arises "
        "at the template tokens after the instruction, and its direct paths feed production. evaluation: fed by "
        "detection, feeds decision or production. none: no rule fitted. A role sums up the evidence beside it and is "
        "no further fact.",
    ),
    Entry(
        "Role evidence",
        "Direct: effect straight through the logits. At instruction, at suffix: exact effect of patching only at "
        "those positions. What it moves from instruction tokens: exact effect of replacing only what a head "
        "carries from there. Attention from suffix to instruction: mean attention, 0 to 1. Received from "
        "detection, sent to decision and production: summed direct-path effects.",
    ),
    Entry(
        "Effect of an edge",
        "Share of the gap that runs along this one direct path from sender to receiver.",
        "effect = (score - score with only this path's harmless-run value) / gap",
    ),
    Entry(
        "Slot",
        "Where an edge enters: a head's query (q), key (k) or value (v), an MLP (mlp), or the final residual "
        "stream (resid).",
    ),
    Entry(
        "Faithfulness",
        "How much of the behaviour the circuit carries when everything outside it is given its harmless-run "
        "values. 1: as the whole model; 0: as with nothing.",
        "faithfulness = (m(circuit) - m(empty)) / (m(model) - m(empty))",
    ),
    Entry(
        "Necessity",
        "Share of the gap lost, on fresh pairs, when the whole circuit gets its harmless-run values. High "
        "faithfulness with low necessity means that other parts can stand in.",
    ),
    Entry(
        "Random controls",
        "Circuits with as many heads and as many MLPs, drawn at random, on fresh pairs (on held-out ones if there are "
        "none).",
        "p = (1 + number at least as faithful as the circuit) / (1 + number drawn)",
    ),
    Entry(
        "Curve, k",
        "Faithfulness when only the best k of all candidates are kept, for growing k.",
    ),
    Entry(
        "CMD, CPR",
        "The curve in one number each. CMD: area between the held-out curve and 1, over k (0 is best). CPR: area "
        "under the held-out curve, over k (1 is the whole model at every size).",
    ),
    Entry(
        "Concentrated or spread out",
        "By the smallest share of the candidates that reaches the target on held-out pairs: below 10 % "
        "concentrated, 10 to 33 % moderately spread, above 33 % spread out.",
    ),
    Entry(
        "Completeness",
        "Whether nothing that matters was left out: the circuit should still behave like the model when parts of "
        "both are removed.",
    ),
    Entry(
        "Minimality",
        "Whether nothing superfluous is in it: the faithfulness lost by removing each single node.",
    ),
    Entry(
        "Backup",
        "A part that stands in for another: patched alone it hardly matters, patched together with the other it does. "
        "The interval and p are of the joint effect less the effects of the members alone.",
        "excess = effect(all together) - sum of effect(each alone)",
    ),
    Entry(
        "Attention",
        "For each token (row) how much a head looks at each earlier token (column). It shows where a head reads, "
        "not what it does with it.",
    ),
)

# how the numbers were made, in the order of the analysis
METHODS = (
    Entry(
        "Behaviour",
        "Every prompt is rendered with the model's chat template and scored where the metric reads. Pairs that the "
        "model does not treat as expected are left out of what follows.",
        "gap = mean score(harmful) - mean score(harmless)",
    ),
    Entry(
        "Ranking",
        "Integrated gradients over masks that blend every part between its value on the harmless counterfactual (0) "
        "and its own (1). The scores of all parts sum to 1 but for the error of the integration.",
        "estimate(node) = integral from 0 to 1 of d metric / d mask(node), at mask = a for all parts, da / gap",
    ),
    Entry(
        "Search",
        "The smallest prefix of the ranking that reaches the target on discovery and on held-out pairs, then removal "
        "of the parts whose loss costs least, measured exactly.",
        "faithfulness(C) = (m(C) - m(empty)) / (m(model) - m(empty))",
    ),
    Entry(
        "Node effects",
        "Exact activation patching: the part alone gets its harmless-run values, everything after it runs. "
        "Intervals over prompts; sign-flip permutation p, adjusted by Benjamini and Hochberg.",
        "effect(node) = (m(harmful) - m(patched)) / gap",
    ),
    Entry(
        "Edges",
        "Path patching along the direct path into one slot; the gradient estimate (edge attribution) where it was not "
        "measured.",
        "estimate(u, v, slot) = change of u times d metric / d input of v's slot, averaged between the runs",
    ),
    Entry("Roles", "Rules on measured shares, in the order production, detection, decision, evaluation; see Role."),
    Entry(
        "Checks",
        "Fresh pairs that played no part: faithfulness, size-matched random circuits, necessity, and what each single "
        "part's removal costs.",
        "p = (1 + number at least as faithful) / (1 + number drawn)",
    ),
)
