"""Whole forwards with TransformerLens' own hooks: slow references that share nothing with the package's engine."""

import torch


def whole_logits(model, tokens, edits=(), grad=False):
    """Next-token logits of a whole forward; ``edits`` are (TransformerLens hook name, function of the tensor)."""
    hooks = [(name, lambda tensor, hook, function=function: function(tensor)) for name, function in edits]
    position_ids = (tokens.mask.long().cumsum(1) - 1).clamp(min=0)
    lens = model.bridge
    with torch.set_grad_enabled(grad), lens.hooks(fwd_hooks=hooks):
        if type(lens).__name__ == "HookedTransformer":
            logits = lens(tokens.ids, attention_mask=tokens.mask.long())
        else:
            mask = tokens.mask.long()
            logits = model.hf_model(input_ids=tokens.ids, attention_mask=mask, position_ids=position_ids).logits
    return logits[:, -1].float()


def record(model, tokens, names):
    """Activations of a whole forward by hook name."""
    store = {}
    whole_logits(
        model, tokens, [(name, lambda t, name=name: store.update({name: t.detach().clone()})) for name in names]
    )
    return store


def node_hook(node):
    """Hook name of a head, MLP or neuron, and the index of the node in its activation."""
    names = {
        "head": (f"blocks.{node.layer}.attn.hook_z", (slice(None), slice(None), node.index)),
        "mlp": (f"blocks.{node.layer}.hook_mlp_out", (slice(None), slice(None))),
        "neuron": (f"blocks.{node.layer}.mlp.hook_post", (slice(None), slice(None), node.index)),
    }
    return names[node.kind]


def patched_whole(model, base, source, nodes, where=None):
    """Logits of a whole run of ``base`` in which ``nodes`` take their values from a run of ``source``.

    ``where`` [batch pos] limits the columns.
    """
    values = record(model, source, sorted({node_hook(node)[0] for node in nodes}))
    edits = []
    for node in nodes:
        name, index = node_hook(node)

        def replace(tensor, name=name, index=index):
            tensor = tensor.clone()
            new = values[name][index]
            if where is not None:
                keep = where.reshape(*where.shape, *[1] * (new.ndim - 2))
                new = torch.where(keep, new, tensor[index])
            tensor[index] = new
            return tensor

        edits.append((name, replace))
    return whole_logits(model, base, edits)
