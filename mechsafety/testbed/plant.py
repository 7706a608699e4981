"""Models whose refusal circuit is written into their weights: no training, and another circuit for every seed."""

import random
from dataclasses import dataclass
from typing import Any

import torch

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import public
from mechsafety.prompts import PromptPairs
from mechsafety.testbed.plan import make_plan
from mechsafety.testbed.planter import write_plan
from mechsafety.testbed.truth import Truth
from mechsafety.testbed.varied import varied_plan
from mechsafety.testbed.vocabulary import planted_pairs, planted_tokenizer, reply_successors
from mechsafety.testbed.weights import fill, gpt2, llama


@dataclass(frozen=True, slots=True)
class Planted:
    """A model whose refusal circuit is known by construction.

    Attributes:
        model: Hugging Face Llama (RMSNorm) or GPT-2 (LayerNorm).
        tokenizer: The model's tokenizer, one token per word, with a chat template.
        pairs: Prompts that the model refuses, each with a counterfactual prompt that it answers. There are four topics,
            two of them in the split ``test``.
        truth: The model's circuit, decoys and backups.
        seed: The seed that the model was made from.

    Example:
        >>> made = ms.testbed.planted(seed=5, decoys=2, backups=1)
        >>> [str(node) for node in made.truth.nodes]
        ['L0.H1', 'L0.MLP', 'L1.MLP', 'L3.H1', 'L3.MLP']
    """

    model: Any
    tokenizer: Any
    pairs: PromptPairs
    truth: Truth
    seed: int

    def __repr__(self) -> str:
        return f"Planted({self.model.config._name_or_path}: {self.truth!r})"


@public
def planted(
    seed: int = 0,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int | None = None,
    *,
    decoys: int = 4,
    backups: int = 0,
    neurons: int = 2,
    opposing: bool = False,
    varied: bool = False,
    norm: str = "rmsnorm",
    noise: float = 0.01,
) -> Planted:
    """Build a chat model that refuses by a circuit of known parts, in well under a second.

    The circuit has four stages.

    1. A detection head tells the end of the instruction whether the instruction names something harmful.
    2. Evaluation neurons at the end of the instruction decide whether to refuse.
    3. A decision head moves their verdict to the last token.
    4. Production neurons write the refusal's first word.

    The seed sets layers, heads, neurons and the directions in the residual stream. All other weights are small noise.
    Each signal between stages has a direction of its own. The directions are orthonormal, and none lies along an axis.

    *Decoys* are heads and neurons that write large vectors to directions that nothing reads. The vectors depend on
    whether the prompt is harmful. On harmless prompts they point the other way and have the same length, so that no
    later norm sees a difference.

    *Backups* double a stage: two heads (or the neurons of two MLPs) write the same. Their reader gives the same output
    for one of them as for both.

    *Opposing* neurons lie in an MLP of their own. They read the decision, as production does, and write half as much
    against refusal. Production writes half as much more, so that the model refuses as clearly as without them.

    With ``varied`` the seed also sets what else differs between circuits that do the same:

    - at which position each stage happens: the harmful word, the instruction's last token, a token of the template, the
      last token;
    - whether heads or neurons do a stage's work, and how many heads share it;
    - whether relays pass on unchanged what detection or evaluation wrote, on the only route or on one of two;
    - whether two words of a request are harmful, and neither alone.

    Args:
        seed: Seed of all random choices.
        layers: Number of blocks; at least 2.
        heads: Number of attention heads per block.
        kv_heads: Number of key-value heads per block, a divisor of ``heads``; by default as many as heads.
        decoys: Number of decoys; decoy heads and decoy neurons alternate.
        backups: Number of doubled stages: 0; 1 (detection, evaluation or decision, chosen by the seed); or 2 (detection
            and one of the other two).
        neurons: Number of evaluation neurons, and of production neurons. Evaluation has only one neuron where it or the
            decision is doubled. With several, a reader that works with half its input would not notice one missing.
        opposing: Whether there are production neurons that work against refusal.
        varied: Whether the seed also sets the circuit's shape. A varied circuit has no backups and no opposing neurons.
        norm: ``rmsnorm`` (Llama) or ``layernorm`` (GPT-2, which has no grouped queries).
        noise: Standard deviation of all weights outside the circuit and the decoys.

    Raises:
        MechsafetyError: An unknown norm, sizes that do not divide, or a model too small for the circuit.

    Example:
        >>> made = planted(seed=3, decoys=2, backups=1)
        >>> len(made.truth.backups), sorted(set(made.truth.roles.values()))
        (1, ['decision', 'detection', 'evaluation', 'production'])
    """
    if norm not in ("rmsnorm", "layernorm"):
        raise MechsafetyError(f"norm {norm!r}", expected="'rmsnorm' or 'layernorm'")
    groups = heads if kv_heads is None else kv_heads
    if groups < 1 or heads % groups:
        raise MechsafetyError(f"{heads} heads over {groups} key-value heads", expected="a divisor of the heads")
    if norm == "layernorm" and groups != heads:
        raise MechsafetyError("grouped queries with norm='layernorm'", expected="kv_heads=None (GPT-2 has none)")
    if varied and (backups or opposing):
        raise MechsafetyError(
            f"backups={backups}, opposing={opposing} with varied=True", expected="backups=0, opposing=False"
        )
    rng = random.Random(seed)
    if varied:
        plan = varied_plan(rng, layers, heads, decoys, neurons)
    else:
        plan = make_plan(rng, layers, heads, decoys, backups, neurons, opposing)
    tokenizer, pairs = planted_tokenizer(varied), planted_pairs(varied, plan.two_words)
    n_directions = len(plan.directions) + len(reply_successors()) + decoys
    d_head = max(16, 2 * -(-(n_directions + 24) // (2 * heads)))
    shape = "varied-" if varied else "opposing-" if opposing else ""
    name = f"planted-{shape}{norm}-{layers}x{heads}-{seed}"
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # leave the caller's random state unchanged
        if norm == "rmsnorm":
            model = llama(len(tokenizer), layers, heads, groups, d_head, plan.d_mlp, name)
        else:
            model = gpt2(len(tokenizer), layers, heads, d_head, plan.d_mlp, name)
    fill(model, noise, generator)
    write_plan(model, tokenizer, pairs, plan, generator)
    return Planted(model, tokenizer, pairs, plan.truth(), seed)
