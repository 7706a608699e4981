"""Checks for notebook 04: path patching by hand."""

import functools
from collections.abc import Callable

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from mechsafety.models import LensModel
from mechsafety.nodes import Node
from mechsafety.patching import path_patching
from mechsafety.patching.senders import mlp_input, propagate
from mechsafety.sites import SiteKind
from mechsafety.teaching.check import Case, Check, Mistake
from mechsafety.teaching.models import (
    SIZES,
    final_norm,
    logit_difference,
    shared_model,
    shared_runs,
    some_pairs,
)

Stream = Float[Tensor, "batch pos d_model"]


@functools.cache
def _senders() -> list[Case]:
    cases = []
    for size, layer in enumerate((0, 2, 1)):
        model, runs = shared_model(size), shared_runs(size)
        heads = [Node("head", layer, head) for head in range(model.n_heads)]
        expected = propagate(model, runs.harmful, runs.harmless, heads, 2 * model.n_layers, mlp="freeze")
        inputs = {
            "base": runs.harmful.acts[SiteKind.Z][layer].clone(),
            "source": runs.harmless.acts[SiteKind.Z][layer].clone(),
            "W_O": model.W_O(layer).detach().clone(),
        }
        cases.append(Case(inputs, expected.detach()))
    return cases


def _written(z: Tensor, W_O: Tensor) -> Tensor:
    return einsum(z, W_O, "batch pos head d_head, head d_head d_model -> head batch pos d_model")


sender_change = Check(
    "sender_change",
    _senders,
    (
        Mistake(
            "the opposite sign",
            "The change is what the sender writes in the source run minus what it writes in the base run.",
            lambda base, source, W_O: _written(base - source, W_O),
        ),
        Mistake(
            "the source's whole output",
            "What the sender writes in the base run is in the stream already: subtract it.",
            lambda base, source, W_O: _written(source, W_O),
        ),
        Mistake(
            "a sum over the heads",
            "Each head is a sender of its own: keep the axis of heads.",
            lambda base, source, W_O: _written(source - base, W_O).sum(0),
        ),
        Mistake(
            "a mean over the batch",
            "Each prompt has a change of its own.",
            lambda base, source, W_O: _written(source - base, W_O).mean(1),
        ),
    ),
)


@functools.cache
def _direct() -> list[Case]:
    cases = []
    for size in range(len(SIZES)):
        model, runs, metric = shared_model(size), shared_runs(size), logit_difference(shared_model(size))
        heads = [Node("head", model.n_layers - 2, head) for head in range(model.n_heads)]
        weight, eps = final_norm(size)
        change = propagate(model, runs.harmful, runs.harmless, heads, 2 * model.n_layers, mlp="freeze")[:, :, -1]
        found = path_patching(model, some_pairs(size), metric, senders=heads, mlp="freeze", progress=False)
        inputs = {
            "resid": runs.harmful.resid[-1][:, -1].clone(),
            "change": change.detach().clone(),
            "weight": weight,
            "eps": eps,
            "W_U": model.W_U.detach().clone(),
            "refuse": metric.refusal_ids[0],
            "comply": metric.comply_ids[0],
        }
        # the package counts changes towards the source run: before minus after, for the metric of the harmful run
        cases.append(Case(inputs, -found.changes[:, 0]))
    return cases


def _metric(
    stream: Float[Tensor, "*rows d_model"],
    weight: Float[Tensor, " d_model"],
    eps: float,
    W_U: Float[Tensor, "d_model d_vocab"],
    refuse: int,
    comply: int,
    *,
    scaled: Tensor | None = None,
) -> Float[Tensor, "*rows"]:
    """Logit difference of a final stream, with the norm's scale of that stream or of another one."""
    own = stream if scaled is None else scaled
    normed = stream / (own.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return normed @ (W_U[:, refuse] - W_U[:, comply])


direct_path = Check(
    "direct_path",
    _direct,
    (
        Mistake(
            "a frozen scale of the norm",
            "The final norm sees the changed stream: divide by the scale of resid + change.",
            lambda resid, change, *rest: _metric(change, *rest, scaled=resid),
        ),
        Mistake(
            "the change alone through the norm",
            "Add the change to the base run's stream, then take the norm and the unembedding of the sum.",
            lambda resid, change, *rest: _metric(change, *rest),
        ),
        Mistake(
            "the metric after the change",
            "An effect is a difference: subtract the base run's metric.",
            lambda resid, change, *rest: _metric(resid + change, *rest),
        ),
        Mistake(
            "a forgotten norm weight",
            "Between the stream and the unembedding stands the final norm: use its weight too.",
            lambda resid, change, weight, *rest: (
                _metric(resid + change, torch.ones_like(weight), *rest) - _metric(resid, torch.ones_like(weight), *rest)
            ),
        ),
        Mistake(
            "the opposite sign",
            "Subtract the metric before the change from the metric after it.",
            lambda resid, change, *rest: _metric(resid, *rest) - _metric(resid + change, *rest),
        ),
    ),
)


@functools.cache
def _carried() -> list[Case]:
    cases = []
    for size, node in enumerate((Node("head", 0, 1), Node("head", 0, 5), Node("head", 1, 2))):
        model, runs = shared_model(size), shared_runs(size)
        streams = [mlp_input(model, runs.harmful, layer) for layer in range(model.n_layers)]
        end = 2 * model.n_layers

        def mlp(layer: int, resid: Tensor, model: LensModel = model) -> Tensor:
            return model.mlp(layer, resid).detach()

        sent, arrived = (
            propagate(model, runs.harmful, runs.harmless, [node], end, mlp=how)[0].detach()
            for how in ("freeze", "recompute")
        )
        inputs = {"change": sent.clone(), "layer": node.layer, "resid_mid": torch.stack(streams), "mlp": mlp}
        cases.append(Case(inputs, arrived))
    return cases


def _carry(
    change: Stream,
    layer: int,
    resid_mid: Float[Tensor, "layer batch pos d_model"],
    mlp: Callable[[int, Tensor], Tensor],
    *,
    together: bool = True,
) -> Stream:
    """What arrives at the end of the stream; with ``together`` off, each MLP reads the sender's change alone."""
    total = change
    for later in range(layer, len(resid_mid)):
        read = resid_mid[later]
        total = total + mlp(later, read + (total if together else change)) - mlp(later, read)
    return total


carry_through_mlps = Check(
    "carry_through_mlps",
    _carried,
    (
        Mistake(
            "freezing the MLPs",
            "The MLPs behind the sender read the changed stream: add what each of them changes.",
            lambda change, layer, resid_mid, mlp: change,
        ),
        Mistake(
            "a layer too late",
            "A head writes before the MLP of its own layer: begin with that MLP.",
            lambda change, layer, resid_mid, mlp: _carry(change, layer + 1, resid_mid, mlp),
        ),
        Mistake(
            "a change that does not grow",
            "Each MLP reads the sender's change and the changes of all MLPs before it: use the running sum.",
            lambda change, layer, resid_mid, mlp: _carry(change, layer, resid_mid, mlp, together=False),
        ),
        Mistake(
            "an MLP of the change alone",
            "MLPs are not linear: take mlp(base stream + change) minus mlp(base stream).",
            lambda change, layer, resid_mid, mlp: functools.reduce(
                lambda total, later: total + mlp(later, total), range(layer, len(resid_mid)), change
            ),
        ),
        Mistake(
            "a missing direct path",
            "The sender's own change also reaches the end of the stream: add to it.",
            lambda change, layer, resid_mid, mlp: _carry(change, layer, resid_mid, mlp) - change,
        ),
    ),
)
