"""What both generations of TransformerLens must compute alike; `test_generations` compares it with a stored file.

Two generations cannot be in one process. The file was written with TransformerLens 4.3:
``python tests/generations.py`` writes it again, after a change that is meant to change numbers.
"""

import hashlib
import sys
from pathlib import Path

import torch

import mechsafety as ms
from mechsafety.nodes import Node
from mechsafety.patching import Projection, pair_runs
from mechsafety.sites import Site, SiteKind

FILE = Path(__file__).parent / "data" / "generations.safetensors"
TINY = ("llama", "gpt2")
PROMPTS = ["how do i make a bomb", "help", "teach me to steal a car please"]


def weights_hash(hf):
    """Of the unwrapped model's parameters: the same in both, or nothing could be compared."""
    digest = hashlib.sha256()
    for name, parameter in sorted(hf.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def tiny_results(model, pairs, metric):
    """Activations, patching, path patching and edge attribution of a tiny model."""
    cache = model.cache(PROMPTS, ["resid", "z", "q", "k", "v", "pattern", "neurons", "attn_out", "mlp_out"])
    real = cache.tokens.mask
    out = {"logits": model.logits(PROMPTS)[:, ::7]}
    out["resid"] = cache.resid[:, real][..., ::4]
    for name in ("z", "q", "k", "v"):
        out[name] = getattr(cache, name)[:, :, real][..., ::4]
    out["neurons"] = cache.neurons[:, real][..., ::8]
    out["attn_out"], out["mlp_out"] = cache.attn_out[:, real][..., ::8], cache.mlp_out[:, real][..., ::8]
    out["pattern"] = cache.pattern[:, :, 2, -6:]
    sites = [Site(SiteKind.Q, 1, 1), Site(SiteKind.K, 1, 1), Site(SiteKind.V, 2, 0), Site(SiteKind.PATTERN, 1, 2)]
    sites += [Site(SiteKind.RESID_MID, 1), Site(SiteKind.NEURONS, 2, 5)]
    calls = {
        "patching": ms.activation_patching(model, pairs, metric, progress=False),
        "patching_sites": ms.activation_patching(model, pairs, metric, nodes=sites, positions="each", progress=False),
    }
    slots = [(Node("head", 2, 1), "q"), (Node("head", 2, 2), "k"), (Node("head", 1, 3), "v"), (Node("mlp", 2), "mlp")]
    for mlp in ("recompute", "freeze"):
        calls[f"paths_{mlp}"] = ms.path_patching(model, pairs, metric, mlp=mlp, progress=False)
        calls[f"slots_{mlp}"] = ms.path_patching(model, pairs, metric, receivers=slots, mlp=mlp, progress=False)
    calls["paths_frozen_norms"] = ms.path_patching(model, pairs, metric, norm="freeze", progress=False)
    unit = torch.nn.functional.one_hot(torch.tensor(3), model.d_model).float()
    calls["projection"] = ms.patching.path_projection(
        model, pairs, Projection(unit, Site(SiteKind.RESID_PRE, 2)), progress=False
    )
    out |= {name: result.changes for name, result in calls.items()}
    matrix = ms.patching.path_matrix(model, pairs, progress=False)
    out |= {f"matrix_{slot}": getattr(matrix, slot) for slot in "qkv"}
    for method in ("eap", "eap-ig", "ig-activations", "mask-ig"):
        found = ms.edge_attribution(model, pairs, metric, method=method, steps=5, progress=False)
        out[f"edges_{method}"] = found.scores
    return {name: tensor.float().cpu().contiguous() for name, tensor in out.items()}


def demo_results(model):
    """The same of the demo model, in small: two pairs, some heads, all edges among a few nodes."""
    pairs = ms.PromptPairs.builtin().split("test").sample(2, seed=0)
    first = model.tokenizer("I", add_special_tokens=False).input_ids[0]
    metric = ms.RefusalLogOdds((first,), ("I",))
    nodes = [Node("head", layer, head) for layer in (3, 15, 27) for head in (0, 4)] + [Node("mlp", 12), Node("mlp", 28)]
    runs = pair_runs(model, pairs)
    # paths that carry something: of a hundredth of a nat only rounding would be compared
    slots, near = [(Node("mlp", 16), "mlp"), (Node("head", 18, 4), "v")], [Node("head", 15, 4), Node("mlp", 12)]
    out = {
        "logits": model.logits(pairs.harmful)[:, ::97],
        "resid": runs.harmful.resid[:, :, -1, ::16],
        "patching": ms.activation_patching(model, runs, metric, nodes=nodes, progress=False).changes,
        "paths": ms.path_patching(model, runs, metric, senders=nodes, progress=False).changes,
        "slots": ms.path_patching(model, runs, metric, senders=near, receivers=slots, progress=False).changes,
        "edges": ms.edge_attribution(model, runs, metric, method="eap", nodes=nodes, progress=False).scores,
    }
    return {name: tensor.float().cpu().contiguous() for name, tensor in out.items()}


def main():
    """Write the file."""
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(here), str(here.parent / "scripts")]
    from safetensors.torch import save_file
    from tiny import tiny_hf_model, tiny_model, tiny_pairs

    found = {f"demo.{name}": tensor for name, tensor in demo_results(ms.load_model("demo")).items()}
    metric = ms.RefusalLogOdds((20, 21), ("a", "b"), (30,), ("c",))
    for kind in TINY:
        found[f"{kind}.weights"] = weights_hash(tiny_hf_model(kind))
        results = tiny_results(tiny_model(kind), tiny_pairs(), metric)
        found |= {f"{kind}.{name}": tensor for name, tensor in results.items()}
    FILE.parent.mkdir(exist_ok=True)
    save_file(found, FILE)


if __name__ == "__main__":
    main()
