"""`PathMap`: what path patching measured."""

from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from mechsafety.nodes import Node
from mechsafety.patching.effects import effect_table, mean_gap
from mechsafety.patching.senders import Sender
from mechsafety.results import Provenance, Result, bars
from mechsafety.sites import Site


@dataclass(frozen=True, slots=True)
class PathMap(Result):
    """Exact effects along direct paths from senders to receivers.

    Attributes:
        provenance: Model, options, versions.
        metric: Name and tokens of the metric. For `path_projection`, it tells where the projection was taken.
        senders: Where the changes start.
        receivers: (node, slot) pairs where the changes end. Receivers that are patched jointly form one entry.
        changes: Change of the metric towards the source run, in metric units.
        harmful, harmless: Metric of the unpatched runs.
        direction: ``noising`` or ``denoising``.
        mlp: What MLPs between sender and receiver do: ``recompute`` or ``freeze``. The two are different quantities.
        downstream: What happens after the receiver: ``live`` or ``frozen``.
        norm: Norms that read the change: ``recompute`` (exact) or ``freeze`` (at the base run's scale).
        positions: Positions at which the senders' changes enter.

    Example:
        >>> found = ms.path_patching(model, pairs, metric, senders=["L0.MLP"], receivers=[("L3.H1", "v")])
        >>> found.effects.shape  # sender, receiver
        torch.Size([1, 1])
    """

    provenance: Provenance
    metric: dict[str, object]
    senders: tuple[Sender, ...]
    receivers: tuple[tuple[tuple[Node | Site, str], ...], ...]
    changes: Float[Tensor, "sender receiver prompt"]
    harmful: Float[Tensor, " prompt"]
    harmless: Float[Tensor, " prompt"]
    direction: str
    mlp: str
    downstream: str
    norm: str = "recompute"
    positions: str = "all"

    def __repr__(self) -> str:
        options = f"mlp={self.mlp}, norm={self.norm}"
        return f"PathMap({len(self.senders)} senders -> {len(self.receivers)} receivers, {options})"

    @property
    def gap(self) -> float:
        """Mean metric on harmful prompts minus that on harmless prompts."""
        return mean_gap(self.harmful, self.harmless)

    @property
    def effects(self) -> Float[Tensor, "sender receiver"]:
        """Share of the gap along each path; 0 where a sender comes after the receiver."""
        return self.changes.mean(-1) / self.gap

    def to_dataframe(self, seed: int = 0) -> pd.DataFrame:
        """One row per path, largest absolute effect first, with interval and adjusted p."""
        flat = rearrange(self.changes.double(), "sender receiver prompt -> (sender receiver) prompt")
        names = [" + ".join(f"{node}.{slot}" for node, slot in group) for group in self.receivers]
        ends = {
            "sender": [str(sender) for sender in self.senders for _ in names],
            "receiver": [name for _ in self.senders for name in names],
        }
        frame = pd.DataFrame(ends).join(effect_table(flat, self.harmful - self.harmless, seed))
        return frame.sort_values("effect", key=abs, ascending=False, kind="stable")

    def plot(self) -> go.Figure:
        """Bar chart of the 30 strongest paths with intervals."""
        frame = self.to_dataframe()
        frame["path"] = frame.sender + " -> " + frame.receiver
        return bars(frame, "path", "effect", "share of the harmful-harmless gap")
