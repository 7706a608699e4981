"""A Llama forward pass in which every node has its own input, so that one edge can carry another run's values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsafety.nodes import Edge, Node, head_and_mlp_nodes
from mechsafety.patching.receivers import Receiver, reaches


@dataclass(frozen=True, slots=True)
class SplitRun:
    """One run: what every sender wrote, and the logits.

    Attributes:
        senders: Outputs of the token embedding, then of every head and MLP in the order of computation.
        logits: Logits at every position.
    """

    senders: Float[Tensor, "sender batch pos d_model"]
    logits: Float[Tensor, "batch pos d_vocab"]


def sender_nodes(config: Any) -> tuple[Node, ...]:
    """The rows of `SplitRun.senders` for a Hugging Face Llama configuration."""
    return (Node("embed"), *head_and_mlp_nodes(config.num_hidden_layers, config.num_attention_heads))


def receiver_slots(config: Any) -> tuple[Receiver, ...]:
    """Everything that reads the residual stream: q, k, v of every head, every MLP, the logits."""
    slots: list[Receiver] = []
    for node in sender_nodes(config)[1:]:
        slots += [(node, slot) for slot in (("q", "k", "v") if node.kind == "head" else ("mlp",))]
    return (*slots, (Node("logits"), "resid"))


def edge_mask(config: Any, edges: Sequence[Edge]) -> Bool[Tensor, "sender receiver"]:
    """True at the given edges."""
    rows = {node: k for k, node in enumerate(sender_nodes(config))}
    columns = {receiver: k for k, receiver in enumerate(receiver_slots(config))}
    mask = torch.zeros(len(rows), len(columns), dtype=torch.bool)
    for edge in edges:
        mask[rows[edge.sender], columns[edge.receiver, edge.slot]] = True
    return mask


def possible_edges(config: Any) -> tuple[Edge, ...]:
    """Every edge that follows the order of computation."""
    return tuple(
        Edge(sender, receiver, slot)
        for sender in sender_nodes(config)
        for receiver, slot in receiver_slots(config)
        if reaches(sender, receiver, parallel=False)
    )


def split_forward(
    model: Any,
    ids: Int[Tensor, "batch pos"],
    source: Float[Tensor, "sender batch pos d_model"] | None = None,
    swapped: Bool[Tensor, "sender receiver pos"] | None = None,
) -> SplitRun:
    """Run a Hugging Face `LlamaForCausalLM`; where ``swapped``, a receiver reads the sender's ``source`` value.

    To patch a whole node, swap it for every receiver. Gradients reach the model's weights and ``source``.

    Args:
        model: The model; grouped queries allowed, no biases.
        ids: Token ids without padding.
        source: Sender outputs of another run, with the rows of `sender_nodes`.
        swapped: True where an edge carries the ``source`` value. Receivers are in the order of `receiver_slots`.
    """
    config, body = model.config, model.model
    n_heads, n_kv = config.num_attention_heads, config.num_key_value_heads
    embed = body.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    cos, sin = body.rotary_emb(embed, positions)
    written = [embed]
    column = 0

    def read(width: int) -> Float[Tensor, "receiver batch pos d_model"]:
        nonlocal column
        own = torch.stack(written)
        total = repeat(own.sum(0), "batch pos d -> receiver batch pos d", receiver=width)
        if source is not None and swapped is not None:
            where = swapped[: len(written), column : column + width]
            if bool(where.any()):
                shape = "sender receiver pos, sender batch pos d -> receiver batch pos d"
                total = total + einsum(where.to(own.dtype), source[: len(written)] - own, shape)
        column += width
        return total

    for block in body.layers:
        attention = block.self_attn
        normed = rearrange(
            block.input_layernorm(read(3 * n_heads)), "(head slot) batch pos d -> slot head batch pos d", slot=3
        )
        q, k, v = (
            _project(normed[slot], layer.weight, heads, n_heads)
            for slot, (layer, heads) in enumerate(
                ((attention.q_proj, n_heads), (attention.k_proj, n_kv), (attention.v_proj, n_kv))
            )
        )
        scores = einsum(
            _rotate(q, cos, sin),
            _rotate(k, cos, sin),
            "head batch query d_head, head batch key d_head -> head batch query key",
        )
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        pattern = (scores * attention.scaling).masked_fill(~causal, float("-inf")).softmax(-1)
        z = einsum(pattern, v, "head batch query key, head batch key d_head -> head batch query d_head")
        out = rearrange(attention.o_proj.weight, "d (head d_head) -> head d_head d", head=n_heads)
        written += list(einsum(z, out, "head batch pos d_head, head d_head d -> head batch pos d"))
        written.append(block.mlp(block.post_attention_layernorm(read(1)[0])))
    logits = model.lm_head(body.norm(read(1)[0]))
    return SplitRun(torch.stack(written), logits)


def _project(
    normed: Float[Tensor, "head batch pos d_model"], weight: Float[Tensor, "rows d_model"], heads: int, n_heads: int
) -> Float[Tensor, "head batch pos d_head"]:
    """Each head's projection of its own input; a key-value head's weight serves its whole group."""
    per_head = repeat(
        rearrange(weight, "(kv d_head) d -> kv d_head d", kv=heads),
        "kv d_head d -> (kv group) d_head d",
        group=n_heads // heads,
    )
    return einsum(normed, per_head, "head batch pos d, head d_head d -> head batch pos d_head")


def _rotate(x: Float[Tensor, "head batch pos d_head"], cos: Tensor, sin: Tensor) -> Float[Tensor, "..."]:
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin
