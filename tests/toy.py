"""The toy model of docs/methods/toy-model.md, built from the tables of that page."""

import re
from pathlib import Path

import torch
import transformers

import mechsafety as ms
from mechsafety.testbed.vocabulary import word_tokenizer
from mechsafety.testbed.weights import weights_of

PAGE = Path(__file__).parents[1] / "docs" / "methods" / "toy-model.md"
# the residual stream's coordinates: one that is the same everywhere, where the word is, where the prompt ends, and
# those of the page; the last one ends a reply
COORDINATES = {name: k for k, name in enumerate(("one", "word", "last", "w", "d", "r", "c", "end"))}
# so large that a norm's scale is the same for all positions
ANCHOR, SIZE, SCORE = 1e4, len(COORDINATES), 80.0
WORDS = ("bombs", "rifles", "poisons", "malware"), ("cakes", "flutes", "soups", "poetry")


def cells(line: str) -> list[str]:
    """The cells of a Markdown table's row, without code marks."""
    return [cell.strip().replace("`", "") for cell in line.strip().strip("|").split("|")]


def rows(*head: str) -> list[list[str]]:
    """The rows of the page's table with that head."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith("|") and cells(line) == list(head))
    table = lines[start + 2 :]
    return [cells(line) for line in table[: next(k for k, line in enumerate(table) if not line.startswith("|"))]]


def toy_model(gain: float = 1.0) -> ms.LensModel:
    """The toy model; with a gain its neuron L1.N0 reads so many times what it should."""
    harm = {word: float(w) for word, w in rows("word", "w")} | {"<unk>": 0.5}
    tokenizer = word_tokenizer(["about", *(word for word in harm if word != "<unk>")])
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=SIZE,
        intermediate_size=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        hidden_act="relu",
        max_position_embeddings=128,
        # so slow that the last pair of dimensions is not rotated
        rope_parameters={"rope_type": "default", "rope_theta": 1e30},
        tie_word_embeddings=False,
        bos_token_id=2,
        eos_token_id=5,
        pad_token_id=0,
    )
    config.name_or_path = "toy"
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        weights = weights_of(model)
        for norm in (*(norm for block in weights.layers for norm in block.norms), weights.final_norm):
            norm.weight[:] = ANCHOR / SIZE**0.5
            norm.weight[COORDINATES["one"]] = 1 / SIZE**0.5

        def place(word: str, name: str, value: float = 1.0) -> None:
            weights.embed[tokenizer.convert_tokens_to_ids(word), COORDINATES[name]] = value

        def logit(word: str, name: str, value: float = 1.0) -> None:
            weights.unembed[tokenizer.convert_tokens_to_ids(word), COORDINATES[name]] = value

        weights.embed[:, COORDINATES["one"]] = ANCHOR
        for word, value in harm.items():
            place(word, "word")
            place(word, "w", value)
        place("<assistant>", "last")
        for word, name in (("Sorry", "r"), ("Sure", "c")):
            logit(word, name)
            place(word, "end")
        logit("<end>", "end", 20.0)
        for head, looks_at, reads, factor, writes in rows("head", "looks at", "reads", "factor", "writes"):
            layer, index = map(int, re.findall(r"\d+", head))
            block = weights.layers[layer]
            block.q[index, 1, COORDINATES["one"]] = SCORE
            block.k[index, 1, COORDINATES[looks_at]] = 1.0
            block.v[index, 0, COORDINATES[reads]] = 1.0
            block.o[index, 0, COORDINATES[writes]] = float(factor)
        for neuron, what, factor, writes in rows("neuron", "input", "factor", "writes"):
            layer, index = map(int, re.findall(r"\d+", neuron))
            block = weights.layers[layer]
            for sign, name, number in re.findall(r"(-?)\s*(?:([a-z])|(\d+))", what):
                value = (-1.0 if sign else 1.0) * (float(number) if number else 1.0)
                block.read[index, COORDINATES[name or "one"]] += value
            block.gate[index, COORDINATES["one"]] = 1.0
            block.write[index, COORDINATES[writes]] = float(factor)
        weights.layers[1].read[0] *= gain
    return ms.load_model((model, tokenizer))


def toy_pairs(*places: int) -> ms.PromptPairs:
    """Pairs of the page's words by their places; all four by default."""
    sides = [[f"about {side[k]}" for k in places or range(4)] for side in WORDS]
    return ms.PromptPairs.from_lists(*sides, name="toy")
