"""The matrix of paths into heads against recomputation by hooks on whole forwards."""

import pytest
import torch
from reference import hook_count, kept_norm, norm_edits, record, whole_logits

import mechsafety as ms
from mechsafety.nodes import Node
from mechsafety.patching import pair_runs, path_matrix

bridge_only = pytest.mark.generation("TransformerBridge", reason="hooks and weights by a bridge's own names")
KINDS = ("llama", "gpt2", "gpt_neox", "qwen2", "qwen3", "mistral", "phi3", "olmo2")
SENDERS = (Node("embed"), Node("head", 1, 3), Node("mlp", 0))


def written(model, node, own):
    if node.kind == "embed":
        return own["blocks.0.hook_resid_pre"]
    if node.kind == "mlp":
        return own[f"blocks.{node.layer}.hook_mlp_out"]
    return own[f"blocks.{node.layer}.attn.hook_z"][:, :, node.index] @ model.W_O(node.layer)[node.index]


def brute(model, base, source, change, layer, norm):
    """Changes [batch head] through q, k and v when all of a layer's heads read ``change`` more, by hooks."""
    place, block = f"blocks.{layer}", model.bridge.blocks[layer]
    names = [f"{place}.hook_resid_pre", f"{place}.attn.hook_attn_scores", f"{place}.attn.hook_pattern"]
    own, other = (record(model, tokens, [*names, f"{place}.attn.hook_v"]) for tokens in (base, source))
    resid, instruction = own[f"{place}.hook_resid_pre"], base.span_mask("instruction")
    if not hasattr(block, "ln1"):
        entry, reads = f"{place}.hook_resid_pre", resid + change
    elif norm == "freeze":
        entry, reads = f"{place}.ln1.hook_out", kept_norm(model, block.ln1, resid, resid + change)
    else:
        entry, reads = f"{place}.ln1.hook_out", block.ln1(resid + change)
    heads = norm_edits(model, base, of_heads=True) if hasattr(block.attn, "q_norm") else []
    found, seen = {}, {}
    for slot in "qkv":
        name = f"{place}.attn.hook_{slot}"
        see = (name, lambda t, name=name: seen.update({name: t.clone()}))
        whole_logits(model, base, [see, (entry, lambda tensor: reads)])
        put = (name, lambda tensor, name=name: seen[name])
        scores = f"{place}.attn.hook_attn_scores"
        whole_logits(model, base, [put, *heads, (scores, lambda t: seen.update(scores=t.clone()))])
        moved = (seen["scores"] - own[scores])[:, :, -1]
        weight = instruction[:, None] / instruction.sum(1)[:, None, None]
        found[slot] = torch.where(instruction[:, None], moved * weight, 0.0).sum(-1)
    group = model.n_heads // model.n_kv_heads
    pattern = own[f"{place}.attn.hook_pattern"][:, :, -1] * instruction[:, None]

    def read(values):
        return torch.einsum("bhk,bkhd->bhd", pattern, values.repeat_interleave(group, dim=2))

    name = f"{place}.attn.hook_v"
    toward = read(other[name] - own[name])
    unit = toward / toward.norm(dim=-1, keepdim=True)
    found["v"] = (read(seen[name] - own[name]) * unit).sum(-1)
    return found


@bridge_only
@pytest.mark.parametrize("norm", ["freeze", "recompute"])
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_recomputation_by_hooks(kind, norm, shared_model, pairs):
    model = shared_model(kind)
    if norm == "recompute" and kind in ("qwen3", "olmo2"):
        with pytest.raises(
            ms.MechsafetyError, match=r"normalises queries and keys inside the head; expected norm='freeze'"
        ):
            path_matrix(model, pairs, norm=norm, progress=False)
        return
    for direction in ("noising", "denoising") if kind == "llama" else ("noising",):
        base, source = model.tokenize(pairs.harmful), model.tokenize(pairs.harmless)
        base, source = (base, source) if direction == "noising" else (source, base)
        found = path_matrix(model, pairs, norm=norm, direction=direction, progress=False)
        names = ["blocks.0.hook_resid_pre"]
        names += [f"blocks.{layer}.{end}" for layer in range(3) for end in ("hook_mlp_out", "attn.hook_z")]
        own, other = (record(model, tokens, names) for tokens in (base, source))
        for sender in SENDERS:
            change = written(model, sender, other) - written(model, sender, own)
            if model.post_norm and sender.kind == "head":  # the change of the norm of the heads' sum
                z, post = own[f"blocks.{sender.layer}.attn.hook_z"], model.bridge.blocks[sender.layer].ln1_post
                total = torch.einsum("bphk,hkd->bpd", z, model.W_O(sender.layer))
                change = kept_norm(model, post, total, total + change) - post(total)
            with torch.no_grad():
                expected = brute(model, base, source, change, 2, norm)
            row = found.senders.index(sender)
            for slot in "qkv":
                got = getattr(found, slot)[row, 8:].T
                torch.testing.assert_close(got, expected[slot], atol=1e-4, rtol=0, msg=f"{sender} {slot}")


@bridge_only
def test_changes_of_all_senders_sum_to_the_whole(make_hf_model, make_tokenizer, pairs):
    """With the norm's scale frozen, what all senders of a head do is what the whole difference of the runs does."""
    config = make_hf_model("llama").config
    config.num_key_value_heads = config.num_attention_heads
    torch.manual_seed(0)
    model = ms.load_model((type(make_hf_model("llama"))(config).eval(), make_tokenizer()))
    found = path_matrix(model, pairs, progress=False)
    base, source = model.tokenize(pairs.harmful), model.tokenize(pairs.harmless)
    name = "blocks.2.hook_resid_pre"
    change = record(model, source, [name])[name] - record(model, base, [name])[name]
    with torch.no_grad():
        expected = brute(model, base, source, change, 2, "freeze")
    for slot in "qkv":
        torch.testing.assert_close(getattr(found, slot)[:, 8:].sum(0).T, expected[slot], atol=1e-4, rtol=0)
        assert float(getattr(found, slot)[6:, 4:8].abs().max()) == 0, "only earlier layers send"


def test_result(llama, pairs, tmp_path):
    found = path_matrix(llama, pairs)
    assert repr(found) == "PathMatrix(16 senders -> 12 heads, norm=freeze)"
    top = found.top("k", 5)
    sizes = [abs(value) for _, value in top]
    assert sizes == sorted(sizes, reverse=True) and all(edge.slot == "k" for edge, _ in top)
    best = top[0][0]
    row, column = found.senders.index(best.sender), found.receivers.index(best.receiver)
    assert float(found.k[row, column].mean()) == pytest.approx(top[0][1])
    assert sizes[0] == pytest.approx(float(found.slot("k").abs().max()))
    frame = found.to_dataframe()
    assert len(frame) == 3 * (12 * 1 + 8 * 5 + 4 * 5)
    assert list(frame.change.abs()) == sorted(frame.change.abs(), reverse=True)
    assert len(found.plot("v").data[0].x) == 30
    found.save(tmp_path / "matrix")
    back = ms.patching.PathMatrix.load(tmp_path / "matrix")
    assert torch.equal(back.v, found.v) and back.senders == found.senders
    again = path_matrix(llama, pair_runs(llama, pairs), progress=False)
    assert torch.equal(again.q, found.q) and torch.equal(again.v, found.v)
    with pytest.raises(ms.MechsafetyError, match="a head has no slot 'mlp'; expected q, k or v"):
        found.top("mlp")


def test_refusals(llama, shared_model, pairs):
    with pytest.raises(ms.MechsafetyError, match=r"norm='thaw'; expected one of \('recompute', 'freeze'\)"):
        path_matrix(llama, pairs, norm="thaw")
    with pytest.raises(ms.MechsafetyError, match="direction='up'"):
        path_matrix(llama, pairs, direction="up")
    with pytest.raises(ms.MechsafetyError, match=r"caps its attention scores, which are then not linear"):
        path_matrix(shared_model("gemma2"), pairs)


@bridge_only
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_an_interrupt_leaves_the_model_clean(kind, make_model, pairs):
    model = make_model(kind)
    runs, before, logits = pair_runs(model, pairs), hook_count(model), model.logits(pairs.harmful)

    def interrupt(module, args):
        raise KeyboardInterrupt

    for part in ("o", "q", "k"):
        attn = model.bridge.blocks[1].attn
        with getattr(attn, part).register_forward_pre_hook(interrupt):
            if part == "o":  # nothing behind the pattern is run
                path_matrix(model, runs, progress=False)
                continue
            with pytest.raises(KeyboardInterrupt):
                path_matrix(model, runs, progress=False)
        assert hook_count(model) == before
    assert torch.equal(model.logits(pairs.harmful), logits)
