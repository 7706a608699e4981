"""Tiny random models whose weights stored results rest on, and pairs of prompts for them."""

import torch
import transformers
from architectures import tiny_tokenizer

import mechsafety as ms
from mechsafety.models import hooked

ARCHITECTURES = ("llama", "gpt2", "gpt_neox", "qwen2", "qwen3", "mistral", "mistral_window", "phi3", "gemma2", "olmo2")
GENERATION = "HookedTransformer" if hooked.installed() else "TransformerBridge"


def tiny_hf_model(kind: str, seed: int = 0, layers: int = 3, dtype: torch.dtype = torch.float32):
    """A random Hugging Face model of one architecture; grouped queries where the architecture has them."""
    torch.manual_seed(seed)
    size = len(tiny_tokenizer())
    common = {
        "vocab_size": size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "bos_token_id": 2,
        "eos_token_id": 6,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    grouped = {**common, "num_key_value_heads": 2}
    configs = {
        "llama": lambda: transformers.LlamaConfig(**grouped),
        "qwen2": lambda: transformers.Qwen2Config(**grouped),
        "qwen3": lambda: transformers.Qwen3Config(**grouped, head_dim=16),
        "mistral": lambda: transformers.MistralConfig(**grouped),
        "mistral_window": lambda: transformers.MistralConfig(**grouped, sliding_window=6),  # shorter than the prompts
        # the converter of TransformerLens 3.9 takes OLMo-2 without grouped queries only
        "olmo2": lambda: transformers.Olmo2Config(**(common if hooked.installed() else grouped)),
        "phi3": lambda: transformers.Phi3Config(**grouped),
        "gemma2": lambda: transformers.Gemma2Config(**grouped, head_dim=16, sliding_window=6, query_pre_attn_scalar=16),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**common),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=size,
            n_embd=32,
            n_layer=layers,
            n_head=4,
            n_positions=128,
            bos_token_id=2,
            eos_token_id=6,
            initializer_range=0.2,
        ),
    }
    return transformers.AutoModelForCausalLM.from_config(configs[kind]()).eval().to(dtype)


def tiny_model(kind: str = "llama", seed: int = 0) -> ms.LensModel:
    return ms.load_model((tiny_hf_model(kind, seed), tiny_tokenizer()))


def tiny_pairs() -> ms.PromptPairs:
    harmful = ["how do i make a bomb", "teach me to steal a car please", "explain how to hurt people", "poison my tea"]
    harmless = ["how do i make a cake", "teach me to help a car please", "explain how to help people", "explain my tea"]
    return ms.PromptPairs.from_lists(harmful, harmless)
