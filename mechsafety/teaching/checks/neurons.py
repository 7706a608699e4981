"""Checks for notebook 05: safety neurons of an aligned/base pair."""

import functools
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from mechsafety.models import LensModel, load_model
from mechsafety.neurons import dynamic_patching, safety_neurons, top_mask
from mechsafety.prompts import Spans, Tokens
from mechsafety.sites import Site, SiteKind
from mechsafety.teaching.check import Case, Check, Mistake
from mechsafety.teaching.models import SIZES, random_llama, random_numbers, shared_model, some_pairs
from mechsafety.testbed.vocabulary import planted_tokenizer

Neurons = Float[Tensor, "layer batch pos d_mlp"]
Mask = Bool[Tensor, "layer d_mlp"]
# how far the weights of an aligned model are from its base's, as a share of their size
ALIGNED = 0.7


@functools.cache
def _aligned(size: int) -> LensModel:
    """The shared model of a size with other weights, which stands for the same model after safety training.

    Attention differs too: otherwise a patch of all neurons would give the aligned model itself.
    """
    made, rng = random_llama(size), random_numbers(100 + size)
    with torch.no_grad():
        for block in made.model.layers:
            for weight in (block.mlp.gate_proj.weight, block.self_attn.o_proj.weight):
                weight += ALIGNED * weight.std() * torch.randn(weight.shape, generator=rng)
    return load_model((made, planted_tokenizer()))


@functools.cache
def _pairs() -> list[Case]:
    cases = []
    for size in range(len(SIZES)):
        base, aligned, prompts = shared_model(size), _aligned(size), some_pairs(size).harmful
        tokens = base.tokenize(prompts)
        inputs = {
            "base": base.cache(tokens, ["neurons"]).neurons.clone(),
            "aligned": aligned.cache(tokens, ["neurons"]).neurons.clone(),
            "mask": tokens.mask,
        }
        found = safety_neurons(aligned, base, prompts, positions="prompt", progress=False)
        cases.append(Case(inputs, found.change))
    return cases


def _mean(values: Neurons, mask: Bool[Tensor, "batch pos"]) -> Float[Tensor, "layer d_mlp"]:
    return values[:, mask].mean(1)


def _mean_of_means(values: Neurons, mask: Bool[Tensor, "batch pos"]) -> Float[Tensor, "layer d_mlp"]:
    kept = values * rearrange(mask, "batch pos -> batch pos 1")
    return (kept.sum(2) / rearrange(mask.sum(1), "batch -> batch 1")).mean(1)


change_scores = Check(
    "change_scores",
    _pairs,
    (
        Mistake(
            "padding that counts",
            "Leave out the columns at which the mask is False.",
            lambda base, aligned, mask: (base - aligned).square().mean((1, 2)).sqrt(),
        ),
        Mistake(
            "a division by the number of all columns",
            "Divide by the number of tokens that count, which is the number of True values in the mask.",
            lambda base, aligned, mask: (
                ((base - aligned).square() * rearrange(mask, "batch pos -> batch pos 1")).mean((1, 2)).sqrt()
            ),
        ),
        Mistake(
            "a mean of the prompts' means",
            "Pool the tokens of all prompts: a long prompt counts more than a short one.",
            lambda base, aligned, mask: _mean_of_means((base - aligned).square(), mask).sqrt(),
        ),
        Mistake(
            "a difference of means",
            "Square before you average: changes of opposite signs must not cancel.",
            lambda base, aligned, mask: _mean(base - aligned, mask).abs(),
        ),
        Mistake(
            "a missing root",
            "The score is a root mean square: take the square root of the mean.",
            lambda base, aligned, mask: _mean((base - aligned).square(), mask),
        ),
        Mistake(
            "a mean absolute change",
            "The score is a root mean square: square, average, take the root.",
            lambda base, aligned, mask: _mean((base - aligned).abs(), mask),
        ),
    ),
)


@functools.cache
def _chosen() -> list[Case]:
    cases = []
    for seed, (layers, width, count) in enumerate(((3, 11, 6), (5, 8, 9), (2, 20, 7))):
        rng = random_numbers(seed)
        # more of them in later layers, as alignment has it, and in each layer fewer than half
        chosen = torch.zeros(layers, width, dtype=torch.bool)
        for layer in range(layers):
            chosen[layer, torch.randperm(width, generator=rng)[: 1 + (count * layer) // (2 * layers)]] = True
        noise = torch.rand(layers, width, generator=rng)
        free = noise.masked_fill(chosen, -1)
        rows = [top_mask(free[[layer]], int(chosen[layer].sum())) for layer in range(layers)]
        cases.append(Case({"chosen": chosen, "noise": noise}, torch.cat(rows)))
    return cases


def _per_layer(values: Float[Tensor, "layer d_mlp"], counts: Sequence[int]) -> Mask:
    return torch.cat([top_mask(values[[layer]], count) for layer, count in enumerate(counts)])


matched_control = Check(
    "matched_control",
    _chosen,
    (
        Mistake(
            "a control that shares neurons with the chosen set",
            "Leave the chosen neurons out before you draw: otherwise the control has part of their effect.",
            lambda chosen, noise: _per_layer(noise, chosen.sum(1).tolist()),
        ),
        Mistake(
            "a control that is not matched by layer",
            "Draw in each layer as many as are chosen there: what a neuron can do depends on its depth.",
            lambda chosen, noise: top_mask(noise.masked_fill(chosen, -1), int(chosen.sum())),
        ),
        Mistake(
            "equally many neurons in every layer",
            "Draw in each layer as many as are chosen there.",
            lambda chosen, noise: _per_layer(
                noise.masked_fill(chosen, -1), [int(chosen.sum()) // len(chosen)] * len(chosen)
            ),
        ),
        Mistake(
            "the smallest random numbers",
            "Take the free neurons with the largest numbers in `noise`.",
            lambda chosen, noise: _per_layer((1 - noise).masked_fill(chosen, -1), chosen.sum(1).tolist()),
        ),
    ),
)


# of this size the reply ends before it has its full length
ENDS = 1
Run = Callable[..., tuple[Tensor, Tensor]]


def _runner(model: LensModel, longest: int) -> Run:
    """A model as a function of at most this number of token ids: a reply without end is stopped there."""

    def run(
        ids: Sequence[int], chosen: Mask | None = None, values: Float[Tensor, "layer pos d_mlp"] | None = None
    ) -> tuple[Float[Tensor, " d_vocab"], Float[Tensor, "layer pos d_mlp"]]:
        """Next-token logits, and all neurons; the chosen ones take the given values first."""
        if len(ids) > longest:
            raise ValueError(f"a model was given {len(ids)} tokens; a reply ends after `length` tokens or with `end`")
        row = torch.tensor([list(ids)])
        tokens = Tokens(row, torch.ones_like(row, dtype=torch.bool), (Spans((0, len(ids)), len(ids)),))
        seen: list[Tensor] = []

        def edit(layer: int) -> Callable[[Tensor], Tensor]:
            def hook(own: Tensor) -> Tensor:
                new = own if chosen is None or values is None else torch.where(chosen[layer], values[layer], own)
                seen.append(new[0].detach().clone())
                return new

            return hook

        with model.hooks([(Site(SiteKind.NEURONS, layer), edit(layer)) for layer in range(model.n_layers)]):
            logits = model.logits(tokens)[0]
        return logits, torch.stack(seen)

    return run


@functools.cache
def _replies() -> list[Case]:
    cases = []
    for size, length in enumerate((4, 6, 5)):
        base, aligned = shared_model(size), _aligned(size)
        share = torch.rand(base.n_layers, base.d_mlp, generator=random_numbers(size))
        chosen = top_mask(share, base.n_layers * base.d_mlp // 2)
        prompt = some_pairs(size).harmful[0]
        found = dynamic_patching(base, aligned, chosen, [prompt], max_new_tokens=length, judge=None, progress=False)
        ids, reply, end = base.tokenize([prompt]).ids[0].tolist(), list(found.tokens[0]), base.end_ids[0]
        if size == ENDS:  # these models never end a reply: here one of its tokens does
            end = reply[length // 2]
            reply = reply[: reply.index(end) + 1]
        longest = len(ids) + 2 * length
        inputs = {
            "base": _runner(base, longest),
            "aligned": _runner(aligned, longest),
            "chosen": chosen,
            "prompt": ids,
            "length": length,
            "end": end,
        }
        cases.append(Case(inputs, torch.tensor(reply)))
    return cases


def _reply(
    base: Run,
    aligned: Run,
    chosen: Mask,
    prompt: Sequence[int],
    length: int,
    end: int,
    *,
    speaker: str = "base",
    reads: str = "reply",
    last: bool = False,
    ends: bool = True,
) -> list[int]:
    """A reply under dynamic patching; or one of the mistakes.

    These are: the aligned model's token is appended (``speaker``), the aligned model reads its ``own`` reply
    (``reads``), only the last position is patched (``last``), and the reply goes on after its end (``ends``).
    """
    reply: list[int] = []
    own: list[int] = []
    while len(reply) < length and not (ends and end in reply):
        ids = [*prompt, *reply]
        theirs, values = aligned([*prompt, *(own if reads == "own" else reply)])
        if last:
            values = torch.cat([base(ids)[1][:, :-1], values[:, -1:]], 1)
        logits, _ = base(ids, chosen, values)
        own.append(int(theirs.argmax()))
        reply.append(int((theirs if speaker == "aligned" else logits).argmax()))
    return reply


def _alone(base: Run, aligned: Run, chosen: Mask, prompt: Sequence[int], length: int, end: int) -> list[int]:
    return _reply(base, aligned, torch.zeros_like(chosen), prompt, length, end)


def _all(base: Run, aligned: Run, chosen: Mask, prompt: Sequence[int], length: int, end: int) -> list[int]:
    return _reply(base, aligned, torch.ones_like(chosen), prompt, length, end)


dynamic_reply = Check(
    "dynamic_reply",
    _replies,
    (
        Mistake(
            "a base model without patches",
            "Give the base model the chosen neurons and the aligned model's values at every step.",
            _alone,
        ),
        Mistake(
            "the aligned model's token",
            "The base model speaks: append its most probable token under the patch.",
            lambda *inputs: _reply(*inputs, speaker="aligned"),
        ),
        Mistake(
            "a patch of all neurons",
            "Pass on the mask of the chosen neurons.",
            _all,
        ),
        Mistake(
            "an aligned model that reads its own reply",
            "Both models read the same tokens: the prompt and what the base model has said so far.",
            lambda *inputs: _reply(*inputs, reads="own"),
        ),
        Mistake(
            "a patch of the last position alone",
            "Patch every position of the forward, those of the prompt included.",
            lambda *inputs: _reply(*inputs, last=True),
        ),
        Mistake(
            "a reply that goes on after its end",
            "Stop once the token `end` is appended.",
            lambda *inputs: _reply(*inputs, ends=False),
        ),
        Mistake(
            "a reply without its end",
            "The token `end` still belongs to the reply: append it, then stop.",
            lambda *inputs: [token for token in _reply(*inputs) if token != inputs[-1]],
        ),
    ),
)
