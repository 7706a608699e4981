"""Before and after: what a circuit's nodes do once some of them are ablated."""

import functools
from collections.abc import Callable, Sequence

from mechsafety.circuits.circuit import Ablation, RefusalCircuit
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Count, public
from mechsafety.interventions import ablate
from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel
from mechsafety.nodes import Node, NodeLike, as_nodes
from mechsafety.patching import activation_patching
from mechsafety.prompts import PromptPairs
from mechsafety.replies import REPLY_TOKENS, JudgedReplies, check_unedited, judge_replies
from mechsafety.scale.work import sweeps

PAIRS = 8


@sweeps
@public
def measure_ablation(
    model: LensModel,
    pairs: PromptPairs,
    metric: RefusalLogOdds,
    nodes: NodeLike | Sequence[NodeLike],
    *,
    watched: Sequence[NodeLike] = (),
    replies: bool = False,
    known: JudgedReplies | None = None,
    reply_tokens: Count = REPLY_TOKENS,
    progress: bool = True,
) -> Ablation:
    """Ablate nodes (`mechsafety.ablate`, mean over the pairs' harmless prompts) and measure again.

    Args:
        model: The model. It is unedited again afterwards, even after an exception.
        pairs: Pairs, of which those that align are taken.
        metric: The metric to measure.
        nodes: The nodes to ablate.
        watched: Nodes whose effects are measured again. In the ablated model, each node gets the values that it has
            there on the harmless prompt. The loss is a share of the unedited model's gap, so that effects before and
            after compare. Watched nodes that are among ``nodes`` are left out.
        replies: Whether to generate replies to the harmful prompts too and to judge their kinds. A model that babbles
            refuses less but does not comply.
        known: Judged replies of the unedited model to the harmful prompts (`unedited_replies`), if they are known.
        reply_tokens: Length of replies, in tokens. 100 as in published protocols, because the kind of a reply often
            shows only after its opener.
        progress: Whether to show bars.

    Raises:
        MechsafetyError: No pair that aligns, no gap to take shares of, a node that the model lacks, or known replies to
            other prompts. Where replies are judged, also a model that is already edited.

    Example:
        >>> before, after = ms.circuits.measure_ablation(model, pairs, metric, "L0.H1").score
        >>> before > 0 > after
        True
    """
    nodes, watched = as_nodes(nodes), as_nodes(watched)
    pairs = pairs.aligned(model)
    before = _scores(model, pairs, metric)
    gap = before[0] - before[1]
    if not abs(gap) > 0:
        raise MechsafetyError("no gap between harmful and harmless prompts", expected="a metric that differs")
    if known is not None and known.prompts != tuple(pairs.harmful):
        raise MechsafetyError(
            f"known replies to {len(known.prompts)} other prompts",
            expected=f"replies to the {len(pairs)} harmful prompts of the pairs",
            hint="known=unedited_replies(model, pairs)",
        )
    others = [node for node in watched if node not in set(nodes)]
    said = unedited_replies(model, pairs, reply_tokens, progress=progress) if replies and known is None else known
    with ablate(model, nodes, prompts=pairs.harmless):
        after = _scores(model, pairs, metric)
        effects = {}
        if others:
            found = activation_patching(model, pairs, metric, nodes=others, progress=progress)
            effects = dict(zip(others, (found.changes.double().mean(1) / gap).tolist(), strict=True))
        texts = model.generate(pairs.harmful, reply_tokens, progress=progress) if replies else []
    names = ", ".join(map(str, nodes[:4])) + (f" and {len(nodes) - 4} more" if len(nodes) > 4 else "")
    both = None
    if replies and said is not None:
        now = judge_replies(model, pairs.harmful, texts, limit=said.limit)
        both = (said.without_text(), now.without_text())
    return Ablation(f"without {names}", nodes, (before[0], after[0]), effects, both)


def unedited_replies(
    model: LensModel, pairs: PromptPairs, reply_tokens: int = REPLY_TOKENS, *, progress: bool = True
) -> JudgedReplies:
    """The model's replies to the harmful prompts of the pairs that align, before anything is ablated."""
    check_unedited(model)
    prompts = pairs.aligned(model).harmful
    return judge_replies(model, prompts, model.generate(prompts, reply_tokens, progress=progress))


def rerun(
    circuit: RefusalCircuit, model: LensModel, pairs: PromptPairs | None = None, *, replies: bool = False
) -> Callable[[tuple[Node, ...]], Ablation]:
    """A function that ablates nodes of a circuit and measures all its other nodes again; for a widget's boxes.

    Args:
        circuit: The circuit whose metric is used and whose nodes are watched.
        model: The model that was mapped.
        pairs: Pairs to measure on; by default eight of the built-in pairs.
        replies: Whether to generate replies too; those of the unedited model are generated once.

    Raises:
        MechsafetyError: A model other than the one that was mapped.
    """
    other = circuit.provenance.difference(model.provenance())
    if other is not None:
        what, mapped, _ = other
        raise MechsafetyError(
            f"{model.name} has other {what} than the model that was mapped",
            expected=f"{circuit.provenance.model}, {what} {mapped}",
        )
    chosen = (pairs if pairs is not None else PromptPairs.builtin()).aligned(model)
    chosen = chosen if pairs is not None else chosen.sample(PAIRS, 0)
    metric = RefusalLogOdds.from_json(circuit.metric, model)
    watched = [member.node for member in circuit.nodes if not member.evidence.together]

    @functools.cache
    def known() -> JudgedReplies:
        return unedited_replies(model, chosen, progress=False)

    def on_ablate(nodes: tuple[Node, ...]) -> Ablation:
        said = known() if replies else None
        return measure_ablation(
            model, chosen, metric, nodes, watched=watched, replies=replies, known=said, progress=False
        )

    return on_ablate


def _scores(model: LensModel, pairs: PromptPairs, metric: RefusalLogOdds) -> tuple[float, float]:
    """Mean metric on the harmful and on the harmless prompts."""
    harmful, harmless = (metric.scores(model, side).double().mean() for side in (pairs.harmful, pairs.harmless))
    return float(harmful), float(harmless)
