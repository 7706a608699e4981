"""Attribution: direct effects on the logits, and gradient estimates for every node."""

from mechsafety.attribution.edges import EdgeScores, edge_attribution
from mechsafety.attribution.heads import HeadAttribution, head_attribution
from mechsafety.attribution.nodes import NodeAttribution, node_attribution

__all__ = [
    "EdgeScores",
    "HeadAttribution",
    "NodeAttribution",
    "edge_attribution",
    "head_attribution",
    "node_attribution",
]
