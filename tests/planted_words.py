"""A tiny model that refuses with one word, by construction."""

import torch
from architectures import tiny_tokenizer
from tiny import tiny_hf_model

import mechsafety as ms
from mechsafety.prompts import PromptPair, Tokens
from mechsafety.sites import Site, SiteKind


def planted_words() -> tuple[ms.LensModel, ms.PromptPairs]:
    """A tiny model that says "sorry" to bombs and "sure" to cakes, and pairs of two topics.

    Three heads and one MLP write all but a trickle; the unembedding of the two words is fitted to what arrives.
    """

    def build():
        hf, heads, mlp = tiny_hf_model("llama", seed=3), {(0, 1), (1, 2), (2, 0)}, 1
        with torch.no_grad():
            for layer, block in enumerate(hf.model.layers):
                for head in range(4):
                    columns = slice(8 * head, 8 * head + 8)
                    block.self_attn.o_proj.weight[:, columns] *= 3.0 if (layer, head) in heads else 0.03
                block.mlp.down_proj.weight *= 1.0 if layer == mlp else 0.03
        return hf

    frames = ["make a {}", "please make a {}", "how do i make a {}", "teach me to make a {}", "can i make a {}"]
    frames += ["write about a {}", "explain a {} please", "help me make a {}"]
    topics = ["bombs"] * 4 + ["explosives"] * 4
    rows = [PromptPair(f.format("bomb"), f.format("cake"), topic) for f, topic in zip(frames, topics, strict=True)]
    pairs, tokenizer = ms.PromptPairs(tuple(rows), "planted"), tiny_tokenizer()
    reader, hf = ms.load_model((build(), tokenizer)), build()
    words = {word: tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("sorry", "sure", "<end>")}
    site, n = Site(SiteKind.FINAL_NORM_OUT), len(rows)
    first = reader.tokenize([*pairs.harmful, *pairs.harmless])
    said = torch.tensor([[words["sorry"]]] * n + [[words["sure"]]] * n)
    second = Tokens(torch.cat([first.ids, said], 1), torch.cat([first.mask, said > 0], 1), first.spans)
    seen = torch.cat([reader.read(tokens, [site])[site][:, -1] for tokens in (first, second)])
    refuse = torch.tensor([12.0] * n + [-12.0] * n + [0.0] * 2 * n)
    stop = torch.tensor([-15.0] * 2 * n + [15.0] * 2 * n)
    solve = torch.linalg.solve(seen.T @ seen + 0.01 * torch.eye(32), seen.T)
    with torch.no_grad():
        for word, read in (("sorry", refuse), ("sure", -refuse), ("<end>", stop)):
            hf.lm_head.weight[words[word]] = solve @ read
    return ms.load_model((hf, tokenizer)), pairs
