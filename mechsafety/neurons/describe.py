"""What single neurons do: tokens they promote and suppress, and tokens they are most active on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from mechsafety.conversation import PromptLike
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Count, Prompts, public
from mechsafety.models import LensModel
from mechsafety.models.engine import base_run, capture, expand_rows
from mechsafety.neurons.masks import mask_nodes, neuron_mask
from mechsafety.neurons.runs import batches, hooked
from mechsafety.nodes import Node, NodeLike, as_nodes
from mechsafety.progress import progress_bar
from mechsafety.results import Provenance, Result
from mechsafety.sites import Site, SiteKind


@dataclass(frozen=True, slots=True)
class ActiveToken:
    """One token on which a neuron is strongly active, with the text before it."""

    token: str
    context: str
    activation: float


@dataclass(frozen=True, slots=True, repr=False)
class NeuronCards(Result):
    """Descriptions of single neurons.

    Attributes:
        provenance: Model, options, versions.
        neurons: The described neurons.
        promoted, suppressed: Tokens whose logits a positive activation raises or lowers most, strongest first.
        active: Tokens of the prompts on which each neuron is most active, by absolute value. The stored activation
            keeps its sign. Empty without prompts.

    Example:
        >>> cards = ms.neurons.describe_neurons(model, ["L3.N3"], harmful)
        >>> cards.to_dataframe().columns.tolist()
        ['node', 'promoted', 'suppressed', 'active']
    """

    provenance: Provenance
    neurons: tuple[Node, ...]
    promoted: tuple[tuple[str, ...], ...]
    suppressed: tuple[tuple[str, ...], ...]
    active: tuple[tuple[ActiveToken, ...], ...]

    def __repr__(self) -> str:
        return f"NeuronCards({len(self.neurons)} neurons)"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per neuron."""
        active = [tuple((row.token, round(row.activation, 3)) for row in rows) for rows in self.active]
        rows = list(zip(map(str, self.neurons), self.promoted, self.suppressed, active, strict=True))
        return pd.DataFrame(rows, columns=["node", "promoted", "suppressed", "active"])

    def plot(self) -> go.Figure:
        """Bar chart of each neuron's strongest activation."""
        import plotly.express as px

        rows = [
            (str(n), a.activation, a.token)
            for n, found in zip(self.neurons, self.active, strict=True)
            for a in found[:1]
        ]
        return px.bar(
            pd.DataFrame(rows, columns=["node", "activation", "token"]), x="node", y="activation", text="token"
        )


@public
def describe_neurons(
    model: LensModel,
    neurons: Tensor | Sequence[NodeLike],
    prompts: Prompts = (),
    *,
    n_tokens: Count = 8,
    batch_size: Count = 16,
    progress: bool = True,
) -> NeuronCards:
    """Tokens that neurons promote, suppress and are active on.

    A neuron's output weights go through the final norm's weight (its scale frozen) and the unembedding. The result is
    what one unit of activation adds directly to each token's logit. Effects through later layers are left out.

    Args:
        model: The model.
        neurons: Nodes, in the order wanted, or a mask. At most 1,000.
        prompts: Chat prompts on whose tokens activations are read.
        n_tokens: Number of tokens in each list.
        batch_size: Number of prompts in one batch.
        progress: Whether to show a bar, after two seconds.

    Raises:
        MechsafetyError: No neuron, more than 1,000, or one that the model does not have.

    Example:
        >>> cards = ms.neurons.describe_neurons(model, made.truth.neurons, harmful, n_tokens=1)
        >>> [str(neuron) for neuron in cards.neurons]
        ['L0.N11', 'L1.N3', 'L3.N3', 'L3.N13']
    """
    mask = neuron_mask(model, neurons)
    nodes = mask_nodes(mask) if isinstance(neurons, Tensor) else list(as_nodes(neurons))
    if not 0 < len(nodes) <= 1000:
        raise MechsafetyError(f"{len(nodes)} neurons", expected="1 to 1,000", hint="describe the top of a ranking")
    writes = output_weights(model, nodes)
    with torch.no_grad():
        # the norm's scale is a positive number common to all tokens: it does not change their order
        norm = model.frozen_final_norm(writes)
        logits = (norm(writes) - norm(torch.zeros_like(writes))) @ model.W_U.float()
    ends = [logits.topk(n_tokens, largest=largest).indices.tolist() for largest in (True, False)]
    promoted, suppressed = (
        tuple(tuple(model.tokenizer.decode([token]) for token in row) for row in rows) for rows in ends
    )
    active: tuple[tuple[ActiveToken, ...], ...] = tuple(() for _ in nodes)
    if prompts:
        with progress_bar(total=len(prompts), desc="reading prompts", delay=2, show=progress) as bar:
            active = _most_active(model, nodes, prompts, n_tokens, batch_size, bar.update)
    options = {"prompts": len(prompts), "n_tokens": n_tokens}
    return NeuronCards(model.provenance(options=options), tuple(nodes), promoted, suppressed, active)


def output_weights(model: LensModel, nodes: Sequence[Node]) -> Float[Tensor, "neuron d_model"]:
    """What one unit of each neuron's activation adds to the residual stream.

    It is measured: the MLP's output with that neuron at 1 and all others at 0, less its output with all at 0. It
    therefore holds for every architecture. Behind a norm after the MLP (Gemma-2), it is the normalised direction.
    """
    run = base_run(model, model.tokenize(["a"]), keep=())
    out = torch.zeros(len(nodes), model.d_model, device=model.device)
    for layer in sorted({node.layer or 0 for node in nodes}):
        here = [k for k, node in enumerate(nodes) if node.layer == layer]
        units = torch.zeros(len(here) + 1, model.d_mlp, dtype=model.dtype, device=model.device)
        for row, k in enumerate(here):
            units[row, nodes[k].index] = 1.0
        rows = repeat(units, "row d_mlp -> row pos d_mlp", pos=run.n_pos).contiguous()
        edit = (Site(SiteKind.NEURONS, layer), lambda tensor, rows=rows: rows)
        resid = expand_rows(run.resid[layer], len(here) + 1)
        with torch.no_grad():
            written = capture(model, run, layer, resid, Site(SiteKind.MLP_OUT, layer), [edit])[:, -1].float()
        out[here] = written[:-1] - written[-1:]
    return out


def _most_active(
    model: LensModel,
    nodes: Sequence[Node],
    prompts: Sequence[PromptLike],
    count: int,
    batch_size: int,
    report: Callable[[int], object],
) -> tuple[tuple[ActiveToken, ...], ...]:
    """The ``count`` tokens of the instructions with the largest absolute activation, streamed over batches."""
    best: list[list[tuple[float, int, int]]] = [[] for _ in nodes]
    layers: dict[int, list[int]] = {}
    for k, node in enumerate(nodes):
        layers.setdefault(node.layer or 0, []).append(k)
    for chunk in batches([model.n_tokens(prompt) for prompt in prompts], batch_size):
        tokens = model.tokenize([prompts[k] for k in chunk])
        at = tokens.span_mask("instruction")
        places = at.nonzero().tolist()

        def look(
            layer: int, chunk: Sequence[int] = chunk, at: Tensor = at, places: Sequence[Sequence[int]] = places
        ) -> Callable[[Tensor], None]:
            def hook(tensor: Tensor) -> None:
                for k in layers.get(layer, []):
                    values = tensor[..., nodes[k].index][at].float().cpu()
                    top = values.abs().topk(min(count, len(values))).indices.tolist()
                    # columns are counted from the end, where padding does not shift them
                    found = [(float(values[j]), chunk[places[j][0]], places[j][1] - at.shape[1]) for j in top]
                    best[k] = sorted(best[k] + found, key=lambda row: -abs(row[0]))[:count]

            return hook

        with hooked((model, look)):
            model.forward(tokens)
        report(len(chunk))
    return tuple(tuple(_active_token(model, prompts[p], column, value) for value, p, column in rows) for rows in best)


def _active_token(model: LensModel, prompt: PromptLike, column: int, value: float) -> ActiveToken:
    """The token at a column counted from the prompt's end, with the text before it."""
    ids = model.tokenize([prompt]).ids[0].tolist()
    start = model.tokenize([prompt]).spans[0].instruction[0]
    at = len(ids) + column
    before = model.tokenizer.decode(ids[max(start, at - 12) : at])
    return ActiveToken(model.tokenizer.decode([ids[at]]), before, value)
