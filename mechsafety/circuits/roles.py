"""Roles of nodes, from causal flow alone: never from depth, from attention, or from the span a token falls into."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from mechsafety.circuits.circuit import Role, RoleEvidence
from mechsafety.circuits.flow import Senders, Shares
from mechsafety.inputs import public
from mechsafety.nodes import Node

# a node has a property if at least this share of its own effect comes that way
MOST = 0.5
# a node repeats what another wrote if what it reads of it and what it writes have at least this cosine
ALIKE = 0.7
# a node whose effect is smaller than this share of the gap has no role: shares of rounding errors say nothing
LEAST = 1e-4

Named = dict[Node, tuple[Role, RoleEvidence]]


class Paths(Protocol):
    """What roles rest on; see `mechsafety.circuits.flow.Flow`, which measures it."""

    @property
    def nodes(self) -> Sequence[Node]:
        """The circuit's nodes."""

    def effects(self, positions: str = "all") -> Shares:
        """Effect of each node alone."""

    def direct(self) -> Shares:
        """Effect of each node's path to the logits."""

    def from_prompt(self, effects: Shares) -> Shares:
        """Effect of what each node reads straight from the embeddings, given its effect alone."""

    def into(self, receivers: Sequence[Node], senders: Senders) -> Shares:
        """Effect of the paths from the senders, or from its own senders, to each receiver."""

    def out_of(self, senders: Sequence[Node], receivers: Sequence[Node]) -> Shares:
        """Effect of the paths from each sender to the receivers."""

    def repeated(self, receivers: Sequence[Node], least: float) -> Mapping[Node, list[Node]]:
        """The senders whose writing each receiver repeats, by the cosine of the two."""


@public
def assign_roles(flow: Paths, spans: Sequence[str] = ()) -> Named:
    """Assign a role to every node of a circuit, by where its input's difference comes from and who reads its output.

    All shares are of the node's own effect in the circuit. The rules are tried in this order:

    1. *Production*: at least half of the effect is the path to the logits.
    2. *Detection*: at least half of the effect comes straight from the embeddings.
    3. *Decision*: at least half of the effect goes to the logits and to production nodes.
    4. *Relay*: at least half of the effect is read from nodes whose writing this node repeats (cosine at least 0.7).
    5. *Evaluation*: at least half of the effect goes to decision nodes and relays; then, whoever feeds such a node.
    6. A node that no rule fits gets the role of the largest of its shares: production for the path to the logits,
       decision for production nodes, evaluation for decision nodes, relays and evaluation nodes. The shares must add up
       to at least half. Otherwise it has no role. Nor has a node whose effect is below 0.0001 of the gap.

    Args:
        flow: The measured paths.
        spans: Spans of the prompt in which each node is patched too. They decide nothing; figures use them.

    Returns:
        The role of each node, with the measurements.
    """
    effects, direct = flow.effects(), flow.direct()
    embedded = flow.from_prompt(effects)
    at = {span: flow.effects(span) for span in spans}
    roles: dict[Node, Role] = {}

    def most(*shares: Shares) -> list[Node]:
        """Nodes without a role of whose effect these shares are at least half."""
        return [node for node in left() if _share(shares, effects, node) >= MOST]

    def left() -> list[Node]:
        return [node for node in flow.nodes if node not in roles]

    def having(*names: str) -> list[Node]:
        return [node for node in flow.nodes if roles.get(node) in names]

    roles |= dict.fromkeys(most(direct), "production")
    roles |= dict.fromkeys(most(embedded), "detection")
    to_production = flow.out_of(left(), having("production"))
    roles |= dict.fromkeys(most(to_production, direct), "decision")
    alike = flow.into(left(), flow.repeated(left(), ALIKE))
    roles |= dict.fromkeys(most(alike), "relay")
    to_decision = dict(flow.out_of([*left(), *having("relay")], having("decision", "relay")))
    roles |= dict.fromkeys(most(to_decision), "evaluation")
    to_evaluation: dict[Node, float] = {}
    while left():
        to_evaluation |= flow.out_of(left(), having("evaluation"))
        found = most(to_decision, to_evaluation)
        roles |= dict.fromkeys(found, "evaluation")
        if not found:
            break
    for node in left():
        ways: dict[Role, list[Shares]] = {
            "production": [direct],
            "decision": [to_production],
            "evaluation": [to_decision, to_evaluation],
        }
        shares = {role: max(0.0, _share(group, effects, node)) for role, group in ways.items()}
        best = max(shares, key=lambda role: shares[role])
        roles[node] = best if sum(shares.values()) >= MOST else "none"
    middle = having("relay", "evaluation", "decision", "production", "none")
    from_detection, from_evaluation = (flow.into(middle, having(*names)) for names in (("detection",), ("evaluation",)))
    return {
        node: (
            roles[node],
            RoleEvidence(
                in_circuit=effects[node],
                direct=direct[node],
                from_embed=embedded[node],
                from_detection=from_detection.get(node),
                from_evaluation=from_evaluation.get(node),
                to_evaluation=to_evaluation.get(node),
                to_decision=to_decision.get(node),
                to_production=to_production.get(node),
                alike=alike.get(node),
                at_instruction=at["instruction"][node] if "instruction" in at else None,
                at_suffix=at["suffix"][node] if "suffix" in at else None,
            ),
        )
        for node in flow.nodes
    }


def _share(parts: Iterable[Shares], effects: Shares, node: Node) -> float:
    """What these effects are of the node's own effect; 0 for a node with hardly any effect."""
    if abs(effects[node]) < LEAST:
        return 0.0
    return sum(part.get(node, 0.0) for part in parts) / effects[node]
