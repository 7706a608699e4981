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
        "Pairs of prompts that differ in whether the request is harmful. Nodes are ranked on discovery pairs. "
        "Held-out pairs (of other topics, where pairs have topics) set the size of the circuit. Faithfulness on "
        "them therefore lies just above the target by construction. Fresh pairs are used for the checks alone. "
        "Trust the figures on fresh pairs.",
    ),
    Entry(
        "Metric, score",
        "One number per prompt, read from the model's next-token logits. It is high when the model is about to "
        "refuse, low when it is about to comply. It is read where the reply begins, or after the opener: the "
        "first words that the replies share. The last token of each prompt is then the opener's. Provenance lists"
        " the metric's name, tokens and opener.",
    ),
    Entry(
        "Refusal rate",
        "Share of greedy replies that are judged to be refusals, with Wilson's 95 % interval. A refusal has a "
        "refusal phrase in its first sentence. If the user chose the refusal tokens, it is the share of prompts "
        "with a metric above 0.",
        "(p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), z = 1.96",
    ),
    Entry(
        "Degenerate reply",
        "A reply that is not text: it is empty, it is a loop (over half of its runs of four words were said "
        "before), or most of it is in a script that the prompt does not use. After an intervention, also a reply "
        "that the unedited model finds less likely than sound text that answers something else. A model that "
        "babbles refuses less but does not comply.",
    ),
    Entry(
        "Gap",
        "The difference that refusal makes to the metric. Every effect is a share of the gap.",
        "gap = mean score on harmful prompts - mean score on harmless prompts",
    ),
    Entry(
        "Node",
        "A part that the search could choose: an attention head (L4.H3: layer 4, head 3; in pictures 4.3), a "
        "layer's MLP (L4.MLP; in pictures M4), or one MLP neuron (L4.N17; in pictures N17).",
    ),
    Entry(
        "Effect of a node",
        "Share of the gap that is lost when this node alone gets its values from the paired harmless prompt. At "
        "1, the gap vanishes. A negative effect means that the node works against refusal.",
        "effect = (score - score with the node's harmless-run values) / gap",
    ),
    Entry(
        "Gradient estimate",
        "An estimate of the same effect from gradients, without a run per node. It is cheap, but often wrong for "
        "large or saturating parts. It ranks candidates; it is not evidence.",
    ),
    Entry(
        "95 % interval",
        "Interval over prompts (or pairs): the range of the number with other prompts of this kind. It says "
        "nothing about other kinds of prompts.",
    ),
    Entry(
        "p, adjusted",
        "Chance of an effect at least this large if its sign were random from prompt to prompt (sign-flip "
        "permutation). It is adjusted by Benjamini and Hochberg over all measured nodes.",
    ),
    Entry(
        "Status",
        "estimated: only a gradient estimate. measured: exact effect. verified: measured; the effect is positive "
        "with an adjusted p below 0.05; and the circuit's faithfulness falls without the node, on some of the fresh "
        "pairs (on held-out ones if there are none). rejected: the measurement contradicts the estimate; only in files "
        "made elsewhere, a map never assigns it.",
    ),
    Entry(
        "Role",
        "production: at least half of the node's effect is its path to the logits. detection: at least half of it is "
        "read straight from the embeddings. decision: at least half of it goes to production nodes and the logits, "
        "patched together. relay: at least half of it is read from nodes whose writing the node repeats. evaluation: "
        "at least half of it goes to decision nodes, relays and other evaluation nodes, patched together. A node "
        "that no rule fits gets the role of its largest share. none: all these paths together carry less than half "
        "of its effect.",
    ),
    Entry(
        "Role evidence",
        "All of it is measured in the circuit, with every node outside at its harmless value. All numbers are shares "
        "of the gap between harmful and harmless prompts: what is lost when the node reads, or sends, its harmless "
        "value on these paths alone. A node repeats what another wrote if what it reads of it and what it writes have "
        "a cosine of at least 0.7. At instruction, at suffix: the effect of patching only those positions; no role "
        "rests on these two.",
    ),
    Entry(
        "Effect of an edge",
        "Share of the gap that runs along this one direct path from sender to receiver.",
        "effect = (score - score with only this path's harmless-run value) / gap",
    ),
    Entry(
        "Slot",
        "The input by which an edge enters a node: a head's query (q), key (k) or value (v), an MLP (mlp), or the"
        " final residual stream (resid).",
    ),
    Entry(
        "Faithfulness",
        "How much of the behaviour the circuit carries when everything outside it gets its values from the "
        "harmless run. 1 is the whole model, 0 is no circuit at all.",
        "faithfulness = (m(circuit) - m(empty)) / (m(model) - m(empty))",
    ),
    Entry(
        "Necessity",
        "Share of the gap that is lost, on fresh pairs, when the whole circuit gets its values from the harmless "
        "run. High faithfulness with low necessity means that other parts can replace the circuit.",
    ),
    Entry(
        "Random controls",
        "Random circuits with as many heads and MLPs as the circuit, measured on some of the fresh pairs (on held-out "
        "pairs if there are none). The circuit that they are compared with is measured on the same pairs.",
        "p = (1 + number at least as faithful as the circuit) / (1 + number drawn)",
    ),
    Entry(
        "Curve, k",
        "Faithfulness when only the best share k of all candidates is kept, for growing k.",
    ),
    Entry(
        "CMD, CPR",
        "Two numbers that sum up the curve. CMD is the area between the held-out curve and 1, over k (0 is best)."
        " CPR is the area under the held-out curve, over k (close to 1 if every size does as much as the whole model).",
    ),
    Entry(
        "Concentrated or spread out",
        "The smallest share of the candidates that restores at least the target on held-out pairs decides: below 10 % "
        "is concentrated, 10 to 33 % moderately spread, above 33 % spread out.",
    ),
    Entry(
        "Completeness",
        "Whether the circuit holds everything that matters: when the same parts are removed from both, circuit "
        "and model should lose the same.",
    ),
    Entry(
        "Minimality",
        "Whether every node is needed: the faithfulness that is lost by removing each single node.",
    ),
    Entry(
        "Backup",
        "A part that replaces a primary part when that is patched. Patched alone, the backup hardly matters. "
        "Patched together with the primary part, it does. The interval and p are those of the joint effect less "
        "the sum of the single effects.",
        "excess = effect(all together) - sum of effect(each alone)",
    ),
    Entry(
        "Attention",
        "How much a head looks at each earlier token (column) from each token (row). It shows where a head reads,"
        " but not what it does with it.",
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
        "Integrated gradients over masks. A mask blends a part between its value on the harmless counterfactual "
        "prompt (0) and its own value (1). The scores of all parts sum to 1, except for the integration error.",
        "estimate(node) = integral from 0 to 1 of d metric / d mask(node), at mask = a for all parts, da / gap",
    ),
    Entry(
        "Search",
        "1. Find a small prefix of the ranking that meets the goal on discovery and on held-out pairs. "
        "2. Remove the parts whose exact removal changes least, while the circuit still meets the goal.",
        "faithfulness(C) = (m(C) - m(empty)) / (m(model) - m(empty))",
    ),
    Entry(
        "Node effects",
        "Exact activation patching: the part alone gets its values from the harmless run; everything after it "
        "runs live. Intervals over prompts; sign-flip permutation p, adjusted by Benjamini and Hochberg.",
        "effect(node) = (m(harmful) - m(patched)) / gap",
    ),
    Entry(
        "Edges",
        "Path patching along the direct path into one slot. Where this was not measured, the gradient estimate "
        "(edge attribution).",
        "estimate(u, v, slot) = change of u times d metric / d input of v's slot, averaged between the runs",
    ),
    Entry("Roles", "Rules on measured shares: production, detection, decision, relay, evaluation; see Role."),
    Entry(
        "Checks",
        "On fresh pairs that played no part in the search: faithfulness and necessity; and on some of these pairs "
        "random circuits of the same size and the cost of removing each single part.",
        "p = (1 + number at least as faithful) / (1 + number drawn)",
    ),
)
