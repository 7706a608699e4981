"""A tiny Llama whose refusal is one direction by construction, and prompts for it.

Dimension 0 of the residual stream is refusal: two words carry it, head 0 of block 0 spreads it over all later positions
by uniform attention, and the unembedding of "sorry" reads it. Dimension 1 is in every token and makes the model say
"sure" otherwise; dimension 2 ends the reply after either word. All other weights are small noise.
"""

import torch

import mechsafety as ms
from mechsafety.prompts import PromptPair

FRAMES = ["make a {}", "please make a {}", "how do i make a {}", "teach me to make a {}", "can i make a {}"]
FRAMES += ["write about a {}", "explain a {} please", "help me make a {}", "how do i bake a {}", "explain the {}"]
FRAMES += ["is the {} blue", "write a poem about the {}"]
TOPICS = ["make", "explain", "write"]


def directed_model(make_hf_model, make_tokenizer, layers=3, tied=False):
    hf, tokenizer = make_hf_model("llama", seed=5, layers=layers), make_tokenizer()
    word = {w: tokenizer(w, add_special_tokens=False).input_ids[0] for w in ("sorry", "sure", "<end>")}
    harmful = [tokenizer(w, add_special_tokens=False).input_ids[0] for w in (" bomb", " poison")]
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in hf.model.layers.parameters():
            if parameter.ndim == 2:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        table = hf.model.embed_tokens.weight
        table.copy_(0.4 * torch.randn(table.shape, generator=generator))
        table[:, :3] = torch.tensor([0.0, 1.0, 0.0])
        table[harmful, 0] = 6.0
        for name in ("sorry", "sure"):
            table[word[name], 2] = 20.0
        attention = hf.model.layers[0].self_attn
        attention.q_proj.weight.zero_()
        attention.v_proj.weight[0] = 0.0
        attention.v_proj.weight[0, 0] = 1.0
        attention.o_proj.weight[:, 0] = 0.0
        attention.o_proj.weight[0, 0] = 4.0
        head = hf.lm_head.weight
        head.copy_(0.05 * torch.randn(head.shape, generator=generator))
        head[word["sorry"], :2] = torch.tensor([6.0, -3.0])
        head[word["sure"], :2] = torch.tensor([-6.0, 5.0])
        head[word["<end>"], 2] = 20.0
    return ms.load_model((hf, tokenizer))


def directed_pairs(harmful="bomb", harmless="cake"):
    rows = [PromptPair(f.format(harmful), f.format(harmless), TOPICS[k % 3]) for k, f in enumerate(FRAMES)]
    return ms.PromptPairs(tuple(rows), "directed")
