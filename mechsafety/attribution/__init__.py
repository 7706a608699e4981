"""Attribution: attention patterns, direct effects on logits, scores of heads, the logit lens, gradient estimates."""

from mechsafety.attribution.attention import AttentionPatterns, attention_patterns
from mechsafety.attribution.direct import DirectAttribution, direct_logit_attribution
from mechsafety.attribution.edges import EdgeScores, edge_attribution
from mechsafety.attribution.heads import HeadAttribution, head_attribution
from mechsafety.attribution.lens import LogitLens, logit_lens
from mechsafety.attribution.nodes import NodeAttribution, node_attribution
from mechsafety.attribution.promoted import NodeCards, describe_nodes
from mechsafety.attribution.ships import sahara, ships

__all__ = [
    "AttentionPatterns",
    "DirectAttribution",
    "EdgeScores",
    "HeadAttribution",
    "LogitLens",
    "NodeAttribution",
    "NodeCards",
    "attention_patterns",
    "describe_nodes",
    "direct_logit_attribution",
    "edge_attribution",
    "head_attribution",
    "logit_lens",
    "node_attribution",
    "sahara",
    "ships",
]
