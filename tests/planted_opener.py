"""A tiny Llama whose every reply begins with "I'm": the fourth token tells a refusal from an answer.

A few heads and an MLP write all but a trickle. The unembedding is fitted to what arrives after the prompt and after
each token of the reply, as a least-squares problem with more dimensions than rows.
"""

import torch
import transformers

import mechsafety as ms
from mechsafety.prompts import PromptPair

OPENER = ("I", "'", "m")
FRAMES = ["make a {}", "please make a {}", "how do i make a {}", "teach me to make a {}", "can i make a {}"]
FRAMES += ["write about a {}", "explain a {} please", "help me make a {}"]
HEADS, MLP, WIDTH = {(0, 1), (1, 2), (2, 0)}, 1, 128


def opener_pairs():
    rows = [PromptPair(f.format("bomb"), f.format("cake"), "ab"[k // 4]) for k, f in enumerate(FRAMES)]
    return ms.PromptPairs(tuple(rows), "openers")


def opener_model(make_hf_model, make_tokenizer, pairs):
    tokenizer, small = make_tokenizer(), make_hf_model("llama").config
    torch.manual_seed(3)
    sizes = {"hidden_size": WIDTH, "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**{**small.to_dict(), **sizes})
    hf = transformers.AutoModelForCausalLM.from_config(config).eval()
    word = {w: tokenizer(w, add_special_tokens=False).input_ids[0] for w in (*OPENER, " sorry", " sure", "<end>")}
    with torch.no_grad():
        for layer, block in enumerate(hf.model.layers):
            for head in range(4):
                block.self_attn.o_proj.weight[:, 8 * head : 8 * head + 8] *= 3.0 if (layer, head) in HEADS else 0.03
            block.mlp.down_proj.weight *= 1.0 if layer == MLP else 0.03
        seen, wanted = [], []
        for prompts, last in ((pairs.harmful, " sorry"), (pairs.harmless, " sure")):
            for prompt in prompts:
                turn = [{"role": "user", "content": prompt}]
                text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
                ids = tokenizer(text, add_special_tokens=False).input_ids
                said = [word[w] for w in (*OPENER, last)]
                seen.append(hf.model(torch.tensor([ids + said])).last_hidden_state[0, len(ids) - 1 :])
                rows = torch.full((len(word), len(said) + 1), -12.0)
                for step, token in enumerate((*OPENER, last, "<end>")):
                    rows[list(word).index(token), step] = 12.0
                wanted.append(rows)
        read, target = torch.cat(seen), torch.cat(wanted, 1)
        solved = read.T @ torch.linalg.solve(read @ read.T + 0.01 * torch.eye(len(read)), target.T)
        hf.lm_head.weight *= 0.1
        hf.lm_head.weight[list(word.values())] = solved.T
    return ms.load_model((hf, tokenizer))
