"""Greedy decoding against a plain loop of whole forwards: whatever a model's generation configuration asks for."""

import copy
import math
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mechsafety as ms
from mechsafety.errors import MechsafetyError
from mechsafety.models import hooked
from mechsafety.models.decode import Cursor, Sampler, Speech
from mechsafety.neurons import greedy_replies
from mechsafety.sites import Site, SiteKind

PROMPTS = (
    "tea",
    "how do i make a bomb",
    "explain why the sky is blue and teach me to bake bread",
    "i",
    "kill a process",
)
STEPS = 9
# what transformers' own generate would read from a model's configuration, each with a value that changes replies
OPTIONS = {
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(70, 120)),
    "begin_suppress_tokens": list(range(20, 120)),
    "bad_words_ids": [[token] for token in range(60, 110)],
    "sequence_bias": [[[80], 50.0]],
    "forced_bos_token_id": 30,
    "forced_eos_token_id": 31,
    "exponential_decay_length_penalty": (1, 3.0),
    "min_length": 40,
    "min_new_tokens": 8,
    "max_length": 3,
    "max_new_tokens": 2,
    "max_time": 1e-6,
    "stop_strings": ["a"],
    "num_beams": 3,
    "num_return_sequences": 2,
    "length_penalty": 3.0,
    "do_sample": True,
    "temperature": 5.0,
    "top_k": 3,
    "guidance_scale": 3.0,
    "return_dict_in_generate": True,
    "output_scores": True,
    "use_cache": False,
    "cache_implementation": "static",
    "pad_token_id": 40,
}


@pytest.fixture(scope="module")
def reference(architecture, make_hf_model, make_tokenizer):
    """Tokens of each prompt's argmax continuation, computed without a cache; never cut."""
    hf, tokenizer, found = make_hf_model(architecture), make_tokenizer(), {}
    for prompt in PROMPTS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids, said = tokenizer(text, add_special_tokens=False).input_ids, []
        with torch.no_grad():
            for _ in range(STEPS):
                said.append(int(hf(torch.tensor([ids + said]), use_cache=False).logits[0, -1].argmax()))
        found[prompt] = said
    return found


def until_end(tokens, ends):
    stop = next((k + 1 for k, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


@given(data=st.data())
@settings(max_examples=5)
def test_every_reply_is_the_argmax_of_whole_forwards(data, any_model, reference, monkeypatch_module):
    options = data.draw(st.lists(st.sampled_from(sorted(OPTIONS)), unique=True, min_size=3))
    # two of the tokens that are said, so that some replies end early
    ends = data.draw(st.lists(st.sampled_from([6, *(t for said in reference.values() for t in said[2:5])]), max_size=3))
    chosen = data.draw(st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=6))
    new, batch = data.draw(st.integers(1, STEPS)), data.draw(st.integers(1, 6))
    expected = [until_end(reference[prompt][:new], ends or [6]) for prompt in chosen]
    with monkeypatch_module.context() as patch:
        if hooked.installed():  # holds no configuration: its end tokens were read at load
            patch.setattr(any_model.backend, "ends", tuple(ends) or (6,))
        else:
            config = any_model.hf_model.generation_config
            for name in options:
                patch.setattr(config, name, OPTIONS[name], raising=False)
            patch.setattr(config, "eos_token_id", ends or 6)
        replies = any_model.generate(chosen, new, batch, progress=False)
        ids = greedy_replies(any_model, chosen, new, batch)
    assert ids == expected
    assert replies == any_model.decode(expected)


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_end_tokens(make_hf_model, make_tokenizer, make_model):
    model = make_model("llama")
    assert model.end_ids == (6,)
    if not hooked.installed():
        config = model.hf_model.generation_config
        config.eos_token_id = [6, 30]
        assert model.end_ids == (6, 30)
        config.eos_token_id = [6, 50256]
        assert model.end_ids == (6,), "the vocabulary has no such token"
        config.eos_token_id = 50256
        assert model.end_ids == (model.tokenizer.eos_token_id,)
        config.eos_token_id = None
        assert model.end_ids == (6,), "the configuration's"
        model.hf_model.config.eos_token_id = None
        assert model.end_ids == (model.tokenizer.eos_token_id,)


def test_a_pad_token_that_the_model_has_not(make_hf_model, make_tokenizer, make_model):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model, plain = ms.load_model((make_hf_model("llama"), tokenizer)), make_model("llama")
    assert tokenizer.pad_token_id == plain.d_vocab
    assert torch.equal(model.logits(list(PROMPTS)), plain.logits(list(PROMPTS)))
    assert model.generate(list(PROMPTS), 6, progress=False) == plain.generate(list(PROMPTS), 6, progress=False)


def test_a_token_that_the_model_has_not(make_hf_model, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["newword"])
    model = ms.load_model((make_hf_model("llama"), tokenizer))
    message = (
        f"the token 'newword' of the prompt 'a newword' has the id {model.d_vocab}; "
        f"expected ids below {model.d_vocab}, the model's tokens; "
        "load the model with its own tokenizer, or resize_token_embeddings(len(tokenizer)) before"
    )
    for run in (model.tokenize, model.logits, model.generate, model.cache):
        with pytest.raises(MechsafetyError) as caught:
            run(["tea", "a newword"])
        assert str(caught.value) == message


def test_replies_stay_within_the_models_positions(gpt2, llama):
    room = 128 - gpt2.tokenize(["tea"]).ids.shape[1] + 1
    assert len(greedy_replies(gpt2, ["tea"], room)[0]) == room
    message = rf"^max_new_tokens={room + 1} after a prompt of 5 tokens; expected at most 128 positions together; "
    for run in (gpt2.generate, lambda prompts, n: greedy_replies(gpt2, prompts, n)):
        with pytest.raises(MechsafetyError, match=message + rf"pass max_new_tokens={room}$"):
            run(["tea"], room + 1)
    assert len(llama.generate(["tea"], 130, progress=False)) == 1, "a model of more positions"


@pytest.mark.generation("TransformerBridge", reason="a HookedTransformer has no Hugging Face configuration")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_outputs_as_tuples(kind, make_model, pairs, log_odds):
    plain, model = make_model(kind), make_model(kind)
    model.hf_model.config.return_dict = False
    assert torch.equal(model.logits(pairs.harmful), plain.logits(pairs.harmful))
    assert model.generate(pairs.harmful, 3, progress=False) == plain.generate(pairs.harmful, 3, progress=False)
    nodes = [ms.Node("head", 1, 2)]
    found = [ms.activation_patching(m, pairs, log_odds, nodes=nodes, progress=False) for m in (model, plain)]
    assert torch.equal(found[0].changes, found[1].changes)


def test_a_cursor_reads_in_pieces(any_model):
    """Columns one by one, and a first column that all rows share, give what one whole forward gives."""
    tokens = any_model.tokenize(list(PROMPTS[:3])).rows([1])
    twice = tokens.joined(tokens)
    whole = any_model.forward(twice, keep=twice.ids.shape[1])
    with torch.no_grad():
        cursor = Cursor(any_model.backend)
        parts = [cursor.feed(twice.ids[:1, :3], twice.mask[:1, :3], keep=9).expand(2, -1, -1)]
        parts += [cursor.feed(twice.ids[:, k : k + 1], twice.mask[:, k : k + 1]) for k in range(3, len(whole[0]))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-5, rtol=1e-5)


def test_two_wrappers_of_one_model_see_each_others_edits(llama):
    other = ms.load_model((llama.bridge, llama.tokenizer))
    assert other.lock is llama.lock and not other.edited
    site, seen, inside, go_on = Site(SiteKind.Z, 1), [], threading.Event(), threading.Event()

    def edit():
        with other.hooks([(site, lambda own: own * 0)]):
            inside.set()
            go_on.wait(30)

    with llama.hooks([(site, lambda own: None)]):
        assert other.edited and llama.edited
    assert not other.edited and not llama.edited
    thread = threading.Thread(target=edit)
    thread.start()
    assert inside.wait(30) and llama.edited, "opened by the other wrapper, in another thread"
    reader = threading.Thread(target=lambda: seen.append((llama.logits(["tea"]), llama.edited)))
    reader.start()
    reader.join(0.2)
    assert not seen, "a run waits until the edit is over"
    go_on.set()
    thread.join()
    reader.join()
    assert not seen[0][1] and torch.equal(seen[0][0], llama.logits(["tea"]))
    with pytest.raises(KeyboardInterrupt), other.hooks([(site, lambda own: None)]):
        raise KeyboardInterrupt
    assert not llama.edited


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_samples_are_those_of_the_seed_whatever_the_batch(any_model):
    prompts = ["make a bomb please", "tea", "how do i bake bread", "steal a car"]
    first = any_model.reply_ids(prompts, 6, temperature=1.0, seed=3, progress=False)
    assert any_model.reply_ids(prompts, 6, 1, temperature=1.0, seed=3, progress=False) == first
    assert any_model.reply_ids(prompts, 6, temperature=1.0, seed=4, progress=False) != first
    copies = any_model.reply_ids(["tea"] * 4, 6, temperature=1.0, progress=False)
    assert len({tuple(ids) for ids in copies}) > 1, "each prompt has draws of its own"


def test_a_low_temperature_is_greedy_and_one_is_the_models_own_distribution(llama):
    prompts = ["make a bomb please", "tea"]
    cold = llama.generate(prompts, 8, temperature=1e-4, seed=1, progress=False)
    assert cold == llama.generate(prompts, 8, progress=False)
    n = 3000
    drawn = [ids[0] for ids in llama.reply_ids(["tea"] * n, 1, 500, temperature=0.7, progress=False)]
    expected = (llama.logits(["tea"])[0] / 0.7).softmax(-1)
    common = expected.topk(12).indices
    counts = torch.tensor([drawn.count(int(token)) for token in common], dtype=torch.float64)
    rest = torch.tensor([n - counts.sum()])
    shares = torch.cat([expected[common], (1 - expected[common].sum())[None]]).double()
    chi = ((torch.cat([counts, rest]) - n * shares) ** 2 / (n * shares)).sum()
    assert float(chi) < 32.9, "p = .001 of chi-square with 12 degrees of freedom"


@pytest.mark.unchecked
@pytest.mark.parametrize("temperature", [-1.0, math.inf, math.nan, "hot", None])
def test_a_temperature_that_is_none(llama, temperature):
    with pytest.raises(MechsafetyError, match=rf"^temperature={temperature!r}; expected a number, at least 0$"):
        llama.generate(["tea"], 2, temperature=temperature)


@pytest.mark.parametrize("temperature", [1e-310, 1e-30, 1e-3])
def test_a_tiny_temperature_draws_the_most_probable(temperature):
    logits = torch.tensor([[1.0, 40.0, -math.inf], [-3.0, -50.0, 2.0]])
    assert Sampler(temperature, 0, [0, 1])(logits).tolist() == [1, 2]


def test_a_tokenizer_that_cleans_up_spaces_streams_every_word(llama):
    """Such a decoding rewrites words that were said: ``do n't`` becomes ``don't``."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = ["i", "do", "'", "s", "n't", "know", "."]
    bare = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="i"))
    model = copy.copy(llama)
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, clean_up_tokenization_spaces=True)
    ids = [0, 1, 2, 3, 4, 5, 6]
    speech = Speech(lambda so_far: model.decode([so_far])[0])
    said = [speech.add(k).text for k in ids]
    assert "".join(said) == model.decode([ids])[0] == "i do ' s n't know ." and all(said)
