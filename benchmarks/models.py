"""Models and prompts that the cases run on."""

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import mechsafety as ms
from mechsafety.models import LensModel
from mechsafety.models.demo import base_folder
from mechsafety.prompts import PromptPair, PromptPairs, builtin_prompts

# layers, d_model, heads, key-value heads, d_head, d_mlp, vocabulary: SmolLM2-135M, Llama-3.2-1B and -3B, Llama-3.1-8B
SHAPES = {
    "tiny": (2, 64, 4, 2, 16, 96, 49152),
    "135M": (30, 576, 9, 3, 64, 1536, 49152),
    "1B": (16, 2048, 32, 8, 64, 8192, 128256),
    "3B": (28, 3072, 24, 8, 128, 8192, 128256),
    "8B": (32, 4096, 32, 8, 128, 14336, 128256),
}


def random_llama(shape: str, dtype: str = "float32", device: str = "cpu") -> LensModel:
    """A Llama of a known shape with random weights, made on the device; the demo's tokenizer, nothing downloaded."""
    layers, d_model, heads, kv_heads, d_head, d_mlp, vocabulary = SHAPES[shape]
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=d_model,
        intermediate_size=d_mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=d_head,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    with torch.device(device):
        hf = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    return ms.load_model((hf.eval(), AutoTokenizer.from_pretrained(base_folder())))


def load(tiny: bool) -> LensModel:
    """The demo model, or a random one of two layers to try the code on."""
    return random_llama("tiny") if tiny else ms.load_model("demo")


def metric_of(model: LensModel) -> ms.RefusalLogOdds:
    return ms.RefusalLogOdds.of(model, ["Sorry"])


def difference_of(model: LensModel) -> ms.RefusalLogOdds:
    """A metric that reads two logits alone."""
    return ms.RefusalLogOdds.of(model, ["Sorry"], ["Sure"])


def mixed_prompts(n: int) -> tuple[list[str], list[str]]:
    """Harmful and plain prompts of mixed lengths, so many of each, in no order."""
    harmful = PromptPairs.builtin("train").sample(n, seed=1).harmful
    return list(harmful), [prompt.text for prompt in builtin_prompts("plain", "train")][:n]


def equal_length_pairs(model: LensModel, n: int) -> PromptPairs:
    """Built-in pairs of one token length (TransformerLens' functions take no mask), the commonest.

    Raises:
        ValueError: There are fewer.
    """
    by_length: dict[int, list[PromptPair]] = {}
    for pair in PromptPairs.builtin(edition=1):
        by_length.setdefault(model.n_tokens(pair.harmful), []).append(pair)
    longest = max(by_length.values(), key=len)
    if len(longest) < n:
        raise ValueError(f"{len(longest)} pairs of one length instead of {n}")
    return PromptPairs(tuple(longest[:n]), "builtin")


def pairs_of_width(model: LensModel, n: int, columns: int) -> PromptPairs:
    """Pairs of one length with so many columns from their first difference on: built-in ones with words added."""

    def run_columns(pairs: PromptPairs) -> int:
        tokens = model.tokenize_pairs(pairs)
        return tokens.harmful.ids.shape[1] - tokens.start

    short = equal_length_pairs(model, n)
    filler = " please" * (columns - run_columns(short))
    long = PromptPairs(tuple(PromptPair(p.harmful + filler, p.harmless + filler) for p in short), "long")
    if run_columns(long) != columns:
        raise ValueError(f"{run_columns(long)} columns instead of {columns}: a word of filler is not one token")
    return long
