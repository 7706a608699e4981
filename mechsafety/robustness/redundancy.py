"""Whether parts back each other up: their joint effect against the sum of their effects, and what takes over."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.circuits.backups import knocked_out
from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.circuits.faithfulness import FaithfulnessMeter
from mechsafety.circuits.flow import AT_ONCE, direct_changes
from mechsafety.inputs import public
from mechsafety.intervals import ratio_interval, ratio_intervals
from mechsafety.metrics import RefusalLogOdds, check_gap
from mechsafety.models import LensModel
from mechsafety.nodes import Node, NodeLike, head_and_mlp_nodes
from mechsafety.patching import pair_runs
from mechsafety.patching.masks import PairRuns
from mechsafety.prompts import PromptPairs
from mechsafety.results import Provenance, Result, bars
from mechsafety.robustness.parts import ranked_parts
from mechsafety.scale.work import sweeps, work
from mechsafety.sites import SiteKind

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, slots=True, repr=False)
class Redundancy(Result):
    """Effects of parts alone and together, and the direct effects of all others before and after.

    Everything is in units of the metric, per pair: what the harmful prompt loses when values of the harmless prompt are
    patched in.

    Attributes:
        provenance: Model, options, versions.
        metric: Name and tokens of the metric.
        parts: The parts.
        gap: Metric of the harmful prompt less that of the harmless one.
        single: Effect of patching each part alone.
        joint: Effect of patching all parts together.
        others: All other heads and MLPs.
        direct: Effect of each one's direct path to the logits, in the unedited run.
        direct_without: The same in the run with all parts patched.

    Example:
        >>> found = ms.robustness.redundancy(model, ["L0.MLP", "L1.MLP"], pairs, metric)
        >>> (together, _), (alone, _) = found.joint_share(), found.summed_share()
        >>> together > 0.9 > alone  # each is the other's backup
        True
    """

    provenance: Provenance
    metric: dict[str, object]
    parts: tuple[Node, ...]
    gap: Float[Tensor, " pair"]
    single: Float[Tensor, "part pair"]
    joint: Float[Tensor, " pair"]
    others: tuple[Node, ...]
    direct: Float[Tensor, "other pair"]
    direct_without: Float[Tensor, "other pair"]

    def __repr__(self) -> str:
        (joint, _), (summed, _), (more, (low, high)) = self.joint_share(), self.summed_share(), self.redundancy()
        return (
            f"Redundancy({self.provenance.model}: {len(self.parts)} parts lose {joint:.2f} of the gap together and "
            f"{summed:.2f} added up; redundancy {more:.2f} [{low:.2f}, {high:.2f}])"
        )

    def joint_share(self) -> tuple[float, tuple[float, float]]:
        """Share of the gap lost when all parts are patched together, and its 95 % interval over pairs."""
        return self._share(self.joint)

    def summed_share(self) -> tuple[float, tuple[float, float]]:
        """Sum of the shares lost when each part is patched alone, and its interval."""
        return self._share(self.single.sum(0))

    def redundancy(self) -> tuple[float, tuple[float, float]]:
        """Joint share less summed share, and its interval.

        Above 0: together the parts lose more than added up, because they replace one another. Below 0: they need one
        another, so that patching one already loses what several carry.
        """
        return self._share(self.joint - self.single.sum(0))

    def _share(self, values: Float[Tensor, " pair"]) -> tuple[float, tuple[float, float]]:
        part, whole = values.double().numpy(), self.gap.double().numpy()
        return float(part.mean() / whole.mean()), ratio_interval(part, whole)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per other node: direct effect before, after, and the change, as shares of the gap with intervals.

        A node with a positive change takes over: it writes more of the refusal while the parts are patched. The rows
        are sorted by the change, the largest first.
        """
        whole = self.gap.double().numpy()
        change = (self.direct_without - self.direct).double().numpy()
        columns = {"before": self.direct, "after": self.direct_without}
        frame = pd.DataFrame({"node": [str(node) for node in self.others]})
        for name, values in columns.items():
            frame[name] = values.double().mean(1).numpy() / whole.mean()
        frame["change"] = change.mean(1) / whole.mean()
        ends = np.array(ratio_intervals(change, whole)).reshape(-1, 2)
        frame["ci_low"], frame["ci_high"] = ends[:, 0], ends[:, 1]
        return frame.sort_values("change", ascending=False, kind="stable", ignore_index=True)

    def plot(self) -> "go.Figure":
        """The 30 largest changes of direct effects."""
        return bars(self.to_dataframe(), "node", "change", "change of the direct effect, share of the gap")


@sweeps
@public
def redundancy(
    model: LensModel,
    parts: RefusalCircuit | Sequence[NodeLike],
    pairs: PromptPairs,
    metric: RefusalLogOdds,
) -> Redundancy:
    """Patch parts alone and together, exactly, and see which other nodes then write more of the refusal.

    Patched parts take their values from the harmless prompt of the pair. What takes over is known from other models as
    self-repair or the hydra effect (McGrath et al. 2023): a later node's direct effect grows while an earlier one is
    ablated.

    Args:
        model: The model.
        parts: A circuit, or heads, MLPs and neurons.
        pairs: Pairs, of which those that align are taken.
        metric: The metric.

    Raises:
        MechsafetyError: Parts that the model lacks, or no gap between the prompts of the pairs.

    Example:
        >>> found = ms.robustness.redundancy(model, ["L0.MLP", "L1.MLP"], pairs, metric)
        >>> found.to_dataframe().columns.tolist()
        ['node', 'before', 'after', 'change', 'ci_low', 'ci_high']
    """
    nodes, model = ranked_parts(model, parts), model.reading(metric.opener_ids)
    extra = [SiteKind.NEURONS] if any(node.kind == "neuron" for node in nodes) else []
    runs = pair_runs(model, pairs.aligned(model), extra=extra)
    meter = FaithfulnessMeter(model, runs, metric)
    harmful, harmless = meter.ends()
    check_gap(torch.from_numpy(harmful), torch.from_numpy(harmless))
    lost = harmful - meter.removed([nodes, *([node] for node in nodes)])
    homes = {node.home for node in nodes}
    others = tuple(node for node in head_and_mlp_nodes(model.n_layers, model.n_heads) if node not in homes)
    before, after = (_direct(model, state, metric, others) for state in (runs, knocked_out(model, runs, nodes)))
    return Redundancy(
        model.provenance(options={"pairs": len(harmful)}),
        metric.to_json(),
        nodes,
        torch.from_numpy(harmful - harmless),
        torch.from_numpy(lost[1:]),
        torch.from_numpy(lost[0]),
        others,
        before,
        after,
    )


def _direct(
    model: LensModel, runs: PairRuns, metric: RefusalLogOdds, nodes: Sequence[Node]
) -> Float[Tensor, "node pair"]:
    """What the metric loses through each node's direct path to the logits, a few nodes at a time."""
    parts = [nodes[first : first + AT_ONCE] for first in range(0, len(nodes), AT_ONCE)]
    rows = work("direct effects", parts, lambda some: direct_changes(model, runs, metric, some).cpu(), Tensor)
    return torch.cat([torch.zeros(0, len(runs.harmful)), *rows]).double()
