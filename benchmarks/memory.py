"""Peak memory of the analyses on 8 pairs, one call after the other in one process."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from measure import memory_gib, reset_peak, timed
from models import equal_length_pairs, metric_of

import mechsafety as ms
from mechsafety.models import LensModel
from mechsafety.nodes import Node
from mechsafety.sites import Site, SiteKind

PAIRS = 8
# what no call may exceed on a model of 135M parameters, the loaded model included
LIMIT_GIB = 3.0
NAME = "memory"


def calls(model: LensModel) -> dict[str, Callable[[], Any]]:
    """Every analysis by a name that says its options; sweeps take one layer, since their batches set the memory."""
    pairs, metric = equal_length_pairs(model, PAIRS), metric_of(model)
    # validation prompts may not be trained on
    others = ms.PromptPairs(
        tuple(replace(p, harmful=f"{p.harmful} please", harmless=f"{p.harmless} please") for p in pairs)
    )
    last, some = model.n_layers - 1, {"progress": False}
    small = ms.MapOptions(limit=16, n_random=20)
    heads = [Node("head", 0, k) for k in range(model.n_heads)]
    every = [Site(kind, 0) for kind in (SiteKind.RESID_PRE, SiteKind.RESID_MID, SiteKind.NEURONS, SiteKind.PATTERN)]
    query = [(Node("head", last, 0), "q")]

    def patching(**options: Any) -> Callable[[], Any]:
        given = {"nodes": heads} | options
        return lambda: ms.activation_patching(model, pairs, metric, **given, **some)

    def edges(**options: Any) -> Callable[[], Any]:
        return lambda: ms.edge_attribution(model, pairs, metric, **options, **some)

    return {
        "activation_patching, heads": patching(),
        "activation_patching, sites": patching(nodes=every),
        "activation_patching, each position": patching(positions="each"),
        **{f"activation_patching, source={name}": patching(source=name) for name in ("mean", "resample", "zero")},
        "path_patching, to logits": lambda: ms.path_patching(model, pairs, metric, **some),
        "path_patching, to a query": lambda: ms.path_patching(model, pairs, metric, receivers=query, **some),
        "path_matrix": lambda: ms.patching.path_matrix(model, pairs, **some),
        **{f"edge_attribution, {name}": edges(method=name) for name in ("eap", "eap-ig")},
        "edge_attribution, ig-activations, 1 step": edges(method="ig-activations", steps=1),
        "edge_attribution, neurons of a layer": edges(neurons=[last], steps=1),
        "node_attribution": lambda: ms.node_attribution(model, pairs, metric, **some),
        "node_attribution, neurons": lambda: ms.node_attribution(model, pairs, metric, neurons=True, **some),
        "direct_logit_attribution": lambda: ms.direct_logit_attribution(model, pairs, metric, **some),
        "logit_lens, all positions": lambda: ms.logit_lens(model, pairs, metric, positions="all", **some),
        "head_attribution": lambda: ms.head_attribution(model, pairs, metric, scores=["direct", "attention"], **some),
        "refusal_direction, one layer": lambda: ms.refusal_direction(
            model, pairs, metric, layers=[last // 2], validation=others, **some
        ),
        "contrast_neurons": lambda: ms.neurons.contrast_neurons(model, pairs),
        "generate, 64 tokens": lambda: model.generate(pairs.harmful),
        "map_refusal_circuit, 16 pairs": lambda: ms.map_refusal_circuit(model, options=small, **some),
    }


def memory(model: LensModel) -> dict[str, Any]:
    """Seconds and peak memory of each call."""
    found = {}
    model.provenance()
    for name, call in calls(model).items():
        reset_peak()
        seconds, _ = timed(call)
        found[name] = {"seconds": seconds, "peak_gib": memory_gib()}
    return {"calls": found, "largest_gib": max(row["peak_gib"] for row in found.values())}
