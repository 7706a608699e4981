"""Tiny GGUF files, written as llama.cpp's converter writes them."""

import gguf
import torch
import transformers
from tokenizers import pre_tokenizers

CHAT = (
    "{% for m in messages %}<user>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = ["<s>", "<end>", "<user>", "<assistant>", "<pad>"]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["t e", "te a", "c a", "ca r", "Ġ a"]
TOKENS = [*SPECIAL, *LETTERS, *(merge.replace(" ", "") for merge in MERGES)]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llama_of(**options):
    """A random Llama whose vocabulary is that of the files."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        **{**shape, "num_key_value_heads": 2, "initializer_range": 0.2, **options},
        vocab_size=len(TOKENS),
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=4,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gguf_tensors(model):
    """Tensors of a Llama under their names in the file; queries and keys in the order of llama.cpp's rotation."""
    config, found = model.config, {}
    for name, tensor in model.state_dict().items():
        stem, _, end = name.rpartition(".")
        short = stem.removeprefix("model.layers.")
        layer, _, part = short.partition(".")
        short = f"blk.{layer}.{NAMES[part]}" if layer.isdigit() else NAMES[stem]
        if "attn_q" in short or "attn_k" in short:
            heads = config.num_attention_heads if "attn_q" in short else config.num_key_value_heads
            rows = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
            tensor = rows.swapaxes(1, 2).reshape(tensor.shape)
        found[f"{short}.{end}"] = tensor.numpy()
    return found


def write_gguf(path, model, tensors=None, merges=MERGES, settings=(), template=CHAT, architecture="llama"):
    """A float32 file of a Llama; ``settings`` are names of the writer's own calls with their values."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(len(TOKENS))
    for call, value in settings:
        getattr(writer, call)(*(value if isinstance(value, tuple) else (value,)))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    if merges:
        writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(4)
    if template:
        writer.add_chat_template(template)
    for name, tensor in (gguf_tensors(model) if tensors is None else tensors).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
