"""Which tokens a head, an MLP, a neuron or a direction promotes through the unembedding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Count, public
from mechsafety.models import LensModel
from mechsafety.models.parts import check_patchable
from mechsafety.nodes import Node, NodeLike, as_node, as_nodes
from mechsafety.patching import pair_runs
from mechsafety.patching.masks import PairRuns, aligned_pairs
from mechsafety.patching.senders import node_outputs
from mechsafety.prompts import PromptPairs, omissions
from mechsafety.results import Provenance, Result, visible
from mechsafety.sites import SiteKind

# number of vectors whose logits are held at a time
_BATCH = 64
Promoted = tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True, repr=False)
class NodeCards(Result):
    """Tokens that nodes and directions promote and suppress.

    Attributes:
        provenance: Model, options, versions.
        names: Names of the nodes; a direction is named by its layer.
        promoted: For each of them, tokens whose logit it raises most, each with that change; strongest first.
        suppressed: The same for tokens whose logit it lowers most.

    Example:
        >>> cards = ms.attribution.describe_nodes(model, "L3.MLP", pairs)
        >>> token, change = cards.promoted[0][0]
        >>> token
        'Sorry'
    """

    provenance: Provenance
    names: tuple[str, ...]
    promoted: tuple[Promoted, ...]
    suppressed: tuple[Promoted, ...]

    def __repr__(self) -> str:
        return f"NodeCards({', '.join(self.names[:4])}{' ...' if len(self.names) > 4 else ''})"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per name and token: the change of the token's logit, the largest first."""
        rows = [
            (name, token, change)
            for name, up, down in zip(self.names, self.promoted, self.suppressed, strict=True)
            for token, change in (*up, *reversed(down))
        ]
        return pd.DataFrame(rows, columns=["node", "token", "logit_change"])

    def plot(self, name: NodeLike | None = None) -> go.Figure:
        """Bar chart of the tokens of one node or direction; of the first one by default.

        Raises:
            MechsafetyError: A node that was not described.
        """
        chosen = self.names[0] if name is None else str(name) if str(name) in self.names else str(as_node(name))
        if chosen not in self.names:
            raise MechsafetyError(f"{chosen} was not described", expected=", ".join(self.names))
        frame = self.to_dataframe()
        frame = frame[frame.node == chosen].iloc[::-1]
        names = [f"{visible(token)} ({k})" for k, token in enumerate(frame.token)]
        figure = go.Figure(go.Bar(x=frame.logit_change, y=names, orientation="h"))
        figure.update_yaxes(tickvals=names, ticktext=[visible(token) for token in frame.token])
        figure.update_xaxes(title_text="change of the token's logit")
        return figure.update_layout(title_text=f"What {chosen} promotes", height=160 + 20 * len(names), width=640)


@public
def describe_nodes(
    model: LensModel,
    nodes: NodeLike | Sequence[NodeLike],
    pairs: PromptPairs | PairRuns,
    *,
    n_tokens: Count = 8,
) -> NodeCards:
    """Tokens that nodes promote on harmful prompts, compared with harmless ones (direct logit attribution).

    1. Take what the node writes at the last token, on harmful less on harmless prompts.
    2. Pass it through the final norm (with the scale of each run) and the unembedding.
    3. Take the mean over pairs, and subtract the mean over the vocabulary.

    This is the direct effect alone (Elhage et al. 2021). An early node may act through later nodes and promote other
    tokens through them.

    Args:
        model: The model.
        nodes: Heads, MLPs and neurons, each as a `Node` or by its name (``"L14.H2"``).
        pairs: Pairs, of which only those that align are used; or their stored runs, which must hold ``neurons`` if
            neurons are described.
        n_tokens: Number of promoted tokens, and of suppressed tokens.

    Raises:
        MechsafetyError: No nodes, a node that the model lacks, or no pair aligns.

    Example:
        >>> cards = ms.attribution.describe_nodes(model, ["L3.H1", "L3.MLP"], pairs, n_tokens=1)
        >>> cards.to_dataframe().columns.tolist()
        ['node', 'token', 'logit_change']
    """
    chosen = as_nodes(nodes)
    if not chosen:
        raise MechsafetyError("no nodes", expected="at least one head, MLP or neuron")
    for node in chosen:
        check_patchable(model, node)
    extra = [SiteKind.NEURONS] if any(node.kind == "neuron" for node in chosen) else []
    pairs = aligned_pairs(model, pairs)
    runs = pairs if isinstance(pairs, PairRuns) else pair_runs(model, pairs, extra=extra)
    written = {str(node): written_contrast(model, runs, node) for node in chosen}
    options = {"pairs": len(runs.harmful), "n_tokens": n_tokens, **omissions(pairs)}
    return node_cards(model, written, n_tokens, options)


def node_cards(model: LensModel, written: Mapping[str, Tensor], n_tokens: int, options: Mapping[str, Any]) -> NodeCards:
    """The cards of vectors behind the final norm, by name."""
    found = promoted_tokens(model, written, n_tokens)
    up, down = zip(*found.values(), strict=True)
    return NodeCards(model.provenance(options=options), tuple(found), up, down)


def written_contrast(model: LensModel, runs: PairRuns, node: Node) -> Float[Tensor, " d_model"]:
    """What the node adds to the final norm's output at the last token, harmful less harmless, mean over pairs."""
    found = []
    for run in (runs.harmful, runs.harmless):
        norm = model.frozen_final_norm(run.resid[-1][:, -1])
        written = node_outputs(model, run, [node], at=slice(-1, None))[0, :, 0]
        found.append((norm(written) - norm(torch.zeros_like(written))).mean(0))
    return found[0] - found[1]


def promoted_tokens(
    model: LensModel, written: Mapping[str, Float[Tensor, " d_model"]], n_tokens: int
) -> dict[str, tuple[Promoted, Promoted]]:
    """Tokens whose logit each vector raises, and those whose logit it lowers, strongest first, with the changes."""
    found = {}
    names = list(written)
    weights = model.W_U.float()
    for first in range(0, len(names), _BATCH):
        some = names[first : first + _BATCH]
        logits = torch.stack([written[name] for name in some]) @ weights
        logits = logits - logits.mean(-1, keepdim=True)
        for name, row in zip(some, logits, strict=True):
            up, down = _strongest(model, row, n_tokens), _strongest(model, -row, n_tokens)
            found[name] = (up, tuple((token, -change) for token, change in down))
    return found


def _strongest(model: LensModel, row: Float[Tensor, " d_vocab"], n_tokens: int) -> Promoted:
    values, ids = row.topk(min(n_tokens, len(row)))
    kept = [(token, value) for token, value in zip(ids.tolist(), values.tolist(), strict=True) if value > 0]
    return tuple((model.tokenizer.decode([token]), value) for token, value in kept)
