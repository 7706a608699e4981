"""Tiny random models of two block styles, and writable views of their weights under one set of names."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

MAX_LENGTH = 128
# so large that the last pairs of dimensions of a query or key hardly rotate over a short prompt
ROTARY_BASE = 1e7


@dataclass(frozen=True, slots=True)
class BlockWeights:
    """Views of one block's weights: writing into them changes the model.

    Attributes:
        q, o: Query and output weights of each head.
        k, v: Key and value weights of each key-value head.
        read: Each neuron's input weights under the activation function.
        gate: Input weights of the factor that multiplies the activation (Llama's up-projection); None without gated
            neurons.
        write: Each neuron's output weights.
        norms: The norms before attention and before the MLP.
    """

    q: Float[Tensor, "head d_head d_model"]
    k: Float[Tensor, "kv_head d_head d_model"]
    v: Float[Tensor, "kv_head d_head d_model"]
    o: Float[Tensor, "head d_head d_model"]
    read: Float[Tensor, "d_mlp d_model"]
    gate: Float[Tensor, "d_mlp d_model"] | None
    write: Float[Tensor, "d_mlp d_model"]
    norms: tuple[nn.Module, nn.Module]


@dataclass(frozen=True, slots=True)
class Weights:
    """Views of a model's weights.

    Attributes:
        embed, unembed: Token embedding and unembedding.
        layers: The blocks.
        biases: All other tensors that write to the residual stream: output biases and position embeddings.
        final_norm: The norm before the unembedding.
        activation: The neurons' activation function.
    """

    embed: Float[Tensor, "d_vocab d_model"]
    unembed: Float[Tensor, "d_vocab d_model"]
    layers: tuple[BlockWeights, ...]
    biases: tuple[Tensor, ...]
    final_norm: nn.Module
    activation: nn.Module


def llama(d_vocab: int, layers: int, heads: int, kv_heads: int, d_head: int, d_mlp: int, name: str) -> Any:
    """A Llama: RMSNorm, rotary positions, gated neurons, grouped queries."""
    config: Any = transformers.LlamaConfig(
        vocab_size=d_vocab,
        hidden_size=heads * d_head,
        intermediate_size=d_mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=d_head,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
        tie_word_embeddings=False,
        bos_token_id=2,
        eos_token_id=5,
        pad_token_id=0,
    )
    config.name_or_path = name
    return transformers.LlamaForCausalLM(config).eval()


def gpt2(d_vocab: int, layers: int, heads: int, d_head: int, d_mlp: int, name: str) -> Any:
    """A GPT-2: LayerNorm with biases, learned positions, plain neurons."""
    config: Any = transformers.GPT2Config(
        vocab_size=d_vocab,
        n_embd=heads * d_head,
        n_inner=d_mlp,
        n_layer=layers,
        n_head=heads,
        n_positions=MAX_LENGTH,
        tie_word_embeddings=False,
        bos_token_id=2,
        eos_token_id=5,
        pad_token_id=0,
    )
    config.name_or_path = name
    return transformers.GPT2LMHeadModel(config).eval()


def fill(model: Any, scale: float, generator: torch.Generator) -> None:
    """Draw every weight and bias from a normal with standard deviation ``scale``; norm weights from 0.8 to 1.2."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = any(part in name.split(".")[-2] for part in ("norm", "ln_"))
            if is_norm and name.endswith("weight"):
                parameter.uniform_(0.8, 1.2, generator=generator)
            else:
                parameter.normal_(0.0, scale, generator=generator)


def weights_of(model: Any) -> Weights:
    """Views of the weights of a model that `llama` or `gpt2` made."""
    if isinstance(model, transformers.LlamaForCausalLM):
        body = model.model
        blocks = tuple(_llama_block(model.config, block) for block in body.layers)
        return Weights(
            body.embed_tokens.weight.data, model.lm_head.weight.data, blocks, (), body.norm, body.layers[0].mlp.act_fn
        )
    body = model.transformer
    blocks = tuple(_gpt2_block(model.config, block) for block in body.h)
    biases = [part.c_proj.bias.data for block in body.h for part in (block.attn, block.mlp)]
    written = (body.wpe.weight.data, *biases)
    return Weights(body.wte.weight.data, model.lm_head.weight.data, blocks, written, body.ln_f, body.h[0].mlp.act)


def _llama_block(config: Any, block: Any) -> BlockWeights:
    attention, mlp = block.self_attn, block.mlp
    split = "(head d_head) d -> head d_head d"
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return BlockWeights(
        rearrange(attention.q_proj.weight.data, split, head=heads),
        rearrange(attention.k_proj.weight.data, split, head=kv_heads),
        rearrange(attention.v_proj.weight.data, split, head=kv_heads),
        rearrange(attention.o_proj.weight.data, "d (head d_head) -> head d_head d", head=heads),
        mlp.gate_proj.weight.data,
        mlp.up_proj.weight.data,
        rearrange(mlp.down_proj.weight.data, "d neuron -> neuron d"),
        (block.input_layernorm, block.post_attention_layernorm),
    )


def _gpt2_block(config: Any, block: Any) -> BlockWeights:
    # GPT-2 stores its weights input first
    split, heads = "d (slot head d_head) -> slot head d_head d", config.n_head
    q, k, v = rearrange(block.attn.c_attn.weight.data, split, slot=3, head=heads)
    return BlockWeights(
        q,
        k,
        v,
        rearrange(block.attn.c_proj.weight.data, "(head d_head) d -> head d_head d", head=heads),
        rearrange(block.mlp.c_fc.weight.data, "d neuron -> neuron d"),
        None,
        block.mlp.c_proj.weight.data,
        (block.ln_1, block.ln_2),
    )
