"""Roles of nodes, from causal flow alone: never from depth, from attention, or from the span a token falls into."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from mechsafety.circuits.circuit import Role, RoleEvidence
from mechsafety.circuits.flow import Senders, Shares
from mechsafety.inputs import public
from mechsafety.nodes import LOGITS, Node

# a node has a property if at least this share of its own effect comes that way
MOST = 0.5
# a node repeats what another wrote if what it reads of it and what it writes have at least this cosine
ALIKE = 0.7
# a node whose effect is smaller than this share of the gap has no role: shares of rounding errors say nothing
LEAST = 1e-4

# a node that these read is an evaluation node
INNER = ("decision", "relay", "evaluation")

Named = dict[Node, tuple[Role, RoleEvidence]]


class Paths(Protocol):
    """What roles rest on; see `mechsafety.circuits.flow.Flow`, which measures it."""

    @property
    def nodes(self) -> Sequence[Node]:
        """The circuit's nodes."""

    def effects(self, nodes: Sequence[Node], positions: str = "all") -> Shares:
        """Effect of each node alone."""

    def direct(self, nodes: Sequence[Node]) -> Shares:
        """Effect of each node's path to the logits."""

    def from_prompt(self, nodes: Sequence[Node], effects: Shares) -> Shares:
        """Effect of what each node reads straight from the embeddings, given its effect alone."""

    def into(self, receivers: Sequence[Node], senders: Senders) -> Shares:
        """Effect of the paths from the senders, or from its own senders, to each receiver."""

    def out_of(self, senders: Sequence[Node], receivers: Sequence[Node]) -> Shares:
        """Effect of the paths from each sender to the receivers, the logits among them if they are given."""

    def repeated(self, receivers: Sequence[Node], least: float) -> Mapping[Node, list[Node]]:
        """The senders whose writing each receiver repeats, by the cosine of the two."""


@public
def assign_roles(
    flow: Paths, effects: Shares, spans: Sequence[str] = (), known: Mapping[Node, Role] | None = None
) -> Named:
    """Assign a role to every node of a circuit, by where its input's difference comes from and who reads its output.

    All shares are of the node's own effect in the circuit. Nodes are visited from the last to the first, so that the
    roles of all later nodes are known. Of each node the rules are tried in this order:

    1. *Production*: at least half of the effect is the path to the logits.
    2. *Detection*: at least half of the effect comes straight from the embeddings.
    3. *Decision*: at least half of the effect goes to production nodes and to the logits, together.
    4. *Relay*: at least half of the effect is read from nodes whose writing this node repeats (cosine at least 0.7).
    5. *Evaluation*: at least half of the effect goes to decision nodes, relays and evaluation nodes, together.
    6. A node that no rule fits gets the role of the largest of its shares: production for the path to the logits,
       decision for production nodes, evaluation for decision nodes, relays and evaluation nodes. All these paths
       together must carry at least half. Otherwise it has no role. Nor has a node whose effect is below 0.0001 of the
       gap.

    Paths to several nodes are patched together, because what such nodes do often does not add up: two that need each
    other both lose their whole effect when either is patched.

    Args:
        flow: The measured paths.
        effects: Effect of each node alone, as `flow` measures it.
        spans: Spans of the prompt in which each node is patched too. They decide nothing; figures use them.
        known: Nodes whose roles are known already. They are not measured again.

    Returns:
        The role of each other node, with the measurements.

    Example:
        >>> flow = ms.circuits.Flow(model, [runs], metric, made.truth.nodes, gap=1.0)
        >>> found = ms.circuits.assign_roles(flow, flow.effects(made.truth.nodes))
        >>> {node: role for node, (role, evidence) in found.items()} == {
        ...     node: made.truth.roles[node] for node in made.truth.nodes
        ... }
        True
    """
    roles: dict[Node, Role] = dict(known or {})
    asked = [node for node in flow.nodes if node not in roles]
    direct, embedded = flow.direct(asked), flow.from_prompt(asked, effects)
    at = {span: flow.effects(asked, span) for span in spans}

    def most(paths: Shares) -> list[Node]:
        """Nodes without a role of whose effect these paths are at least half."""
        return [node for node in left() if _share(paths, effects, node) >= MOST]

    def left() -> list[Node]:
        return [node for node in flow.nodes if node not in roles]

    def having(*names: str) -> list[Node]:
        return [node for node in flow.nodes if roles.get(node) in names]

    roles |= dict.fromkeys(most(direct), "production")
    roles |= dict.fromkeys(most(embedded), "detection")
    alike = flow.into(left(), flow.repeated(left(), ALIKE))
    repeating = most(alike)
    outward, inward, to_production = dict[Node, float](), dict[Node, float](), dict[Node, float]()
    for here in _backwards(left()):
        outward |= flow.out_of(here, [*having("production"), LOGITS])
        inner = having(*INNER)
        roles |= dict.fromkeys(most(outward), "decision")
        inward |= flow.out_of([node for node in here if node not in roles], inner)
        roles |= {node: "relay" for node in here if node not in roles and node in repeating}
        roles |= dict.fromkeys(most(inward), "evaluation")
        rest = [node for node in here if node not in roles]
        to_production |= flow.out_of(rest, having("production"))
        onward = flow.out_of(rest, [*having("production"), *inner, LOGITS])
        for node in rest:
            ways: dict[Role, Shares] = {"production": direct, "decision": to_production, "evaluation": inward}
            best = max(ways, key=lambda role: _share(ways[role], effects, node))
            roles[node] = best if _share(onward, effects, node) >= MOST else "none"
    middle = [node for node in asked if roles[node] != "detection"]
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
                to_evaluation_or_decision=inward.get(node),
                to_production=to_production.get(node),
                to_production_or_logits=outward.get(node),
                alike=alike.get(node),
                at_instruction=at["instruction"][node] if "instruction" in at else None,
                at_suffix=at["suffix"][node] if "suffix" in at else None,
            ),
        )
        for node in asked
    }


def _backwards(nodes: Sequence[Node]) -> list[list[Node]]:
    """Groups of nodes of which none reads another of its group; every node comes after all that read it."""
    found: dict[tuple[int, bool], list[Node]] = {}
    for node in nodes:
        found.setdefault((node.layer or 0, node.kind != "head"), []).append(node)
    return [found[moment] for moment in sorted(found, reverse=True)]


def _share(paths: Shares, effects: Shares, node: Node) -> float:
    """What the effect of some paths is of the node's own effect; 0 for a node with hardly any effect."""
    return paths.get(node, 0.0) / effects[node] if abs(effects[node]) >= LEAST else 0.0
