"""Attribution: direct effects on the logits, scores of heads, the logit lens, and gradient estimates for every node."""

from mechsafety.attribution.direct import DirectAttribution, direct_logit_attribution
from mechsafety.attribution.edges import EdgeScores, edge_attribution
from mechsafety.attribution.heads import HeadAttribution, head_attribution
from mechsafety.attribution.lens import LogitLens, logit_lens
from mechsafety.attribution.nodes import NodeAttribution, node_attribution
from mechsafety.attribution.ships import sahara, ships

__all__ = [
    "DirectAttribution",
    "EdgeScores",
    "HeadAttribution",
    "LogitLens",
    "NodeAttribution",
    "direct_logit_attribution",
    "edge_attribution",
    "head_attribution",
    "logit_lens",
    "node_attribution",
    "sahara",
    "ships",
]
