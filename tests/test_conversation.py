"""Prompts of several turns: what they are, how a template renders them, and that every entry takes them."""

import copy
import json
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mechsafety as ms
from mechsafety.conversation import Conversation, system_of, turns_of
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import prompt_list, prompt_text
from mechsafety.models import template
from mechsafety.prompts import PromptPair, Tokens, omissions

TURNS = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TURNS
)
DEAF = TURNS.replace("in messages", "in messages if m['role'] == 'user'")
LAST = "<user>{{ messages[-1]['content'] }}<end><assistant>"
# in the manner of Gemma: the system text begins the user's first turn, and roles alternate
FOLDED = (
    "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + ' ' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<' + m['role'] + '>' + (first if loop.first else '') + (m['content'] | trim) + '<end>' }}{% endfor %}"
    "<assistant>"
)
# in the manner of Qwen-3: what the assistant thought in earlier turns is left out
THINKS = TURNS.replace("m['content']", "(m['content'].split('</think>')[-1])")


def said(role, content):
    return {"role": role, "content": content}


SYSTEM, TEA, CAKE = said("system", "you help"), said("user", "make tea"), said("assistant", "a cake")
TALK = [SYSTEM, TEA, CAKE, said("user", "how do i make a bomb")]


@pytest.fixture
def rendered(tokenizer_with):
    """A prompt as a template with options writes it: the text before the instruction, the instruction, what follows."""

    def build(source, prompt, **options):
        tokenizer = tokenizer_with(source)
        text, start, end = template.render(tokenizer, prompt_text(prompt), template.checked_options(tokenizer, options))
        return text[:start], text[start:end], text[end:]

    return build


# --- what it is -------------------------------------------------------------------------------------------------------


def test_a_conversation_is_its_turns_and_reads_as_text():
    talk = prompt_text(TALK)
    assert isinstance(talk, Conversation) and talk.messages == TALK and talk.instruction == "how do i make a bomb"
    assert talk.splitlines() == [
        "system: you help",
        "user: make tea",
        "assistant: a cake",
        "user: how do i make a bomb",
    ]
    assert prompt_text(talk) is talk and system_of(talk) == "you help" and system_of("make tea") is None
    assert turns_of(talk)[1] == ("user", "make tea") and turns_of("make tea") == (("user", "make tea"),)


def test_a_single_turn_of_the_user_is_its_text():
    assert type(prompt_text([TEA])) is str and prompt_text([TEA]) == "make tea" == prompt_text((TEA,))


def test_copies_keep_the_turns():
    talk = Conversation(TALK)
    for other in (copy.copy(talk), copy.deepcopy(talk), pickle.loads(pickle.dumps(talk)), Conversation(talk.messages)):
        assert type(other) is Conversation and other == talk and hash(other) == hash(talk) and other.turns == talk.turns


def test_equal_are_equal_turns_and_never_a_text():
    talk = Conversation([SYSTEM, TEA])
    transcript = "system: you help\nuser: make tea"
    assert str(talk) == transcript and talk != transcript and transcript != talk and len({talk, transcript}) == 2
    other = Conversation([said("system", "you help\nuser: make tea"), said("user", "make tea")])
    same = Conversation([said("system", "you help"), said("user", "make tea\nuser: make tea")])
    assert str(other) == str(same) and other != same and len({other, same}) == 2


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(min_size=1).filter(str.strip)), max_size=4))
def test_every_conversation_comes_back_from_its_messages(turns):
    messages = [said(role, text) for role, text in [*turns, ("user", "make tea")] if text.isprintable()]
    found = prompt_text(json.loads(json.dumps(messages)))
    assert turns_of(found) == tuple((m["role"], m["content"]) for m in messages)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 2 of 2 is an empty list of messages; expected at least the user's message"),
        ([SYSTEM], "prompt 2 of 2 ends in a turn of the system; expected the user's turn at the end, to which the"),
        ([TEA, CAKE], "prompt 2 of 2 ends in a turn of the assistant; expected the user's turn at the end, to which"),
        ([TEA, SYSTEM, TEA], "prompt 2 of 2, message 2 is a system turn; expected a system turn only as the first"),
        (
            [said("tool", "x"), TEA],
            "prompt 2 of 2, message 1 has the role 'tool'; expected one of ('system', 'user', 'assistant')",
        ),
        ([said(3, "x"), TEA], "prompt 2 of 2, message 1 has the role 3; expected one of ('system', 'user', "),
        ([SYSTEM, said("user", 3)], "prompt 2 of 2, message 2 has a content of type int; expected text"),
        ([said("user", [{"type": "text"}])], "prompt 2 of 2, message 1 has a content of type list; expected text"),
        ([said("user", " \n")], "prompt 2 of 2, message 1 has no text; expected text"),
        ([said("user", "\ud83d")], "prompt 2 of 2, message 1 holds half a character ('\\ud83d'); "),
        ([{"role": "user"}], "prompt 2 of 2, message 1 has no 'content'; expected {'role': ..., 'content': ...}"),
        ([{"content": "tea"}], "prompt 2 of 2, message 1 has no 'role'; expected {'role': ..., 'content': ...}"),
        (
            [{**TEA, "name": "Bo"}],
            "prompt 2 of 2, message 1 has the key 'name'; expected {'role': ..., 'content': ...}",
        ),
        (
            ["make tea"],
            "prompt 2 of 2, message 1 is of type str; expected {'role': ..., 'content': ...}; "
            "a list of texts is several prompts",
        ),
        ({"role": "user"}, "prompt 2 of 2 is of type dict; expected text or a list of messages"),
    ],
)
@pytest.mark.unchecked
def test_what_is_no_conversation(llama, prompt, message):
    for take in (prompt_list, llama.logits, llama.generate, llama.tokenize, llama.cache):
        with pytest.raises(MechsafetyError) as caught:
            take(["make tea", prompt])
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_one_conversation_is_no_list_of_prompts(llama):
    with pytest.raises(MechsafetyError) as caught:
        llama.generate(TALK, 4)
    assert str(caught.value) == ("a single list of messages was given; expected a list of prompts; write [prompt]")


def test_an_empty_system_turn_is_a_system_turn(rendered):
    """It keeps a template from writing a system text of its own."""
    own = "{% if messages[0]['role'] != 'system' %}<system>default<end>{% endif %}" + TURNS
    assert rendered(own, "make tea")[0] == "<system>default<end><user>"
    assert rendered(own, [said("system", ""), TEA])[0] == "<system><end><user>"


# --- how a template renders it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [TURNS, FOLDED, template.PLAIN_TEMPLATE])
@pytest.mark.parametrize("messages", [TALK, TALK[1:], [SYSTEM, TEA], [TEA, said("assistant", "make tea"), TEA]])
def test_the_text_is_the_librarys_own_and_the_instruction_the_last_turn(tokenizer_with, rendered, source, messages):
    whole = tokenizer_with(source).apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    before, instruction, after = rendered(source, messages)
    assert before + instruction + after == whole and instruction == messages[-1]["content"]
    assert after == whole[whole.rindex(instruction) + len(instruction) :]


def test_the_prompts_own_system_turn_takes_the_place_of_the_models(rendered):
    assert rendered(TURNS, [SYSTEM, TEA], system="be kind")[0] == "<system>you help<end><user>"
    assert rendered(TURNS, [TEA, CAKE, TEA], system="be kind")[0].startswith("<system>be kind<end><user>make tea<end>")


def test_what_the_assistant_thought_may_be_left_out(rendered):
    thought = [TEA, said("assistant", "<think>\nhm\n</think>\n\na cake"), TEA]
    assert rendered(THINKS, thought)[0] == "<user>make tea<end><assistant>\n\na cake<end><user>"


@pytest.mark.parametrize(
    ("source", "messages", "message"),
    [
        (
            NO_SYSTEM,
            [SYSTEM, TEA],
            "a system text for a chat template without a system turn (System role not supported); leave the system "
            "text out, or begin the user's turn with it",
        ),
        (
            DEAF,
            [SYSTEM, TEA],
            "a system text for a chat template without a system turn (it leaves the text out); leave ",
        ),
        (
            DEAF,
            [TEA, CAKE, TEA],
            "the chat template leaves out an earlier turn of the assistant: 'a cake'; expected a ",
        ),
        (LAST, [CAKE, TEA], "the chat template leaves out an earlier turn of the assistant: 'a cake'; expected a "),
        (FOLDED, [TEA, TEA], "the chat template cannot render a prompt (roles must alternate); expected a Jinja templ"),
    ],
)
def test_turns_that_a_template_does_not_take(rendered, source, messages, message):
    with pytest.raises(MechsafetyError) as caught:
        rendered(source, messages)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


# --- where prompts are taken ------------------------------------------------------------------------------------------


def test_tokens_and_spans(llama):
    tokens = llama.tokenize([TALK])
    ids = llama.tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokens.ids[0].tolist() == ids
    spans = {name: slice(*tokens.spans[0].range(name)) for name in ("prefix", "instruction", "suffix")}
    texts = {name: llama.tokenizer.decode(ids[part]) for name, part in spans.items()}
    assert texts["prefix"] == "<s><system>you help<end><user>make tea<end><assistant>a cake<end><user>"
    assert texts["instruction"] == "how do i make a bomb" and texts["suffix"] == "<end><assistant>"
    assert [row.text for row in llama.explain_tokens(TALK).rows] == llama.token_strings(TALK)
    assert llama.n_tokens(TALK) == len(ids)


def test_every_entry_of_the_model_reads_the_rendered_turns(llama):
    """Each gives what the same token ids give, alone and in a padded batch with a plain prompt."""
    ids = llama.tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=True)["input_ids"]
    row = torch.tensor([ids])
    own = Tokens(row, torch.ones_like(row).bool(), tuple(llama.spans([TALK])))
    assert float((llama.logits([TALK]) - llama.logits(["how do i make a bomb"])).abs().max()) > 1e-2
    for prompts in ([TALK], [TALK, "make tea"], pd.Series([TALK, "make tea"]), (Conversation(TALK), "tea")):
        torch.testing.assert_close(llama.logits(prompts)[:1], llama.logits(own), atol=1e-4, rtol=1e-4)
    alone, plain = llama.generate([TALK], 6, progress=False), llama.generate(["make tea"], 6, progress=False)
    assert llama.generate(["make tea", TALK], 6, progress=False) == [*plain, *alone]
    torch.testing.assert_close(llama.cache([TALK]).resid, llama.cache(own).resid, atol=1e-5, rtol=1e-4)
    seen = llama.attention(TALK, "L1.H2")
    assert seen.tokens == tuple(llama.token_strings(TALK)) and seen.prompt == Conversation(TALK)


def test_a_column_of_messages_as_tables_keep_it(llama):
    """Parquet gives each list of messages as an array."""
    rows = np.empty(2, dtype=object)
    for k in range(2):
        rows[k] = np.array(TALK, dtype=object)
    assert prompt_list(rows) == [Conversation(TALK)] * 2


def test_the_metric_and_the_judges(llama, log_odds):
    prompts, replies = [TALK, "make tea"], ["sorry , i can not help", "make a cake"]
    torch.testing.assert_close(log_odds.scores(llama, prompts), log_odds(llama.logits(prompts)), atol=1e-4, rtol=1e-4)
    given = []

    def judge(prompts, replies):
        given.extend(prompts)
        return ["refuses", "answers"]

    judged = ms.judge_replies(llama, prompts, replies, judge=judge, limit=1e9)
    assert given == [Conversation(TALK), "make tea"] == list(judged.prompts)
    assert judged.to_dataframe().prompt.tolist() == given and prompt_list(judged.to_dataframe().prompt) == given


def test_a_reply_is_compared_with_the_last_turn():
    """Words of earlier turns are no echo, and their script is as good as the last turn's."""
    talk = [said("system", "knead the dough and bake bread"), said("user", "how are you")]
    assert ms.replies.phrase_judge([talk, talk], ["bake bread", "knead dough"]) == ["answers", "answers"]
    assert ms.replies.phrase_judge([talk], ["how are you"]) == ["neither"]
    russian = [said("system", "answer in English"), said("user", "как дела")]
    assert ms.replies.degenerate(prompt_text(russian), "very well") == ""
    assert ms.replies.degenerate(prompt_text("как дела"), "very well") == "other script"


def test_a_guard_and_its_wrap(llama, pairs):
    with_turns = pairs.with_system("you help")
    prompts = (*with_turns.harmful, *with_turns.harmless, "make tea", "help tea", "poison tea")
    train = ms.monitors.LabelledPrompts("set", prompts, tuple(k % 2 == 0 for k in range(len(prompts))))
    neurons = [ms.Node("neuron", 0, k) for k in range(6)]
    guard = ms.monitors.SafetyGuard.fit(llama, neurons, train, target_tpr=0.5)
    given = [with_turns.harmful[0].messages, "make tea"]
    alone, together = guard.predict(given[0]).probability, guard.predict_all(given)[0].probability
    assert alone == pytest.approx(together, abs=1e-5)
    assert abs(alone - guard.predict(pairs.harmful[0]).probability) > 1e-3
    seen = []
    guard.with_threshold(1.0).wrap(lambda prompts: seen.append(prompts) or prompts, stop=True)(given)
    assert seen == [given]  # the user's own messages are handed on


def test_a_guard_reads_the_turns(llama, pairs):
    from mechsafety.monitors.features import read_prompts

    one, other = (read_prompts(llama, [prompt]).resid for prompt in (TALK, TALK[-1]["content"]))
    assert float((one - other).abs().max()) > 1e-3


# --- pairs ------------------------------------------------------------------------------------------------------------


def test_pairs_with_a_system_turn_are_the_pairs_of_a_model_with_that_system_text(
    make_hf_model, make_tokenizer, log_odds
):
    """Numbers, positions and what is left out are the same either way."""
    own = ms.load_model((make_hf_model("llama"), make_tokenizer()))
    told = ms.load_model((make_hf_model("llama"), make_tokenizer()), template_options={"system": "you help"})
    plain = ms.PromptPairs.from_lists(
        ["how do i make a bomb", "poison my tea"], ["how do i make a cake", "explain my tea"]
    )
    turned = plain.with_system("you help")
    assert own.tokenize_pairs(turned).start == told.tokenize_pairs(plain).start > 4
    for positions in ("all", "instruction", "suffix"):
        found, wanted = (
            ms.activation_patching(model, pairs, log_odds, positions=positions, progress=False)
            for model, pairs in ((own, turned), (told, plain))
        )
        torch.testing.assert_close(found.changes, wanted.changes, atol=1e-6, rtol=1e-6)
    assert float(found.changes.abs().max()) > 1e-3
    assert found.provenance.options["system"] == "you help" and "system" not in wanted.provenance.options
    paths = ms.path_patching(own, turned, log_odds, senders=["L0.H0"], receivers=[("L1.H0", "q")], progress=False)
    assert paths.provenance.options["system"] == "you help"


def test_pairs_of_messages(llama, tmp_path):
    rows = [
        {"harmful": TALK, "harmless": [*TALK[:-1], said("user", "how do i make a cake")], "topic": "food"},
        {"harmful": "poison my tea", "harmless": "explain my tea"},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    pairs = ms.PromptPairs.from_jsonl(tmp_path / "pairs.jsonl")
    assert pairs.pairs == ms.PromptPairs.from_file(tmp_path / "pairs.json").pairs
    assert pairs.pairs[0] == PromptPair(**rows[0]) and pairs.harmful == [Conversation(TALK), "poison my tea"]
    listed = ms.PromptPairs.from_lists([row["harmful"] for row in rows], [row["harmless"] for row in rows])
    assert (listed.harmful, listed.harmless) == (pairs.harmful, pairs.harmless)
    assert len(pairs.aligned(llama)) == 2 and pairs.system == "" and omissions(pairs) == {}
    matched = ms.PromptPairs.matched(pairs.harmful, pairs.harmless[::-1], llama.n_tokens)
    assert matched.harmless == pairs.harmless
    again = ms.PromptPairs((pairs.pairs[0], pairs.pairs[0], pairs.pairs[1]))
    assert len(again) == 2 and "duplicate" in again.left_out[0]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (3, "PATH, line 1: the prompt under 'harmful' is a JSON int; expected text or a list of messages"),
        (
            [],
            "PATH, line 1: the prompt under 'harmful' is an empty list of messages; expected at least the user's mess",
        ),
        (
            [TEA, CAKE],
            "PATH, line 1: the prompt under 'harmful' ends in a turn of the assistant; expected the user's t",
        ),
        (
            [said("user", 3)],
            "PATH, line 1: the prompt under 'harmful', message 1 has a content of type int; expected",
        ),
    ],
)
def test_files_with_wrong_messages(tmp_path, prompt, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"harmful": prompt, "harmless": "make tea"}), encoding="utf-8")
    with pytest.raises(MechsafetyError) as caught:
        ms.PromptPairs.from_jsonl(path)
    assert str(caught.value).replace(str(path), "PATH").startswith(message)


def test_the_two_prompts_of_a_pair_differ_in_the_last_turn():
    for harmless in ("make tea", [said("system", "be kind"), *TALK[1:]]):
        with pytest.raises(MechsafetyError) as caught:
            ms.PromptPairs.from_lists([TALK], [harmless])
        assert str(caught.value).startswith(
            "lists, pair 1: the two prompts differ before the user's last turn; expected the same system turn and the "
            "same earlier turns in both; "
        )
        assert len(ms.PromptPairs.from_lists([TALK], [harmless], align="suffix")) == 1


def test_with_system(pairs):
    turned = pairs.with_system("you help")
    assert (
        turned.system == "you help"
        and ", with a system turn" in repr(turned)
        and omissions(turned) == {"system": "you help"}
    )
    assert [turns_of(prompt) for prompt in turned.harmful] == [
        (("system", "you help"), ("user", prompt)) for prompt in pairs.harmful
    ]
    assert turned[:1].system == turned.sample(2).system == "you help" and pairs.system == ""
    both = ms.PromptPairs((*pairs.pairs, *turned.pairs), "both")
    assert both.system == "" and len(both) == 2 * len(pairs)
    with pytest.raises(MechsafetyError) as caught:
        both.with_system("be kind")
    assert (
        str(caught.value) == "both, pair 5: the harmful prompt has a system turn already; expected prompts without one"
    )
    with pytest.raises(MechsafetyError, match=r"^the system text is empty; expected text$"):
        pairs.with_system(" ")


# --- files ------------------------------------------------------------------------------------------------------------


def test_results_keep_the_turns(llama, tmp_path):
    judged = ms.judge_replies(llama, [TALK, "make tea"], ["make a cake", "help"], limit=1e9)
    seen = llama.attention(TALK, "L1.H2")
    for k, result in enumerate((judged, seen)):
        result.save(tmp_path / f"{k}.json")
    read = type(judged).load(tmp_path / "0.json")
    assert read.prompts == judged.prompts and read.prompts[0].messages == TALK
    assert type(seen).load(tmp_path / "1.json").prompt == seen.prompt
    data = json.loads((tmp_path / "0.json").read_text(encoding="utf-8"))
    assert data["result"]["prompts"] == [TALK, "make tea"]
    for wrong, message in (
        (3, "prompts[0]: 3; expected text or a list of messages"),
        ([TEA, CAKE], "prompts[0] ends in a turn of the assistant; expected the user's turn at the end"),
    ):
        data["result"]["prompts"][0] = wrong
        (tmp_path / "0.json").write_text(json.dumps(data), encoding="utf-8")
        with pytest.raises(MechsafetyError) as caught:
            type(judged).load(tmp_path / "0.json")
        assert message in str(caught.value)


def test_pages_escape_the_turns(llama):
    page = llama.attention([said("system", "<b>you</b>"), TEA], "L0.H0").to_html()
    assert "<b>you</b>" not in page
