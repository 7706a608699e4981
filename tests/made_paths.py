"""Paths between nodes by hand, in place of measured ones."""

from dataclasses import dataclass, field

from mechsafety.nodes import LOGITS


@dataclass
class Made:
    """Paths by hand: effects, shares of direct and embedded effects, and edges as (sender, receiver): effect."""

    effects_: dict
    direct_: dict = field(default_factory=dict)
    embed: dict = field(default_factory=dict)
    edges: dict = field(default_factory=dict)
    repeats: dict = field(default_factory=dict)

    @property
    def nodes(self):
        return list(self.effects_)

    def effects(self, nodes, positions="all"):
        return {node: self.effects_[node] / (1 if positions == "all" else 2) for node in nodes}

    def direct(self, nodes):
        return {node: self.direct_.get(node, 0.0) for node in nodes}

    def from_prompt(self, nodes, effects):
        return {node: self.embed.get(node, 0.0) for node in nodes}

    def into(self, receivers, senders):
        of = senders if isinstance(senders, dict) else dict.fromkeys(receivers, senders)
        return {one: sum(self.edges.get((other, one), 0.0) for other in of[one]) for one in receivers}

    def out_of(self, senders, receivers):
        straight = self.direct_ if LOGITS in receivers else {}
        return {
            one: sum(self.edges.get((one, other), 0.0) for other in receivers) + straight.get(one, 0.0)
            for one in senders
        }

    def repeated(self, receivers, least):
        assert least == 0.7
        return {node: self.repeats.get(node, []) for node in receivers}
