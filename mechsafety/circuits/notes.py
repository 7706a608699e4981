"""What each node of a circuit writes and reads: tokens that it raises, spans that it attends to, where it is active."""

from collections.abc import Sequence

import torch

from mechsafety.attribution.heads import span_attention
from mechsafety.attribution.promoted import promoted_tokens, written_contrast
from mechsafety.circuits.circuit import AttentionExample, CircuitNode, Notes
from mechsafety.models import LensModel
from mechsafety.nodes import Node
from mechsafety.patching.masks import PairRuns
from mechsafety.prompts import PromptPairs
from mechsafety.prompts.spans import SPANS
from mechsafety.sites import Site, SiteKind

# number of attention-pattern entries that a map keeps: about a megabyte, with which a report stays well below 8 MB
ATTENTION_ENTRIES = 750_000


def measure_notes(
    model: LensModel, runs: PairRuns, pairs: PromptPairs, nodes: Sequence[Node], *, n_tokens: int = 8
) -> dict[Node, Notes]:
    """Notes of heads, MLPs and neurons, from stored runs and one additional forward pass.

    The tokens are those of `mechsafety.attribution.describe_nodes`. Behind a norm after attention or MLP
    (`LensModel.post_norm`), a head or neuron writes its share of the norm of the sum, with the scale of each run.

    Args:
        model: The model.
        runs: Stored runs of the pairs. If neurons are among the nodes, the runs must hold ``neurons``.
        pairs: The pairs that were run.
        nodes: The nodes to describe.
        n_tokens: Largest number of raised tokens, and of lowered tokens.

    Returns:
        Notes by node. Heads have spans: the mean attention of the last token on harmful prompts. Neurons have their
        activations over the first pair's two prompts.
    """
    written = {str(node): written_contrast(model, runs, node) for node in nodes}
    tokens = promoted_tokens(model, written, n_tokens)
    spans = span_attention(model, runs).mean(2) if any(node.kind == "head" for node in nodes) else None
    texts = _texts(model, pairs, [node for node in nodes if node.kind == "neuron"])
    found = {}
    for node in nodes:
        looks = None
        if node.kind == "head" and spans is not None:
            looks = dict(zip(SPANS, spans[node.layer, node.index].tolist(), strict=True))
        up, down = (tuple(token for token, _ in side) for side in tokens[str(node)])
        found[node] = Notes(up, down, looks, texts.get(node, ()))
    return found


def _texts(
    model: LensModel, pairs: PromptPairs, neurons: Sequence[Node]
) -> dict[Node, tuple[tuple[tuple[str, ...], tuple[float, ...]], ...]]:
    """Activations of neurons over the tokens of the first pair's two prompts."""
    if not neurons:
        return {}
    sites = {node: Site(SiteKind.NEURONS, node.layer) for node in neurons}
    rows: dict[Node, list[tuple[tuple[str, ...], tuple[float, ...]]]] = {node: [] for node in neurons}
    for prompt in (pairs.harmful[0], pairs.harmless[0]):
        words = tuple(model.token_strings(prompt))
        acts = model.read(model.tokenize([prompt]), list(dict.fromkeys(sites.values())))
        for node in neurons:
            values = acts[sites[node]][0, :, node.index].float()
            rows[node].append((words, tuple(float(f"{value:.4g}") for value in values.tolist())))
    return {node: tuple(found) for node, found in rows.items()}


def attention_examples(
    model: LensModel, pairs: PromptPairs, nodes: Sequence[CircuitNode], max_entries: int = ATTENTION_ENTRIES
) -> tuple[AttentionExample, ...]:
    """Attention of the circuit's heads on the first pair; of the strongest heads alone where all are too many.

    Args:
        model: The model.
        pairs: Pairs, of which the first is shown.
        nodes: The nodes of the circuit.
        max_entries: Largest number of pattern entries in total; a page needs a little over one byte per entry.
    """
    prompts = (pairs.harmful[0], pairs.harmless[0])
    words = [tuple(model.token_strings(prompt)) for prompt in prompts]
    room = max_entries // sum(len(tokens) ** 2 for tokens in words)
    heads = sorted((member for member in nodes if member.node.kind == "head"), key=lambda m: -abs(m.effect))
    strongest = sorted((member.node for member in heads[:room]), key=lambda node: node.order)
    if not strongest:
        return ()
    examples = []
    for prompt, tokens in zip(prompts, words, strict=True):
        pattern = model.cache([prompt], sites=["pattern"]).pattern
        rows = torch.stack([pattern[node.layer, node.index, 0] for node in strongest])
        examples.append(AttentionExample(prompt, tokens, tuple(strongest), rows))
    return tuple(examples)
