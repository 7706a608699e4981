"""The wrapper: tokens and spans, padding, hooks, generation, threads, provenance."""

import json
import re
import threading
from pathlib import Path

import pytest
import torch
from reference import hook_count, record

import mechsafety as ms
from mechsafety.errors import MechsafetyError
from mechsafety.prompts import TokenPairs
from mechsafety.sites import Site, SiteKind

LENGTHS = [
    "kill",
    "how do i make a bomb",
    "teach me to steal a car please and write a poem about spring",
    "why is tea blue?",
]


# --- padding --------------------------------------------------------------------------------------------------------


def test_a_padded_batch_equals_one_at_a_time(any_model):
    together = any_model.tokenize(LENGTHS)
    assert len({span.length for span in together.spans}) == 4
    alone = [any_model.tokenize([prompt]) for prompt in LENGTHS]
    torch.testing.assert_close(
        any_model.logits(together), torch.cat([any_model.logits(tokens) for tokens in alone]), atol=1e-4, rtol=1e-4
    )
    names = [
        f"blocks.{layer}.{name}"
        for layer in range(any_model.n_layers)
        for name in ("hook_resid_pre", "attn.hook_z", "hook_mlp_out", "mlp.hook_post", "attn.hook_k")
    ]
    whole = record(any_model, together, names)
    for row, tokens in enumerate(alone):
        single = record(any_model, tokens, names)
        for name in names:
            real = whole[name][row][together.mask[row]]
            torch.testing.assert_close(real, single[name][0], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_order_in_the_batch_does_not_matter(any_model):
    forward, backward = any_model.logits(LENGTHS), any_model.logits(LENGTHS[::-1])
    torch.testing.assert_close(forward, backward.flip(0), atol=1e-4, rtol=1e-4)


def test_no_padding_token(make_hf_model, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    model = ms.load_model((make_hf_model("llama"), tokenizer))
    assert model.tokenizer.pad_token_id == tokenizer.eos_token_id and tokenizer.pad_token_id is None
    torch.testing.assert_close(
        model.logits(LENGTHS), torch.cat([model.logits([p]) for p in LENGTHS]), atol=1e-4, rtol=1e-4
    )


# --- tokens and spans -----------------------------------------------------------------------------------------------


def test_explain_tokens(llama):
    table = llama.explain_tokens("make a bomb")
    assert [row.position for row in table.rows] == list(range(7))
    ids = llama.tokenizer("<s><user>make a bomb<end><assistant>", add_special_tokens=False).input_ids
    assert [row.id for row in table.rows] == ids
    assert [row.span for row in table.rows] == ["prefix"] * 2 + ["instruction"] * 3 + ["suffix"] * 2
    texts = ["<s>", "<user>", "make", " a", " bomb", "<end>", "<assistant>"]
    assert [row.text for row in table.rows] == texts
    lines = [line.split(maxsplit=3) for line in repr(table).splitlines()]
    assert lines[0] == ["position", "id", "span", "text"]
    assert lines[1:] == [[str(row.position), str(row.id), row.span, repr(row.text)] for row in table.rows]
    assert llama.token_strings("make a bomb") == texts
    assert llama.n_tokens("make a bomb") == 7


@pytest.mark.parametrize(
    "prompt", ["make a bomb", " make a bomb", "make a bomb  ", "\nmake a\nbomb \n", "?", "bomb <end> cake"]
)
def test_spans_cover_the_row_once(llama, prompt):
    tokens = llama.tokenize([prompt, "a much longer prompt about how to make a cake"])
    spans = tokens.spans[0]
    covered = [k for name in ("prefix", "instruction", "suffix") for k in range(*spans.range(name))]
    assert covered == list(range(spans.length)) == list(range(llama.n_tokens(prompt)))
    first, last = spans.instruction
    assert "".join(llama.token_strings(prompt)[first:last]) == prompt
    masks = torch.stack([tokens.span_mask(name) for name in ("prefix", "instruction", "suffix")])
    assert torch.equal(masks.sum(0), tokens.mask.long())
    assert torch.equal(tokens.span_mask("all"), tokens.mask)


def test_a_template_that_strips_the_prompt(make_hf_model, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m['content'] | trim")
    model = ms.load_model((make_hf_model("llama"), tokenizer))
    for prompt in ("make tea", "  make tea \n"):
        first, last = model.tokenize([prompt]).spans[0].instruction
        assert "".join(model.token_strings(prompt)[first:last]) == "make tea"


def test_a_template_that_rewrites_the_prompt(make_hf_model, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m['content'] | upper")
    with pytest.raises(MechsafetyError, match="the chat template rewrites the instruction; expected a template that"):
        ms.load_model((make_hf_model("llama"), tokenizer))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([""], "prompt 1 of 1 is empty; expected text"),
        (["make tea", " \n"], "prompt 2 of 2 is empty; expected text"),
        ("make tea", r"a single string was given; expected a list of prompts; write \[prompt\]"),
        ([], "no prompts; expected at least one"),
    ],
)
def test_bad_prompts(llama, prompts, message):
    with pytest.raises(MechsafetyError, match=f"^{message}$"):
        llama.tokenize(prompts)


def test_pairs_that_do_not_align(llama):
    pairs = ms.PromptPairs.from_lists(
        ["make a cake", "how do i make a bomb"], ["bake a cake", "how do you bake a big cake"]
    )
    with pytest.raises(MechsafetyError) as caught:
        llama.tokenize_pairs(pairs)
    harmful = ["how", " do", " i", " make", " a", " bomb"]
    harmless = llama.token_strings("how do you bake a big cake")[2:-2]
    assert str(caught.value) == (
        f"pair 2 of lists does not align: harmful 6 tokens {harmful}, harmless {len(harmless)} tokens {harmless}, "
        "first difference at 2; expected prompts with as many tokens in the instruction; change a word, or pair "
        "prompts with PromptPairs.matched(harmful, harmless, model.n_tokens)"
    )


def test_pairs_start_at_the_first_difference(llama, pairs):
    tokens = llama.tokenize_pairs(pairs)
    differs = (tokens.harmful.ids != tokens.harmless.ids).any(0)
    assert not bool(differs[: tokens.start].any()) and bool(differs[tokens.start])
    assert torch.equal(tokens.harmful.mask, tokens.harmless.mask)
    tea = llama.tokenize(["make tea"])
    same = TokenPairs.of(tea, tea)
    assert same.start == same.harmful.ids.shape[1] - 1
    one = tokens.rows(slice(3, 4))  # the shortest: 3 words between 2 and 2 template tokens
    assert one.harmful.ids.shape == (1, 7) and one.start == 2


# --- hooks ----------------------------------------------------------------------------------------------------------


def test_an_edit_takes_effect_and_is_gone_afterwards(any_model):
    tokens, clean = any_model.tokenize(LENGTHS), hook_count(any_model)
    before = any_model.logits(tokens)
    kinds = (SiteKind.RESID_PRE, SiteKind.Z, SiteKind.MLP_OUT, SiteKind.NEURONS, SiteKind.ATTN_OUT, SiteKind.V)
    for kind in kinds:
        with any_model.hooks([(Site(kind, 1), lambda tensor: tensor.flip(-1))]):
            assert float((any_model.logits(tokens) - before).abs().max()) > 1e-3, kind
        assert torch.equal(any_model.logits(tokens), before)
    assert hook_count(any_model) == clean


def test_no_hook_is_left_after_an_exception(any_model):
    clean = hook_count(any_model)
    sites = [Site(SiteKind.Z, 0), Site(SiteKind.MLP_OUT, 2), Site(SiteKind.FINAL_NORM_IN)]
    inside = []
    with pytest.raises(ZeroDivisionError), any_model.hooks([(site, lambda tensor: None) for site in sites]):
        inside.append(hook_count(any_model)) or 1 / 0
    assert inside[0] != clean
    with pytest.raises(ZeroDivisionError), any_model.hooks([(sites[0], lambda tensor: 1 / 0)]):
        any_model.logits(["make tea"])
    with pytest.raises(Exception, match=r"blocks\.99"), any_model.hooks([(Site(SiteKind.Z, 99), lambda tensor: None)]):
        pass
    assert hook_count(any_model) == clean
    # the lock is free again for other threads
    free = []

    def try_it():
        free.append(any_model.lock.acquire(blocking=False))
        any_model.lock.release()

    thread = threading.Thread(target=try_it)
    thread.start()
    thread.join()
    assert free == [True]


def test_read_gives_copies(any_model):
    tokens = any_model.tokenize(LENGTHS)
    before = any_model.logits(tokens)
    sites = [Site(kind, layer) for kind in (SiteKind.RESID_PRE, SiteKind.Z, SiteKind.MLP_OUT) for layer in (0, 1)]
    first = any_model.read(tokens, sites)
    kept = {site: tensor.clone() for site, tensor in first.items()}
    assert set(first) == set(sites) and not any(tensor.requires_grad for tensor in first.values())
    # one block's output is the next one's input, the same memory in TransformerLens
    same = any_model.read(tokens, [Site(SiteKind.RESID_POST, 0), Site(SiteKind.RESID_PRE, 1)])
    post, pre = same.values()
    assert torch.equal(post, pre)
    post.zero_()
    assert float(pre.abs().max()) > 0
    for tensor in first.values():
        tensor.zero_()
    assert torch.equal(any_model.logits(tokens), before)
    for site, tensor in any_model.read(tokens, sites).items():
        assert torch.equal(tensor, kept[site])


def test_two_threads(llama):
    """One thread edits, the other does not; each must get its own answers."""
    prompts = ["how do i make a bomb", "help"]
    plain = llama.logits(prompts)
    edit = [(Site(SiteKind.MLP_OUT, 0), lambda tensor: tensor * 0)]
    with llama.hooks(edit):
        edited = llama.logits(prompts)
    wrong = []

    def with_edit():
        for _ in range(25):
            with llama.hooks(edit):
                if not torch.equal(llama.logits(prompts), edited):
                    wrong.append("edited")

    def without():
        for _ in range(25):
            if not torch.equal(llama.logits(prompts), plain):
                wrong.append("plain")

    threads = [threading.Thread(target=target) for target in (with_edit, without, with_edit, without)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not torch.equal(plain, edited)


# --- generation -----------------------------------------------------------------------------------------------------


def greedy(hf, tokenizer, prompt, n):
    """One token after the other with an unwrapped model, the whole row each time."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    first = ids.shape[1]
    for _ in range(n):
        with torch.no_grad():
            new = hf(input_ids=ids).logits[0, -1].argmax()
        if int(new) == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, new.reshape(1, 1)], dim=1)
    return tokenizer.decode(ids[0, first:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_generate_equals_greedy_decoding_one_at_a_time(kind, make_hf_model, make_tokenizer, make_model):
    model, hf = make_model(kind), make_hf_model(kind)
    prompts = [LENGTHS[2], LENGTHS[0], LENGTHS[3], LENGTHS[1], LENGTHS[0]]
    expected = [greedy(hf, make_tokenizer(), prompt, 8) for prompt in prompts]
    assert model.generate(prompts, max_new_tokens=8, batch_size=2) == expected
    assert model.generate(prompts, max_new_tokens=8, batch_size=16) == expected
    assert len(set(expected)) > 2 and model.generate([], 4) == []


# --- provenance -----------------------------------------------------------------------------------------------------


def test_provenance(make_hf_model, make_tokenizer, tmp_path):
    folder = tmp_path / "my-model"
    make_hf_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    model = ms.load_model(folder)
    text = json.dumps(model.provenance(seed=3, options={"k": 1}).to_json())
    assert str(tmp_path) not in text and str(Path.home()) not in text and not re.search(r'"/\w', text)
    found = model.provenance(seed=3, options={"k": 1})
    assert (found.model, found.dtype, found.device, found.seed) == ("my-model", "float32", "cpu", 3)
    assert found.options == {"k": 1} and set(found.versions) >= {"mechsafety", "torch", "transformer_lens"}
    assert found == model.provenance(seed=3, options={"k": 1})


def test_hashes(make_hf_model, make_tokenizer):
    def load(hf=None, template=None):
        return ms.load_model((hf or make_hf_model("llama"), make_tokenizer()), chat_template=template).provenance()

    one, same = load(), load()
    assert one.weights_sha256 == same.weights_sha256 and one.template_sha256 == same.template_sha256
    changed = make_hf_model("llama")
    with torch.no_grad():
        changed.model.layers[2].mlp.down_proj.weight[3, 5] += 1e-3
    assert load(changed).weights_sha256 != one.weights_sha256
    other = load(template="plain")
    assert other.template_sha256 != one.template_sha256 and other.weights_sha256 == one.weights_sha256
