"""Every analysis in bfloat16: the same numbers as in float32, up to its three digits."""

import numpy as np
import pytest
import torch

import mechsafety as ms
from mechsafety.nodes import Node


@pytest.fixture(scope="module")
def both(make_hf_model, make_tokenizer):
    return [ms.load_model((make_hf_model("llama"), make_tokenizer()), dtype=kind) for kind in ("float32", "bfloat16")]


def close(full, half, least=0.98):
    """Correlated as far as rounding lets them be; values themselves differ by a percent or so."""
    a, b = full.float().flatten().numpy(), half.float().flatten().numpy()
    assert np.isfinite(b).all()
    assert np.corrcoef(a, b)[0, 1] > least


def test_patching(both, pairs, logit_difference):
    full, half = (ms.activation_patching(model, pairs, logit_difference, progress=False) for model in both)
    close(full.changes, half.changes)


def test_paths(both, pairs, logit_difference):
    for mlp in ("freeze", "recompute"):
        full, half = (ms.path_patching(model, pairs, logit_difference, mlp=mlp, progress=False) for model in both)
        close(full.changes, half.changes)
    slots = [(Node("head", 2, 1), "q"), (Node("head", 2, 1), "k"), (Node("mlp", 2), "mlp")]
    full, half = (ms.path_patching(model, pairs, logit_difference, receivers=slots, progress=False) for model in both)
    close(full.changes, half.changes, 0.9)


def test_attribution(both, pairs, logit_difference):
    full, half = (ms.node_attribution(model, pairs, logit_difference) for model in both)
    close(full.heads, half.heads, 0.95)
    full, half = (ms.direct_logit_attribution(model, pairs, logit_difference) for model in both)
    close(full.heads, half.heads)
    for method in ("eap", "eap-ig", "mask-ig"):
        full, half = (
            ms.edge_attribution(model, pairs, logit_difference, method=method, progress=False) for model in both
        )
        close(full.scores, half.scores, 0.9)
        assert half.scores.dtype == torch.float32
