"""Rendering: one renderer, templates that write the date, and template options."""

import datetime
import json
from dataclasses import replace

import pytest

import mechsafety as ms
from mechsafety.errors import MechsafetyError
from mechsafety.models import template
from mechsafety.models.chat import ChatTokenizer
from mechsafety.models.demo import base_folder

TURNS = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
# Llama 3.2 takes date_string, or writes today where it can; Granite 3 and SmolLM3 call strftime_now in any case
GUARDED = (
    "{{ bos_token }}{% if date_string is not defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{% endif %}<system>{{ date_string }}<end>" + TURNS
)
CALLED = "{{ bos_token }}<system>{{ strftime_now('%d %B %Y') }}<end>" + TURNS
THINKING = (
    "{{ bos_token }}{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    + TURNS
    + "{% if not enable_thinking %}no{% endif %}"
)
BLOCK = "<think>\n\n</think>\n\n"
# in the manner of Qwen-3: on unless it is switched off, which writes a closed and empty block
SWITCHED = (
    "{{ bos_token }}{%- for m in messages %}{{ '<' + m.role + '>' + (m.content.split('</think>')[-1]) + '<end>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<assistant>' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
# in the manner of DeepSeek-R1: every reply begins in an open block; and of V3.1: off unless switched on
OPEN = TURNS.replace("'<assistant>'", "'<assistant><think>\n'")
OFF = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
    + TURNS
    + "{% if thinking %}<think>{% else %}</think>{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + TURNS
)
DEAF = "{{ bos_token }}{% for m in messages if m['role'] == 'user' %}<user>{{ m['content'] }}<end>{% endfor %}"
ADDS = "{{ bos_token }}<user>{{ messages[-1]['content'] | trim }}\n{% if 'tea' in messages[-1]['content'] %}{% endif %}"


@pytest.fixture
def rendered(tokenizer_with):
    """A prompt as a template with options writes it: (text, the prompt in it)."""

    def build(source, prompt, **options):
        tokenizer = tokenizer_with(source)
        text, start, end = template.render(tokenizer, prompt, template.checked_options(tokenizer, options))
        return text, text[start:end]

    return build


@pytest.fixture
def load(make_hf_model, tokenizer_with):
    """Loads a tiny model with a template and options."""

    def build(source, **options):
        pair = (make_hf_model("llama", layers=1), tokenizer_with(source))
        return ms.load_model(pair, template_options=options or None)

    return build


# --- one renderer -----------------------------------------------------------------------------------------------------


def library_text(tokenizer, prompt):
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize("source", [TURNS, OFF, DEAF, template.PLAIN_TEMPLATE])
def test_the_text_is_the_librarys_own(tokenizer_with, rendered, source):
    for prompt in ("make tea", " make\n tea ", "{{ bos_token }}", "a <end> b"):
        assert rendered(source, prompt) == (library_text(tokenizer_with(source), prompt), prompt)


def test_the_demos_text_is_the_librarys_own(tokenizer_with):
    tokenizer = tokenizer_with((base_folder() / "chat_template.jinja").read_text(encoding="utf-8"))
    assert template.render(tokenizer, "make tea", {})[0] == library_text(tokenizer, "make tea")


@pytest.mark.parametrize(("source", "written"), [(GUARDED, "26 Jul 2024"), (CALLED, "26 July 2024")])
def test_templates_that_write_the_date(load, source, written):
    model = load(source)  # the load check's reference reads the same text, or this would fail
    text, start, end = model.render("make tea")
    assert text == f"<s><system>{written}<end><user>make tea<end><assistant>" and text[start:end] == "make tea"
    assert model.provenance().template_options == {}


@pytest.mark.parametrize("day", ["2025-03-01", datetime.date(2025, 3, 1)])
def test_date(tokenizer_with, rendered, day):
    assert "01 Mar 2025" in rendered(GUARDED, "make tea", date=day)[0]
    assert "01 March 2025" in rendered(CALLED, "make tea", date=day)[0]
    assert template.checked_options(tokenizer_with(CALLED), {"date": day}) == {"date": "2025-03-01"}


def test_the_prompt_ends_where_the_template_says(rendered):
    """A template that takes white space from a prompt and writes some of its own: that is not the prompt's."""
    assert rendered(ADDS, " make tea\n") == ("<s><user>make tea\n", "make tea")
    assert rendered(TURNS.replace("m['content']", "(m['content'].rstrip())"), " make tea\n")[1] == " make tea"


def test_what_follows_the_prompt_may_depend_on_it(rendered):
    source = TURNS + "{% if 'tea' in messages[-1]['content'] %}please{% endif %}"
    for prompt in ("make tea", "make bread"):
        text, found = rendered(source, prompt)
        assert found == prompt and text.endswith("please") == ("tea" in prompt)


def test_a_template_is_one_models_own(make_hf_model, make_tokenizer):
    """Two models of one tokenizer: the second's template is not the first's, nor the caller's."""
    tokenizer = make_tokenizer()
    before = tokenizer.chat_template
    first = ms.load_model((make_hf_model("llama", layers=1), tokenizer), chat_template="plain")
    second = ms.load_model((make_hf_model("llama", layers=1), tokenizer), template_options={"system": "you help"})
    assert first.render("tea")[0] == "User: tea\nAssistant:" and tokenizer.chat_template == before
    assert second.render("tea")[0] == "<s><system>you help<end><user>tea<end><assistant>"
    with pytest.raises(MechsafetyError) as caught:
        ms.safety_neurons(second, first, ["tea"])
    assert str(caught.value) == (
        "LlamaForCausalLM has the template options {}, LlamaForCausalLM {'system': 'you help'}; "
        "expected the same for both"
    )


# --- options ----------------------------------------------------------------------------------------------------------


def test_system_and_variables(rendered):
    text = "<s><system>you help<end><user>make tea<end><assistant>no"
    assert rendered(THINKING, "make tea", system="you help", enable_thinking=False)[0] == text
    assert rendered(THINKING, "make tea", enable_thinking=True)[0] == "<s><user>make tea<end><assistant>"
    text = "System: you help\nUser: make tea\nAssistant:"
    assert rendered(template.PLAIN_TEMPLATE, "make tea", system="you help")[0] == text


def test_options_are_part_of_what_a_result_is(load, pairs, log_odds, tmp_path):
    options = {"system": "you help", "loud": False}
    source = THINKING.replace("enable_thinking", "loud")
    model, plain = load(source, **options), load(source)
    assert float((model.logits(["make tea"]) - plain.logits(["make tea"])).abs().max()) > 1e-3
    found, without = model.provenance(), plain.provenance()
    assert dict(found.template_options) == options and found.to_json()["template_options"] == options
    assert "template_options" not in without.to_json()  # files of models without options stay as they were
    for one in (found, without):
        assert type(one).from_json(json.loads(json.dumps(one.to_json()))) == one
    assert found.difference(without) == ("template options", json.dumps(options), "{}")
    assert without.difference(replace(without, template_sha256="0" * 64))[0] == "chat template"
    assert found.difference(model.provenance(seed=1)) is None
    result = ms.node_attribution(model, pairs, log_odds, steps=1, progress=False)
    result.save(tmp_path / "saved")
    assert type(result).load(tmp_path / "saved").provenance == result.provenance
    assert dict(result.provenance.template_options) == options
    with pytest.raises(TypeError):
        model.template_options["system"] = "other"


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (
            THINKING,
            {"enable_thinkin": False},
            "the chat template reads no option 'enable_thinkin'; expected one of ['enable_thinking', 'system', "
            "'thinking']",
        ),
        (THINKING, {"date": "2025-03-01"}, "the chat template reads no option 'date'; expected one of ["),
        (THINKING, {"messages": []}, "the chat template reads no option 'messages'; expected one of ["),
        (CALLED, {"strftime_now": "x"}, "the chat template reads no option 'strftime_now'; expected one of ['date', "),
        (CALLED, {"date": "yesterday"}, "the template option 'date' is 'yesterday'; expected a day such as '2024-07-"),
        (CALLED, {"date": 3}, "the template option 'date' is 3; expected a day such as '2024-07-26'"),
        (THINKING, {"system": 3}, "the template option 'system' is 3; expected a text"),
        (THINKING, {"system": "\ud800"}, "template options {'system': '\\ud800'} ('utf-8' codec can't encode"),
        (THINKING, {"enable_thinking": object}, "template options {'enable_thinking': <class 'object'>} (Object of"),
        (THINKING, {"enable_thinking": float("nan")}, "template options {'enable_thinking': nan} (Out of range"),
        (
            NO_SYSTEM,
            {"system": "you help"},
            "a system text for a chat template without a system turn (System role not supported); leave the ",
        ),
        (
            DEAF,
            {"system": "you help"},
            "a system text for a chat template without a system turn (it leaves the text out); leave the ",
        ),
    ],
)
def test_bad_options(tokenizer_with, source, options, message):
    with pytest.raises(MechsafetyError) as caught:
        template.checked_options(tokenizer_with(source), options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


# --- models that think ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "given", "kept", "end"),
    [
        (SWITCHED, {}, {"thinking": "off"}, BLOCK),
        (SWITCHED, {"thinking": "off"}, {"thinking": "off"}, BLOCK),
        (SWITCHED, {"thinking": "closed"}, {"thinking": "closed"}, BLOCK),
        (SWITCHED, {"enable_thinking": True}, {"enable_thinking": True}, ""),
        (SWITCHED, {"enable_thinking": False}, {"enable_thinking": False}, BLOCK),
        (OPEN, {}, {"thinking": "closed"}, BLOCK),
        (OPEN, {"thinking": "closed"}, {"thinking": "closed"}, BLOCK),
        (OFF, {}, {}, "</think>"),
        (OFF, {"thinking": True}, {"thinking": True}, "<think>"),
        (OFF, {"thinking": "off"}, {"thinking": "off"}, "</think>"),
        (OFF, {"thinking": "closed"}, {"thinking": "closed"}, BLOCK),
        (THINKING, {}, {"thinking": "off"}, "no"),  # a switch alone, which writes no block
        (TURNS, {}, {}, ""),
    ],
)
def test_where_a_model_that_thinks_is_read(tokenizer_with, rendered, source, given, kept, end):
    assert template.checked_options(tokenizer_with(source), given) == kept
    assert template.checked_options(tokenizer_with(source), kept) == kept
    text, found = rendered(source, "make tea", **given)
    assert text.endswith(f"<user>make tea<end><assistant>{end}") and found == "make tea"


def test_thinking_is_part_of_what_a_result_is(load, tokenizer_with):
    model = load(SWITCHED)
    assert dict(model.provenance().template_options) == {"thinking": "off"}
    thinks = ChatTokenizer("thinks", tokenizer_with(SWITCHED), {"enable_thinking": True})
    # the block belongs to the suffix
    assert model.spans(["make tea"])[0].n_suffix > thinks.spans(["make tea"])[0].n_suffix == 2


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (TURNS, {"thinking": "off"}, "the chat template reads no option 'thinking'; expected one of ['system']"),
        (SWITCHED, {"thinking": "on"}, "the template option 'thinking' is 'on'; expected one of ['off', 'closed'] of"),
        (
            SWITCHED,
            {"thinking": False},
            "the template option 'thinking' is False; expected one of ['off', 'closed'] of",
        ),
        (OPEN, {"thinking": "off"}, "the template option 'thinking' is 'off'; expected one of ['closed'] of this temp"),
        (
            THINKING,
            {"thinking": "closed"},
            "the template option 'thinking' is 'closed'; expected one of ['off'] of this",
        ),
        (
            SWITCHED,
            {"thinking": "off", "enable_thinking": True},
            "the template options 'thinking' and 'enable_thinking'; expected one of the two",
        ),
    ],
)
def test_ways_of_reading_that_a_template_does_not_offer(tokenizer_with, source, options, message):
    with pytest.raises(MechsafetyError) as caught:
        template.checked_options(tokenizer_with(source), options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for m in messages %}{{ m['content'] }", "unexpected '}'"),
        ("{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}", 'can only concatenate str (not "int") to str'),
        ("{% if messages[0]['content'] is string %}{{ raise_exception('parts please') }}{% endif %}", "parts please"),
    ],
)
def test_broken_templates(load, source, reason):
    with pytest.raises(MechsafetyError) as caught:
        load(source)
    assert str(caught.value) == (
        f"the chat template cannot render a prompt ({reason}); expected a Jinja template that takes a turn's content "
        "as one text; pass chat_template='plain' or a template of your own"
    )


def test_a_prompt_that_the_template_refuses(rendered):
    source = "{% if 'bomb' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}" + TURNS
    assert rendered(source, "make tea")
    with pytest.raises(MechsafetyError, match=r"^the chat template cannot render a prompt \(no\); expected"):
        rendered(source, "make a bomb")


def test_a_system_text_that_changes_nothing_but_is_there(rendered):
    """The template's own system text, given again; and a switch that the template takes from the text."""
    own = "{% if messages[0]['role'] != 'system' %}<system>you help<end>{% endif %}" + TURNS
    assert rendered(own, "make tea", system="you help") == rendered(own, "make tea")
    switch = (
        "{% set quiet = messages[0]['role'] == 'system' and '/quiet' in messages[0]['content'] %}"
        "<user>{{ messages[-1]['content'] }}<end>{{ 'no' if quiet }}"
    )
    assert rendered(switch, "make tea", system="/quiet")[0] == "<user>make tea<end>no"
