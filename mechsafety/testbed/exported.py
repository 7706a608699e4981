"""A planted model as plain data, so that a page can run it without Python."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mechsafety.errors import MechsafetyError
from mechsafety.inputs import public
from mechsafety.models.template import render
from mechsafety.prompts import PromptPairs
from mechsafety.testbed.plant import Planted
from mechsafety.testbed.truth import Truth
from mechsafety.testbed.vocabulary import REFUSAL
from mechsafety.testbed.weights import MAX_LENGTH, weights_of


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """All that a forward pass of a planted Llama needs, with its prompts and the truth.

    Attributes:
        name: The model's name.
        layers, heads, kv_heads: Number of blocks, of heads per block and of key-value heads per block.
        eps: What the norms add to the mean square.
        tensors: Weights by name. Those of block 0 are ``0.q`` [head d_head d_model], ``0.k`` and ``0.v`` [kv_head
            d_head d_model], ``0.o`` [head d_head d_model], ``0.gate``, ``0.up`` and ``0.down`` [neuron d_model], and
            ``0.norm1`` and ``0.norm2`` [d_model]. The others are ``embed`` and ``unembed`` [d_vocab d_model], ``norm``
            [d_model], and ``frequencies`` [d_head / 2]: radians per position of each rotary pair.
        words: The word of each token id.
        special: Words that belong to the chat template and cannot be typed.
        before, after: Token ids that the chat template puts before and after a prompt.
        refusal_ids: Token ids whose log-odds measure refusal.
        twins: Pairs of a harmful word and the harmless word that takes its place in the counterfactual prompt.
        examples: Harmful prompts, one of each word in ``twins``.
        longest: Largest number of tokens of a prompt, without the template.
        truth: The model's circuit, decoys and backups.

    Example:
        >>> found = ms.testbed.exported(made)
        >>> found.layers, found.tensors["0.o"].shape  # head, d_head, d_model
        (4, (4, 16, 64))
    """

    name: str
    layers: int
    heads: int
    kv_heads: int
    eps: float
    tensors: dict[str, np.ndarray]
    words: tuple[str, ...]
    special: tuple[str, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    refusal_ids: tuple[int, ...]
    twins: tuple[tuple[str, str], ...]
    examples: tuple[str, ...]
    longest: int
    truth: Truth


@public
def exported(planted: Planted) -> ExportedModel:
    """Take a planted model's weights, words and truth out of Python, for `mechsafety.viz.explorable_html`.

    Args:
        planted: A Llama in which one word of each prompt is harmful.

    Raises:
        MechsafetyError: A GPT-2, or a model of two harmful words.

    Example:
        >>> from mechsafety.testbed import planted
        >>> made = exported(planted(layers=2, decoys=1, backups=1))
        >>> made.twins[0], made.examples[0]
        (('bombs', 'cakes'), 'tell me about bombs please')
    """
    model, tokenizer = planted.model, planted.tokenizer
    if model.config.model_type != "llama":
        raise MechsafetyError(f"a planted {model.config.model_type}", expected="a Llama: planted(norm='rmsnorm')")
    changes = _changes(planted.pairs)
    ids = tokenizer(render(tokenizer, "me", {})[0], add_special_tokens=False).input_ids
    place = ids.index(tokenizer.convert_tokens_to_ids("me"))
    before, after = tuple(ids[:place]), tuple(ids[place + 1 :])
    config = model.config
    return ExportedModel(
        name=config._name_or_path,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        eps=config.rms_norm_eps,
        tensors=_tensors(model),
        words=tuple(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))),
        special=tuple(tokenizer.all_special_tokens),
        before=before,
        after=after,
        refusal_ids=(int(tokenizer.convert_tokens_to_ids(REFUSAL[0])),),
        twins=tuple(changes),
        examples=tuple(changes.values()),
        longest=MAX_LENGTH - len(before) - len(after),
        truth=planted.truth,
    )


def _changes(pairs: PromptPairs) -> dict[tuple[str, str], str]:
    """The pairs of words that differ between two prompts, each with one harmful prompt; the prompts' frames vary."""
    found: dict[tuple[str, str], list[str]] = {}
    for bad, good in zip(pairs.harmful, pairs.harmless, strict=True):
        differing = [two for two in zip(bad.split(), good.split(), strict=True) if two[0] != two[1]]
        if len(differing) != 1:
            raise MechsafetyError(f"{len(differing)} harmful words in {bad!r}", expected="one per prompt")
        found.setdefault(differing[0], []).append(bad)
    return {words: prompts[k % len(prompts)] for k, (words, prompts) in enumerate(found.items())}


def _tensors(model: Any) -> dict[str, np.ndarray]:
    weights = weights_of(model)
    named = {"embed": weights.embed, "unembed": weights.unembed, "norm": _weight(weights.final_norm)}
    named["frequencies"] = model.model.rotary_emb.inv_freq
    for layer, block in enumerate(weights.layers):
        assert block.gate is not None
        # a block's `read` is under the activation function, its `gate` is the factor
        parts = {"q": block.q, "k": block.k, "v": block.v, "o": block.o}
        parts |= {"gate": block.read, "up": block.gate, "down": block.write}
        parts |= {name: _weight(norm) for name, norm in zip(("norm1", "norm2"), block.norms, strict=True)}
        named |= {f"{layer}.{name}": tensor for name, tensor in parts.items()}
    return {name: np.ascontiguousarray(tensor.detach().float().numpy()) for name, tensor in named.items()}


def _weight(norm: Any) -> Tensor:
    weight: Tensor = norm.weight
    return weight
