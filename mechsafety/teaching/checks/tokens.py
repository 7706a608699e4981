"""Checks for notebook 01: tokens, sites, activations."""

import functools

import torch
from einops import einsum, rearrange, reduce, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from mechsafety.probes import span_means
from mechsafety.prompts.spans import positions
from mechsafety.teaching.check import Case, Check, Mistake
from mechsafety.teaching.models import SIZES, random_llama, random_numbers, shared_model, some_pairs


@functools.cache
def _masks() -> list[Case]:
    cases = []
    for seed, (batch, width) in enumerate(((5, 7), (3, 4), (1, 6))):
        lengths = torch.randint(2, width + 1, (batch,), generator=random_numbers(seed))
        lengths[0] = width - 1  # at least one row is padded
        mask = torch.arange(width) >= rearrange(width - lengths, "batch -> batch 1")
        cases.append(Case({"mask": mask}, positions(mask)))
    return cases


token_positions = Check(
    "token_positions",
    _masks,
    (
        Mistake(
            "positions that count the padding",
            "Count real tokens only: the first real token of every row has position 0.",
            lambda mask: repeat(torch.arange(mask.shape[1]), "pos -> batch pos", batch=mask.shape[0]),
        ),
        Mistake(
            "positions that begin at 1",
            "The first real token has position 0.",
            lambda mask: mask.long().cumsum(1),
        ),
        Mistake(
            "negative positions at the padding",
            "Set them to 0: an embedding table has no row -1, and the mask hides these columns anyway.",
            lambda mask: mask.long().cumsum(1) - 1,
        ),
        Mistake(
            "padding on the wrong side",
            "These rows are padded on the left, so the last token of every prompt is in the last column.",
            lambda mask: (
                repeat(torch.arange(mask.shape[1]), "pos -> batch pos", batch=mask.shape[0])
                * rearrange(torch.arange(mask.shape[1]), "pos -> 1 pos").lt(
                    reduce(mask.long(), "batch pos -> batch 1", "sum")
                )
            ),
        ),
    ),
)


@functools.cache
def _spans() -> list[Case]:
    cases = []
    for size, span in enumerate(("instruction", "suffix", "prefix")):
        model, prompts = shared_model(size), some_pairs(size).harmful
        layer = size % model.n_layers + 1 if size + 1 < model.n_layers else 1
        tokens = model.tokenize(prompts)
        resid = model.cache(tokens, ["resid"]).resid[layer].clone()
        expected = span_means(model, prompts, [layer], [span])[0, 0]
        cases.append(Case({"resid": resid, "mask": tokens.span_mask(span)}, expected))
    return cases


def _masked(resid: Float[Tensor, "batch pos d_model"], mask: Bool[Tensor, "batch pos"]) -> Tensor:
    return resid * rearrange(mask, "batch pos -> batch pos 1")


span_mean = Check(
    "span_mean",
    _spans,
    (
        Mistake(
            "a mean over all columns",
            "Leave out the tokens at which the mask is False; padding is among them.",
            lambda resid, mask: resid.mean(1),
        ),
        Mistake(
            "a division by the number of columns",
            "Divide each prompt's sum by the number of its tokens in the span.",
            lambda resid, mask: _masked(resid, mask).mean(1),
        ),
        Mistake(
            "a mean over the batch",
            "Every prompt keeps a row of its own: average over positions only.",
            lambda resid, mask: _masked(resid, mask).sum((0, 1)) / mask.sum(),
        ),
        Mistake(
            "the wrong position: the last token alone",
            "Average over all tokens of the span.",
            lambda resid, mask: resid[:, -1],
        ),
    ),
)


@functools.cache
def _heads() -> list[Case]:
    cases = []
    for size in range(len(SIZES)):
        model = shared_model(size)
        layer = model.n_layers - 1
        cache = model.cache(some_pairs(size).harmful, ["head_out"])
        weight = random_llama(size).model.layers[layer].self_attn.o_proj.weight.detach()
        z = rearrange(cache.z[layer], "head batch pos d_head -> batch pos head d_head").clone()
        expected = rearrange(cache.head_out[layer], "head batch pos d_model -> batch pos head d_model")
        cases.append(Case({"z": z, "weight": weight}, expected))
    return cases


def _heads_out(z: Float[Tensor, "batch pos head d_head"], weight: Float[Tensor, "head d_head d_model"]) -> Tensor:
    return einsum(z, weight, "batch pos head d_head, head d_head d_model -> batch pos head d_model")


head_outputs = Check(
    "head_outputs",
    _heads,
    (
        Mistake(
            "transposed weights",
            "A linear layer stores [out, in]: here [d_model, (head d_head)]. Split the second axis into heads.",
            lambda z, weight: _heads_out(
                z, rearrange(weight, "(head d_head) d_model -> head d_head d_model", head=z.shape[2])
            ),
        ),
        Mistake(
            "interleaved heads",
            "The numbers of one head lie next to each other: the axis is (head d_head), not (d_head head).",
            lambda z, weight: _heads_out(
                z, rearrange(weight, "d_model (d_head head) -> head d_head d_model", head=z.shape[2])
            ),
        ),
        Mistake(
            "a sum over the heads",
            "That is what attention as a whole writes. Keep the axis of heads.",
            lambda z, weight: rearrange(z, "batch pos head d_head -> batch pos (head d_head)") @ weight.T,
        ),
        Mistake(
            "a mean over the batch",
            "Every prompt keeps what its own heads write.",
            lambda z, weight: reduce(
                _heads_out(z, rearrange(weight, "d_model (head d_head) -> head d_head d_model", head=z.shape[2])),
                "batch pos head d_model -> pos head d_model",
                "mean",
            ),
        ),
    ),
)
