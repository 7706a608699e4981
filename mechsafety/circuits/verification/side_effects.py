"""What editing a circuit does to harmless prompts."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from mechsafety.circuits.faithfulness import FaithfulnessMeter
from mechsafety.circuits.verification.outcome import SideEffects
from mechsafety.intervals import mean_interval
from mechsafety.nodes import Node, Part
from mechsafety.patching.masks import Constants, Patch, patched_logits


def side_effects(meter: FaithfulnessMeter, circuit: Sequence[Part], seed: int) -> SideEffects | None:
    """KL(unedited || edited) of the next token on the meter's harmless prompts, for two edits.

    Two edits are measured. The circuit at its mean over the harmless prompts shows what ablating it costs where nothing
    is to be refused. Everything outside the circuit at its value in the pair's harmful prompt shows what of that prompt
    reaches the output outside the circuit.

    Args:
        meter: Meter whose harmless runs are edited.
        circuit: Heads, MLPs and neurons.
        seed: Seed of the resampling.

    Returns:
        The side effects; None for a circuit of edges, because an edge has no value of its own to replace.
    """
    if any(not isinstance(part, Node) for part in circuit):
        return None
    base, keep = meter.runs.harmless, set(circuit)
    inside = [part for part in circuit if isinstance(part, Node)]
    outside = [part for part in meter.parts if isinstance(part, Node) and part not in keep]
    found = []
    for source, nodes in ((Constants.mean(base).of(base), inside), (meter.runs.harmful.acts, outside)):
        edited = patched_logits(meter.model, base, source, Patch.of(meter.model, [nodes]))[0]
        values = next_token_kl(base.logits, edited).cpu().double().numpy()
        found.append((float(values.mean()), mean_interval(values, seed)))
    (ablated, ablated_ci), (patched, patched_ci) = found
    return SideEffects(ablated, ablated_ci, patched, patched_ci)


def next_token_kl(
    unedited: Float[Tensor, "batch d_vocab"], edited: Float[Tensor, "batch d_vocab"]
) -> Float[Tensor, " batch"]:
    """KL(unedited || edited) of the next token, one value per prompt, in nats."""
    log_p, log_q = unedited.double().log_softmax(-1), edited.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
