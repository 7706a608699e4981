"""Tiny random models of about sixty architectures, of transformers' own configuration classes, and their tokenizer."""

from collections.abc import Callable

import torch
import transformers as t
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
ENDS = {"bos_token_id": 2, "eos_token_id": 6, "pad_token_id": 0}
COMMON = {**SIZES, **ENDS, "initializer_range": 0.2}
GROUPED = {**COMMON, "num_key_value_heads": 2}
WIDE = {**GROUPED, "head_dim": 16}
WINDOW = {"sliding_window": 6}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}
GPT |= {"bos_token_id": 2, "eos_token_id": 6}
FALCON = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16}
ROUTED |= {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}


def rope(kind: str, **options: object) -> dict[str, object]:
    """A rotary embedding that is scaled, with 64 positions before the scaling."""
    scaled = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 64, **options}
    return {"max_position_embeddings": 256, "rope_parameters": scaled}


# one entry a row of docs/models.md; the vocabulary's size is added when a model is made
CONFIGS: dict[str, Callable[..., t.PreTrainedConfig]] = {
    "Llama": lambda **v: t.LlamaConfig(**GROUPED, **v),
    "Llama, rotary scaling of Llama 3": lambda **v: t.LlamaConfig(
        **GROUPED, **rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0), **v
    ),
    "Llama, YaRN": lambda **v: t.LlamaConfig(**GROUPED, **rope("yarn", factor=4.0), **v),
    "Llama, linear rotary scaling": lambda **v: t.LlamaConfig(**GROUPED, **rope("linear", factor=4.0), **v),
    "Llama, dynamic rotary scaling": lambda **v: t.LlamaConfig(**GROUPED, **rope("dynamic", factor=4.0), **v),
    "Llama, biases": lambda **v: t.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True, **v),
    "Llama, wide heads": lambda **v: t.LlamaConfig(**GROUPED, head_dim=20, **v),
    "Llama, one key-value head": lambda **v: t.LlamaConfig(**COMMON, num_key_value_heads=1, **v),
    "Llama, tied embeddings": lambda **v: t.LlamaConfig(**GROUPED, tie_word_embeddings=True, **v),
    "Llama 4 (text)": lambda **v: t.Llama4TextConfig(
        **GROUPED, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, num_experts_per_tok=1, **v
    ),
    "Qwen2": lambda **v: t.Qwen2Config(**GROUPED, **v),
    "Qwen2, sliding window": lambda **v: t.Qwen2Config(
        **GROUPED, **WINDOW, use_sliding_window=True, max_window_layers=1, **v
    ),
    "Qwen2-MoE": lambda **v: t.Qwen2MoeConfig(**GROUPED, **EXPERTS, shared_expert_intermediate_size=24, **v),
    "Qwen3": lambda **v: t.Qwen3Config(**WIDE, **v),
    "Qwen3-MoE": lambda **v: t.Qwen3MoeConfig(**WIDE, **EXPERTS, **v),
    "Qwen3-Next": lambda **v: t.Qwen3NextConfig(**WIDE, **EXPERTS, **LINEAR, shared_expert_intermediate_size=16, **v),
    "Mistral, sliding window": lambda **v: t.MistralConfig(**GROUPED, **WINDOW, **v),
    "Ministral": lambda **v: t.MinistralConfig(
        **GROUPED, **WINDOW, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, **v
    ),
    "Mixtral": lambda **v: t.MixtralConfig(**GROUPED, **LOCAL, **v),
    "Phi": lambda **v: t.PhiConfig(**GROUPED, **v),
    "Phi-3": lambda **v: t.Phi3Config(**GROUPED, **v),
    "Phi-3, LongRoPE": lambda **v: t.Phi3Config(
        **GROUPED,
        **rope("longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4),
        original_max_position_embeddings=64,
        **v,
    ),
    "Gemma": lambda **v: t.GemmaConfig(**WIDE, **v),
    "Gemma-2": lambda **v: t.Gemma2Config(**WIDE, **WINDOW, query_pre_attn_scalar=16, **v),
    "Gemma-3 (text)": lambda **v: t.Gemma3TextConfig(
        **WIDE,
        **WINDOW,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        **v,
    ),
    "OLMo": lambda **v: t.OlmoConfig(**GROUPED, **v),
    "OLMo, clipped": lambda **v: t.OlmoConfig(**GROUPED, clip_qkv=0.5, **v),
    "OLMo-2": lambda **v: t.Olmo2Config(**GROUPED, **v),
    "OLMo-3": lambda **v: t.Olmo3Config(**GROUPED, **WINDOW, **v),
    "GPT-2": lambda **v: t.GPT2Config(**GPT, **v),
    "GPT-2, scaled by layer": lambda **v: t.GPT2Config(**GPT, scale_attn_by_inverse_layer_idx=True, **v),
    "GPT-BigCode": lambda **v: t.GPTBigCodeConfig(**GPT, **v),
    "GPT-J": lambda **v: t.GPTJConfig(**GPT, rotary_dim=4, **v),
    "CodeGen": lambda **v: t.CodeGenConfig(**GPT, rotary_dim=4, **v),
    "GPT-Neo": lambda **v: t.GPTNeoConfig(
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=6,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=2,
        eos_token_id=6,
        **v,
    ),
    "GPT-NeoX": lambda **v: t.GPTNeoXConfig(**COMMON, **v),
    "GPT-NeoX, sequential": lambda **v: t.GPTNeoXConfig(**COMMON, use_parallel_residual=False, **v),
    "GPT-OSS": lambda **v: t.GptOssConfig(**WIDE, **LOCAL, **WINDOW, **v),
    "OPT": lambda **v: t.OPTConfig(
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        init_std=0.2,
        **ENDS,
        **v,
    ),
    "BLOOM": lambda **v: t.BloomConfig(hidden_size=32, n_layer=3, n_head=4, initializer_range=0.2, **ENDS, **v),
    "MPT": lambda **v: t.MptConfig(d_model=32, n_layers=3, n_heads=4, max_seq_len=128, **v),
    "Falcon, one key-value head": lambda **v: t.FalconConfig(
        **FALCON, **ENDS, multi_query=True, parallel_attn=True, **v
    ),
    "Falcon, new": lambda **v: t.FalconConfig(**FALCON, **ENDS, new_decoder_architecture=True, num_kv_heads=2, **v),
    "StableLM": lambda **v: t.StableLmConfig(**GROUPED, **v),
    "StableLM, parallel": lambda **v: t.StableLmConfig(**GROUPED, use_parallel_residual=True, **v),
    "Cohere": lambda **v: t.CohereConfig(**GROUPED, **v),
    "Cohere 2": lambda **v: t.Cohere2Config(**GROUPED, **WINDOW, **v),
    "Granite": lambda **v: t.GraniteConfig(
        **GROUPED,
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.05,
        logits_scaling=8.0,
        **v,
    ),
    "Granite-MoE": lambda **v: t.GraniteMoeConfig(**GROUPED, **LOCAL, **v),
    "SmolLM3": lambda **v: t.SmolLM3Config(**GROUPED, no_rope_layers=[1, 0, 1], **v),
    "DeepSeek-V2": lambda **v: t.DeepseekV2Config(**COMMON, **ROUTED, **LATENT, **v),
    "DeepSeek-V3": lambda **v: t.DeepseekV3Config(**COMMON, **ROUTED, **LATENT, **v),
    "GLM": lambda **v: t.GlmConfig(**WIDE, **v),
    "GLM-4": lambda **v: t.Glm4Config(**WIDE, **v),
    "Nemotron": lambda **v: t.NemotronConfig(**GROUPED, **v),
    "StarCoder2": lambda **v: t.Starcoder2Config(**GROUPED, **v),
    "EXAONE 4": lambda **v: t.Exaone4Config(**GROUPED, **WINDOW, sliding_window_pattern=2, **v),
    "Apertus": lambda **v: t.ApertusConfig(**GROUPED, **v),
    "Helium": lambda **v: t.HeliumConfig(**GROUPED, head_dim=8, **v),
    "Persimmon": lambda **v: t.PersimmonConfig(**COMMON, **v),
    "Mamba": lambda **v: t.MambaConfig(hidden_size=32, num_hidden_layers=3, state_size=8, **v),
}


def random_model(name: str, vocabulary: int, seed: int = 0) -> t.PreTrainedModel:
    """A random model; norms and biases are moved away from 1 and 0, which would hide that they are left out."""
    torch.manual_seed(seed)
    model = t.AutoModelForCausalLM.from_config(CONFIGS[name](vocab_size=vocabulary)).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


# --- the tokenizer ----------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
WORDS = [
    "how",
    "do",
    "i",
    "make",
    "a",
    "an",
    "the",
    "bomb",
    "cake",
    "kill",
    "python",
    "process",
    "write",
    "poem",
    "about",
    "spring",
    "teach",
    "me",
    "to",
    "steal",
    "bake",
    "bread",
    "car",
    "hurt",
    "people",
    "help",
    "please",
    "explain",
    "why",
    "sky",
    "is",
    "blue",
    "poison",
    "tea",
    "sorry",
    "sure",
    "here",
    "no",
    "yes",
    "can",
    "what",
    "of",
    "and",
    "with",
    "my",
    "house",
]


def tiny_tokenizer() -> t.PreTrainedTokenizerFast:
    """One token a word (unknown words fall apart into characters), with a chat template."""
    special = ["<pad>", "<unk>", "<s>", "<user>", "<assistant>", "<system>", "<end>"]
    letters = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789?.,!'\" \n-")
    vocab = {token: k for k, token in enumerate(dict.fromkeys([*special, *letters, *WORDS, *(f" {w}" for w in WORDS)]))}
    core = Tokenizer(
        models.WordPiece(vocab, unk_token="<unk>", continuing_subword_prefix="", max_input_chars_per_word=99)
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|[^\w ]| "), "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<end>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", "<system>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
