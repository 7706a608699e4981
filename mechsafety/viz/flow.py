"""The circuit in one column, as text: what each role holds and what it reads from. It fits a phone."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from mechsafety.circuits.circuit import RefusalCircuit
from mechsafety.viz.look import PLAIN, ROLE_COLOURS
from mechsafety.viz.marks import magnitude
from mechsafety.viz.role_diagram import ORDER, Arrow, role_content
from mechsafety.viz.words import number

ENDS = {"embed": "the prompt's tokens", "logits": "refuse or comply"}
SENDERS, SMALLEST = 3, 0.005  # number of senders that a row names; smaller sums would read 0.00


@dataclass(frozen=True, slots=True)
class Step:
    """A role, or one of the circuit's two ends.

    Attributes:
        name: Name of the role or of the end.
        colour: Colour of the role; empty for an end.
        holds: Number of nodes, and their strongest.
        effect: Summed effect of the nodes, as text.
        share: Summed effect as a share of the largest among the roles, from 0 to 1.
        reads: The roles and ends that it reads most from, with the summed effects of the edges; empty where all are
            near zero.
    """

    name: str
    colour: str = ""
    holds: str = ""
    effect: str = ""
    share: float = 0.0
    reads: str = ""


def flow(circuit: RefusalCircuit) -> list[Step]:
    """One step per role that has nodes, from the logits at the top down to the prompt, as pictures are drawn."""
    content = role_content(circuit.by_mlp())
    roles = [name for name in content.levels if name not in ENDS]
    sums = {role: sum(member.effect or 0.0 for member in content.members[role]) for role in roles}
    largest = max((magnitude(value) for value in sums.values()), default=0.0) or 1.0
    reads = _reads(content.arrows)
    steps = [Step(ENDS["logits"], reads=reads.get("logits", ""))]
    for role in reversed(roles):
        members = content.members[role]
        count = f"{len(members)} nodes, strongest" if len(members) > 1 else "1 node:"
        holds = f"{count} {members[0].node.short}"
        share = magnitude(sums[role]) / largest
        steps.append(
            Step(PLAIN.role(role), ROLE_COLOURS[role], holds, number(sums[role], 2), share, reads.get(role, ""))
        )
    return [*steps, Step(ENDS["embed"])]


def _reads(arrows: Sequence[Arrow]) -> dict[str, str]:
    """Of each role and of the logits: where most of what they read comes from, through all slots together."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for arrow in arrows:
        sums[arrow.receiver][arrow.sender] += arrow.effect
    texts = {}
    for receiver, found in sums.items():
        seen = [sender for sender in found if magnitude(found[sender]) >= SMALLEST]
        strongest = sorted(seen, key=lambda sender: (-magnitude(found[sender]), ORDER.index(sender)))[:SENDERS]
        texts[receiver] = ", ".join(
            f"{'the prompt' if sender == 'embed' else PLAIN.role(sender)} {number(found[sender], 2)}"
            for sender in strongest
        )
    return texts
