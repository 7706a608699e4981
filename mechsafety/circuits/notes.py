"""What each node of a circuit writes and reads: tokens that it raises, spans that it attends to, where it is active."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.attribution.heads import span_attention
from mechsafety.circuits.circuit import AttentionExample, CircuitNode, Notes
from mechsafety.models import LensModel
from mechsafety.nodes import Node
from mechsafety.patching.masks import PairRuns
from mechsafety.patching.senders import node_outputs
from mechsafety.prompts import PromptPairs
from mechsafety.prompts.spans import SPANS
from mechsafety.sites import Site, SiteKind

# number of attention-pattern entries that a map keeps: about a megabyte, with which a report stays well below 8 MB
ATTENTION_ENTRIES = 750_000
# number of nodes whose logits are held at a time
_BATCH = 64


def measure_notes(
    model: LensModel, runs: PairRuns, pairs: PromptPairs, nodes: Sequence[Node], *, n_tokens: int = 8
) -> dict[Node, Notes]:
    """Notes of heads, MLPs and neurons, from stored runs and one additional forward pass.

    The tokens come from direct logit attribution (Elhage et al. 2021), over all tokens instead of a few.

    1. Take what the node writes at the last token, on harmful less on harmless prompts.
    2. Pass it through the final norm (with the scale of each run) and the unembedding.
    3. Take the mean over pairs, and subtract the mean over the vocabulary.

    This is the direct effect alone. An early node may act through later nodes and raise other tokens through them.
    Behind a norm after attention or MLP (`LensModel.post_norm`), a head or neuron writes its share of the norm of the
    sum, with the scale of each run.

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
    written = {node: _contrast(model, runs, node) for node in nodes}
    tokens = _tokens(model, written, n_tokens)
    spans = span_attention(model, runs).mean(2) if any(node.kind == "head" for node in nodes) else None
    texts = _texts(model, pairs, [node for node in nodes if node.kind == "neuron"])
    found = {}
    for node in nodes:
        looks = None
        if node.kind == "head" and spans is not None:
            looks = dict(zip(SPANS, spans[node.layer, node.index].tolist(), strict=True))
        found[node] = Notes(*tokens.get(node, ((), ())), looks, texts.get(node, ()))
    return found


def _contrast(model: LensModel, runs: PairRuns, node: Node) -> Float[Tensor, " d_model"]:
    """What the node adds to the final norm's output at the last token, harmful less harmless, mean over pairs."""
    found = []
    for run in (runs.harmful, runs.harmless):
        norm = model.frozen_final_norm(run.resid[-1][:, -1])
        written = node_outputs(model, run, [node], at=slice(-1, None))[0, :, 0]
        found.append((norm(written) - norm(torch.zeros_like(written))).mean(0))
    return found[0] - found[1]


def _tokens(
    model: LensModel, written: dict[Node, Tensor], n_tokens: int
) -> dict[Node, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Tokens that each vector raises, and those that it lowers, strongest first."""
    found = {}
    nodes = list(written)
    weights = model.W_U.float()
    for first in range(0, len(nodes), _BATCH):
        some = nodes[first : first + _BATCH]
        logits = torch.stack([written[node] for node in some]) @ weights
        logits = logits - logits.mean(-1, keepdim=True)
        for node, row in zip(some, logits, strict=True):
            found[node] = (_strongest(model, row, n_tokens), _strongest(model, -row, n_tokens))
    return found


def _strongest(model: LensModel, row: Float[Tensor, " d_vocab"], n_tokens: int) -> tuple[str, ...]:
    values, ids = row.topk(min(n_tokens, len(row)))
    kept = [token for token, value in zip(ids.tolist(), values.tolist(), strict=True) if value > 0]
    return tuple(model.tokenizer.decode([token]) for token in kept)


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
