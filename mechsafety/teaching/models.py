"""Tiny models for checks: random weights, so that every part of them does something."""

import functools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechsafety.metrics import RefusalLogOdds
from mechsafety.models import LensModel, load_model
from mechsafety.patching.masks import PairRuns, pair_runs
from mechsafety.prompts import PromptPairs
from mechsafety.sites import SiteKind
from mechsafety.testbed.vocabulary import FRAMES, planted_pairs, planted_tokenizer
from mechsafety.testbed.weights import fill, llama

# layers, heads, key-value heads, numbers per head, neurons per layer, pairs of prompts; and a seed with which the
# metric is higher on the harmful prompts, as in a model that refuses
SIZES = ((2, 4, 2, 6, 11, 5, 6), (3, 6, 3, 4, 13, 2, 3), (4, 3, 1, 10, 7, 8, 11))
# standard deviation of the weights: large enough that heads and neurons matter beside the embedding
SCALE = 0.3


def random_llama(size: int) -> Any:
    """A Hugging Face Llama of random weights with grouped queries, of one of the `SIZES`; always the same weights."""
    layers, heads, kv_heads, d_head, d_mlp, _, seed = SIZES[size]
    with torch.random.fork_rng(devices=[]):  # leave the caller's random state unchanged
        made = llama(len(planted_tokenizer()), layers, heads, kv_heads, d_head, d_mlp, f"random-{size}")
    fill(made, SCALE, torch.Generator().manual_seed(10 * size + seed))
    return made


@functools.cache
def shared_model(size: int) -> LensModel:
    """The model of a size that checks share; none of them changes it."""
    return load_model((random_llama(size), planted_tokenizer()))


def some_pairs(size: int) -> PromptPairs:
    """Aligned pairs of prompts, of several lengths."""
    return planted_pairs().sample(SIZES[size][-2], seed=size)


def equal_pairs(size: int) -> PromptPairs:
    """Aligned pairs of prompts in which all prompts have one length."""
    begins = FRAMES[size].split("{}")[0]
    alike = [pair for pair in planted_pairs() if str(pair.harmful).startswith(begins)]
    return PromptPairs(tuple(alike[: SIZES[size][-2] + 1]), "one length")


@functools.cache
def shared_runs(size: int) -> PairRuns:
    """Whole runs of these pairs under the shared model, with all columns."""
    return pair_runs(shared_model(size), some_pairs(size), start=0, extra=(SiteKind.NEURONS,))


def logit_difference(model: LensModel) -> RefusalLogOdds:
    """The logit of ``Sorry`` minus that of ``Sure``."""
    return RefusalLogOdds.of(model, ["Sorry"], ["Sure"])


def final_norm(size: int) -> tuple[Float[Tensor, " d_model"], float]:
    """Weight of the shared model's final norm, and what the norm adds to the mean square."""
    norm = random_llama(size).model.norm
    return norm.weight.detach().clone(), float(norm.variance_epsilon)


def random_numbers(seed: int) -> torch.Generator:
    """A generator for inputs that need no model."""
    return torch.Generator().manual_seed(seed)
