"""Models whose refusal circuit is written into their weights: no training, another circuit for every seed."""

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
from mechsafety.testbed.vocabulary import planted_pairs, planted_tokenizer, reply_successors
from mechsafety.testbed.weights import fill, gpt2, llama


@dataclass(frozen=True, slots=True)
class Planted:
    """A model whose refusal circuit is known by construction.

    Attributes:
        model: Hugging Face Llama (RMSNorm) or GPT-2 (LayerNorm).
        tokenizer: Its tokenizer, one token a word, with a chat template.
        pairs: Prompts that it refuses, each with a counterfactual that it answers. They are of four topics, two of
            them in the split ``test``.
        truth: Its circuit, decoys and backups.
        seed: What it was made from.
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
    norm: str = "rmsnorm",
    noise: float = 0.01,
) -> Planted:
    """Build a chat model that refuses by a circuit of known parts, in well under a second.

    A detection head moves whether the instruction names something harmful to the end of the instruction; evaluation
    neurons there decide; a decision head moves their verdict to the last token; production neurons write the refusal's
    first word. Layers, heads, neurons and the directions in the residual stream are drawn from the seed; all other
    weights are small noise. What happens between is told apart by orthonormal directions, none along an axis.

    *Decoys* are heads and neurons that write large vectors which depend on whether the prompt is harmful, to
    directions that nothing reads; on harmless prompts they point the other way and are as long, so that no norm
    downstream sees a difference.
    *Backups* double a stage: two heads (or neurons of two MLPs) write the same, and their reader gives the same for one
    as for both.

    Args:
        seed: Of everything.
        layers: Blocks; at least 2.
        heads: Attention heads a block.
        kv_heads: Key-value heads, a divisor of ``heads``; as many as heads by default.
        decoys: Decoy heads and decoy neurons, by turns.
        backups: Stages that are doubled: 0, 1 (detection, evaluation or decision, by the seed) or 2 (detection and one
            of the others).
        neurons: Evaluation and production neurons; evaluation has one where it or the decision is doubled, because a
            reader that is content with half its input would not miss one of several.
        norm: ``rmsnorm`` (Llama) or ``layernorm`` (GPT-2, which has no grouped queries).
        noise: Standard deviation of the weights that mean nothing.

    Raises:
        MechsafetyError: An unknown norm, sizes that do not divide, or a model too small for what is asked for.

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
    plan = make_plan(random.Random(seed), layers, heads, decoys, backups, neurons)
    tokenizer, pairs = planted_tokenizer(), planted_pairs()
    n_directions = 12 + len(reply_successors()) + decoys
    d_head = max(16, 2 * -(-(n_directions + 24) // (2 * heads)))
    name = f"planted-{norm}-{layers}x{heads}-{seed}"
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # the caller's random state is not ours to move
        if norm == "rmsnorm":
            model = llama(len(tokenizer), layers, heads, groups, d_head, plan.d_mlp, name)
        else:
            model = gpt2(len(tokenizer), layers, heads, d_head, plan.d_mlp, name)
    fill(model, noise, generator)
    write_plan(model, tokenizer, pairs, plan, generator)
    return Planted(model, tokenizer, pairs, plan.truth(), seed)
