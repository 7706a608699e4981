"""Whether refusal uses the parts that ordinary ability needs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.circuits.verification.side_effects import next_token_kl
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Prompts, public
from mechsafety.intervals import mean_interval
from mechsafety.interventions import ablate
from mechsafety.models import LensModel
from mechsafety.nodes import Node, NodeLike, head_and_mlp_nodes
from mechsafety.progress import progress_bar
from mechsafety.prompts import distinct
from mechsafety.replies import check_unedited
from mechsafety.results import Provenance, Result
from mechsafety.robustness.parts import mean_values, ranked_parts
from mechsafety.scale.work import sweeps, work

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, slots=True, repr=False)
class Entanglement(Result):
    """What ordinary prompts need of each head and MLP, and how many of the refusal parts they need most.

    Attributes:
        provenance: Model, options, versions.
        nodes: All heads and MLPs.
        needed: KL(unedited || node at its mean) of the next token after each ordinary prompt, in nats.
        refusal: The refusal parts; of neurons, their MLPs.

    Example:
        >>> found = ms.robustness.entanglement(model, circuit, harmless)
        >>> found.to_dataframe().columns.tolist()
        ['node', 'kl', 'ci_low', 'ci_high', 'refusal', 'most_needed']
    """

    provenance: Provenance
    nodes: tuple[Node, ...]
    needed: Float[Tensor, "node prompt"]
    refusal: tuple[Node, ...]

    def __repr__(self) -> str:
        shared, expected, p = self.overlap()
        return (
            f"Entanglement({self.provenance.model}: of {len(self.refusal)} refusal parts, {shared} are among as many "
            f"that ordinary prompts need most; {expected:.1f} expected by chance, p = {p:.3g})"
        )

    @property
    def most_needed(self) -> tuple[Node, ...]:
        """The heads and MLPs that ordinary prompts need most: as many of each kind as there are refusal parts."""
        count, need = Counter(node.kind for node in self.refusal), self.needed.double().mean(1).tolist()
        order = sorted(range(len(self.nodes)), key=lambda k: (-need[k], self.nodes[k].order))
        found: list[Node] = []
        for kind, n in count.items():
            found += [self.nodes[k] for k in order if self.nodes[k].kind == kind][:n]
        return tuple(sorted(found, key=lambda node: node.order))

    def overlap(self) -> tuple[int, float, float]:
        """Refusal parts among the most needed; how many chance would give; and the p of at least so many.

        Under the null hypothesis, the refusal parts are any parts of the same kinds. Heads and MLPs are drawn apart, so
        the number follows a sum of hypergeometric distributions, whose p is exact.
        """
        from scipy.stats import hypergeom

        shared = set(self.refusal) & set(self.most_needed)
        chance, expected = np.ones(1), 0.0
        for kind, n in Counter(node.kind for node in self.refusal).items():
            total = sum(node.kind == kind for node in self.nodes)
            chance = np.convolve(chance, hypergeom(total, n, n).pmf(np.arange(n + 1)))
            expected += n * n / total
        return len(shared), expected, float(min(1.0, chance[len(shared) :].sum()))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per head and MLP: how much ordinary prompts need it, with its interval, and whether refusal does."""
        rows = []
        inside, most = set(self.refusal), set(self.most_needed)
        for node, values in zip(self.nodes, self.needed.double().numpy(), strict=True):
            low, high = mean_interval(values)
            row = {"node": str(node), "kl": values.mean(), "ci_low": low, "ci_high": high}
            rows.append(row | {"refusal": node in inside, "most_needed": node in most})
        return pd.DataFrame(rows)

    def plot(self) -> "go.Figure":
        """How much ordinary prompts need each part, refusal parts marked; layers from left to right."""
        import plotly.express as px

        frame = self.to_dataframe().assign(layer=[node.layer or 0 for node in self.nodes])
        labels = {"kl": "KL on ordinary prompts, nats", "refusal": "refusal part"}
        return px.scatter(frame, x="layer", y="kl", color="refusal", hover_name="node", log_y=True, labels=labels)


@sweeps
@public
def entanglement(
    model: LensModel,
    parts: RefusalCircuit | Sequence[NodeLike],
    prompts: Prompts,
    *,
    progress: bool = True,
) -> Entanglement:
    """Ablate every head and MLP alone on ordinary prompts, and compare what matters there with the refusal parts.

    If refusal uses the parts that ordinary ability needs, it cannot be hardened or removed without a cost to ability.

    Args:
        model: The model.
        parts: A circuit, or heads, MLPs and neurons. Neurons count as their MLP.
        prompts: Ordinary, harmless prompts, which set both the means and what is measured.
        progress: Whether to show a bar.

    Raises:
        MechsafetyError: No prompts, parts that the model lacks, or a model that is already edited.

    Example:
        >>> found = ms.robustness.entanglement(model, circuit, harmless)
        >>> n_shared, low, high = found.overlap()
        >>> n_shared <= len(circuit.nodes)
        True
    """
    check_unedited(model)
    homes = sorted({node.home for node in ranked_parts(model, parts)}, key=lambda node: node.order)
    asked, plain = distinct(prompts, "prompts"), model.reading(())
    if len(asked) < 2:
        raise MechsafetyError(f"{len(asked)} prompts", expected="at least 2, for an interval")
    before = plain.logits(asked)
    nodes = head_and_mlp_nodes(model.n_layers, model.n_heads)
    means = mean_values(model, nodes, asked)

    def without(node: Node) -> Float[Tensor, " prompt"]:
        with ablate(model, node, values=means):
            return next_token_kl(before, plain.logits(asked)).clamp(min=0).float().cpu()

    found = work("nodes", nodes, without, Tensor)
    rows = list(progress_bar(found, total=len(nodes), desc="nodes", show=progress))
    options = {"prompts": len(asked)}
    return Entanglement(model.provenance(options=options), nodes, torch.stack(rows), tuple(homes))
