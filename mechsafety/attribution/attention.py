"""What heads look at on one prompt."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.conversation import Conversation, PromptLike
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import prompt_text, public
from mechsafety.models import LensModel
from mechsafety.models.parts import check_exists
from mechsafety.nodes import Node, NodeLike, as_node, as_nodes
from mechsafety.results import Provenance, Result, visible
from mechsafety.sites import Site, SiteKind


@dataclass(frozen=True, slots=True, repr=False)
class AttentionPatterns(Result):
    """Attention of some heads on one prompt. A notebook shows it as an interactive figure of CircuitsVis.

    Attributes:
        provenance: Model, options, versions.
        prompt: The prompt, without its chat template.
        tokens: Text of each token, the chat template's included.
        heads: The heads.
        patterns: How much each head looks from a token (query) at each token up to it (key). A row sums to 1.

    Example:
        >>> found = ms.attribution.attention_patterns(model, harmful[0], "L0.H1")
        >>> found.patterns.shape  # head, query, key
        torch.Size([1, 10, 10])
        >>> found.to_dataframe().columns.tolist()
        ['head', 'query', 'query_token', 'key', 'key_token', 'attention']
    """

    provenance: Provenance
    prompt: str | Conversation
    tokens: tuple[str, ...]
    heads: tuple[Node, ...]
    patterns: Float[Tensor, "head query key"]

    def __repr__(self) -> str:
        names = ", ".join(map(str, self.heads[:4])) + (" ..." if len(self.heads) > 4 else "")
        return f"AttentionPatterns({names} on {len(self.tokens)} tokens)"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per head, query and key (up to the query): their positions and texts, and the attention."""
        n = len(self.tokens)
        rows = [
            (str(head), query, self.tokens[query], key, self.tokens[key], float(self.patterns[k, query, key]))
            for k, head in enumerate(self.heads)
            for query in range(n)
            for key in range(query + 1)
        ]
        return pd.DataFrame(rows, columns=["head", "query", "query_token", "key", "key_token", "attention"])

    def plot(self, head: NodeLike | None = None) -> go.Figure:
        """Heat map of one head: queries down, keys to the right, with the tokens on both axes.

        Args:
            head: The head; the first one by default.

        Raises:
            MechsafetyError: A head that is not among `heads`.
        """
        chosen = self.heads[0] if head is None else as_node(head)
        if chosen not in self.heads:
            raise MechsafetyError(f"{chosen} is not among the heads", expected=", ".join(map(str, self.heads)))
        names = [html.escape(visible(token)) for token in self.tokens]
        places = list(range(len(names)))
        figure = go.Figure(
            go.Heatmap(
                z=self.patterns[self.heads.index(chosen)].tolist(),
                colorscale="Blues",
                zmin=0,
                zmax=1,
                colorbar={"title": {"text": "attention"}, "thickness": 14},
                hovertemplate="from %{y} to %{x}: %{z:.3f}<extra></extra>",
            )
        )
        figure.update_xaxes(title_text="key: the token looked at", tickvals=places, ticktext=names, tickangle=-60)
        figure.update_yaxes(title_text="query: the token that looks", tickvals=places, ticktext=names)
        figure.update_yaxes(autorange="reversed")
        side = 260 + 17 * len(names)
        return figure.update_layout(title_text=f"Attention of {chosen}", width=side + 120, height=side)

    def to_html(self, view: Literal["patterns", "heads"] = "patterns") -> str:
        """A page with an interactive figure of CircuitsVis, in one file that needs no network.

        Args:
            view: ``patterns`` colours the text by what each head looks at; ``heads`` shows the matrices.
        """
        from mechsafety.viz.attention import patterns_page

        return patterns_page(self.prompt, self.tokens, self.heads, self.patterns, view=view)

    def _repr_html_(self) -> str:
        from mechsafety.viz.html import frame

        return frame(self.to_html(), "Attention of " + ", ".join(map(str, self.heads)), 520)


@public
def attention_patterns(model: LensModel, prompt: PromptLike, heads: NodeLike | Sequence[NodeLike]) -> AttentionPatterns:
    """Run one prompt and keep what the heads look at.

    Args:
        model: The model.
        prompt: A text or a list of chat messages; the chat template renders it.
        heads: Heads, each as a `Node` or by its name (``"L14.H2"``).

    Raises:
        MechsafetyError: No heads, a node that is not a head, or one that the model lacks.

    Example:
        >>> found = ms.attribution.attention_patterns(model, harmful[0], ["L0.H1", "L3.H1"])
        >>> [str(head) for head in found.heads]
        ['L0.H1', 'L3.H1']
    """
    chosen = as_nodes(heads)
    if not chosen:
        raise MechsafetyError("no heads", expected="at least one, such as 'L14.H2'")
    for node in chosen:
        if node.kind != "head":
            raise MechsafetyError(f"{node} has no attention", expected="a head, such as 'L14.H2'")
        check_exists(model, node)
    sites = {node.layer or 0: Site(SiteKind.PATTERN, node.layer) for node in chosen}
    found = model.read(model.tokenize([prompt]), list(sites.values()))
    rows = [found[sites[node.layer or 0]][0, node.index].float().cpu() for node in chosen]
    asked = prompt_text(prompt)
    provenance = model.provenance(options={"prompt": str(asked)})
    return AttentionPatterns(provenance, asked, tuple(model.token_strings(asked)), chosen, torch.stack(rows))
