"""What public functions accept: one check of models, of prompts and of numbers, at every entry."""

import importlib
import inspect
from collections import OrderedDict
from typing import Literal, get_args, get_origin

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mechsafety as ms
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import Amount, Count, Prompts, Texts, lens_model, prompt_list, public, text_list, whole_number
from mechsafety.models import LensModel
from mechsafety.prompts.pairs import PromptPair
from mechsafety.testbed.vocabulary import REFUSAL

ROOMS = ("attribution", "circuits", "directions", "interventions", "monitors", "neurons", "patching", "prompts")
ROOMS += ("cache", "metrics", "models", "probes", "replies")
# run no model, or hand everything on to one that checks
FREE = {
    "ActivationCache.run",
    "Patch.of",
    "LensModel.W_O",
    "LensModel.W_out",
    "LensModel.b_O",
    "RefusalCircuit.widget",
    "neuron_mask",
}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


def public_functions():
    """Every function and method that the package or a room exports, by its name."""
    found = {}
    for module in (ms, *(importlib.import_module(f"mechsafety.{room}") for room in ROOMS)):
        for name in getattr(module, "__all__", dir(module)):
            thing = getattr(module, name)
            if name.startswith("_") or not getattr(thing, "__module__", "").startswith("mechsafety"):
                continue
            if inspect.isfunction(thing):
                found[thing.__qualname__] = thing
            elif inspect.isclass(thing):
                for key, value in vars(thing).items():
                    value = getattr(value, "__func__", value)
                    if inspect.isfunction(value) and not key.startswith("_"):
                        found[value.__qualname__] = value
    return OrderedDict(sorted(found.items()))


def kind_of(parameter):
    if get_origin(parameter.annotation) is Literal:
        return Literal
    alternatives = [one for one in get_args(parameter.annotation) if one is not type(None)]
    # of several types, these two are checked where they are the only one
    known = [kind for kind in KINDS if kind not in (ms.PromptPairs, ms.RefusalLogOdds) or len(alternatives) <= 1]
    return next((k for k in (parameter.annotation, *get_args(parameter.annotation)) if k in known), None)


KINDS = (LensModel, ms.PromptPairs, ms.RefusalLogOdds, Prompts, Texts, Count, Amount)
PUBLIC = public_functions()
CHECKED = [
    (name, parameter.name, kind_of(parameter))
    for name, function in PUBLIC.items()
    if hasattr(function, "checks")
    for parameter in inspect.signature(function).parameters.values()
    if parameter.name in function.checks
]


def test_every_function_that_runs_a_model_is_an_entry():
    runs_a_model = {
        name
        for name, function in PUBLIC.items()
        for parameter in inspect.signature(function).parameters.values()
        if parameter.annotation is LensModel or LensModel in get_args(parameter.annotation)
    } | {
        name for name in PUBLIC if name.startswith("LensModel.") and len(inspect.signature(PUBLIC[name]).parameters) > 1
    }
    helpers = {"LensModel.render", "LensModel.n_tokens", "LensModel.token_strings", "LensModel.explain_tokens"}
    helpers |= {"LensModel.decode", "LensModel.hooks", "LensModel.provenance", "LensModel.reading"}
    helpers |= {name for name in runs_a_model if PUBLIC[name].__qualname__.startswith(("run_", "check_"))}
    missing = {name for name in runs_a_model - helpers - FREE if not hasattr(PUBLIC[name], "checks")}
    assert not missing, "mark them @public"
    assert len(CHECKED) > 90 and len({name for name, _, _ in CHECKED}) > 40


def test_every_list_of_texts_is_checked():
    lists = {"prompts", "harmful", "harmless", "hard", "erase_on", "references", "refusal_tokens", "comply_tokens"}
    open_ones = {
        (name, parameter.name)
        for name, function in PUBLIC.items()
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name in lists and "Sequence[" in str(parameter.annotation) and kind_of(parameter) is None
    }
    assert not open_ones


@pytest.mark.parametrize(("name", "parameter", "kind"), CHECKED, ids=lambda value: value if type(value) is str else "")
def test_every_entry_refuses_the_same(name, parameter, kind, llama, pairs, log_odds):
    """Each checked parameter of each public function: nothing runs, the line is the same."""
    function = PUBLIC[name]
    bad = {
        LensModel: [("demo", f"{parameter} is the string 'demo'; expected a LensModel; pass load_model('demo')")],
        ms.PromptPairs: [(["tea"], f"{parameter} is of type list; expected PromptPairs; make them with PromptPairs.")],
        ms.RefusalLogOdds: [("Sorry", f"{parameter} is of type str; expected RefusalLogOdds; make one with Refusal")],
        Prompts: [("tea", "a single string was given; expected a list of prompts; write [prompt]")],
        Texts: [("tea", "a single string was given; expected a list of texts; write [text]")],
        Count: [(0, f"{parameter}=0; expected at least 1"), (True, f"{parameter}=True; expected a whole number")],
        Literal: [("nonsense", f"{parameter}='nonsense'; expected one of (")],
        Amount: [(-1, f"{parameter}=-1; expected at least 0"), (0.5, f"{parameter}=0.5; expected a whole number")],
    }[kind]
    if kind == Prompts:
        bad += [
            (["tea", None], "prompt 2 of 2"),
            (np.array(["tea", "\ud800"], dtype=object), "prompt 2 of 2"),
            ([" "], "prompt 1 of 1"),
        ]
    for value, message in bad:
        if isinstance(value, str) and str in get_args(inspect.signature(function).parameters[parameter].annotation):
            continue  # names a source there
        given = {}
        for other in inspect.signature(function).parameters.values():
            made = {ms.PromptPairs: pairs, ms.RefusalLogOdds: log_odds}
            fine = (made | {Prompts: ["tea"], Texts: ["tea"], Count: 1, Amount: 0}).get(kind_of(other), llama)
            if other.kind is other.VAR_KEYWORD or (other.default is not other.empty and other.name != parameter):
                continue
            given[other.name] = value if other.name == parameter else fine
        with pytest.raises(MechsafetyError) as caught:
            function(**given)
        assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_what_is_no_model(llama, make_hf_model, make_tokenizer):
    assert lens_model(llama) is llama
    hf, bridge = make_hf_model("llama"), type(llama.bridge).__name__
    for wrong, message in (
        (hf, "model is of type LlamaForCausalLM; expected a LensModel; pass load_model((model, tokenizer))"),
        ((hf, make_tokenizer()), "model is of type tuple; expected a LensModel; pass load_model(model)"),
        (llama.bridge, f"model is of type {bridge}; expected a LensModel; pass load_model(model)"),
        (None, "model is of type NoneType; expected a LensModel; pass load_model(...)"),
    ):
        with pytest.raises(MechsafetyError) as caught:
            lens_model(wrong)
        assert str(caught.value) == message


@given(texts=st.lists(TEXT, min_size=1, max_size=5), data=st.data())
def test_columns_are_read_in_the_order_of_their_rows(texts, data):
    index = data.draw(st.permutations(range(len(texts))))
    array = np.array(texts, dtype=object)
    for column in (texts, tuple(texts), pd.Series(texts, index=index), array, pd.Index(texts), iter(texts)):
        found = prompt_list(column)
        assert found == texts and all(type(text) is str for text in found)
    assert prompt_list(pd.Series(texts, dtype="category")) == texts
    assert text_list([*texts, ""]) == [*texts, ""]


def test_a_shuffled_column_gets_its_own_replies(llama, pairs):
    prompts = pairs.harmful[:3]
    column = pd.Series(prompts, index=[2, 0, 1])
    assert llama.generate(column, 4, progress=False) == llama.generate(prompts, 4, progress=False)
    assert (llama.logits(np.array(prompts)) == llama.logits(prompts)).all()
    pairs = ms.PromptPairs.from_lists(column, np.array(pairs.harmless[:3]))
    assert (pairs.harmful, pairs.harmless) == (prompts, list(pairs.harmless))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tea", "a single string was given; expected a list of prompts; write [prompt]"),
        (b"tea", "a single string was given; expected a list of prompts; write [prompt]"),
        ({"tea"}, "a set was given; expected a list of prompts"),
        ({"tea": 1}, "a dict was given; expected a list of prompts"),
        (3, "a int was given; expected a list of prompts"),
        (None, "a NoneType was given; expected a list of prompts"),
        (pd.DataFrame({"a": ["x"]}), "a DataFrame was given; expected a list of prompts; pass one column of it: "),
        (np.array([["x"]]), "a ndarray was given; expected a list of prompts; pass one column of it: "),
        (np.array("x"), "a ndarray was given; expected a list of prompts; pass one column of it: "),
        (["tea", None], "prompt 2 of 2 is None; expected text"),
        (pd.Series(["tea", np.nan]), "prompt 2 of 2 is nan; expected text"),
        (np.array([1, 2]), "prompt 1 of 2 is of type int64; expected text"),
        (["tea", ""], "prompt 2 of 2 is empty; expected text"),
        (["\ud83d"], r"prompt 1 of 1 holds half a character ('\ud83d'); expected whole characters"),
        (
            [PromptPair("a", "b")],
            "prompt 1 of 1 is of type PromptPair; expected text or a list of messages; pass pairs.",
        ),
    ],
)
def test_what_is_no_list_of_prompts(given, message):
    with pytest.raises(MechsafetyError) as caught:
        prompt_list(given)
    assert str(caught.value).startswith(message)


def test_built_in_prompts_are_no_texts():
    with pytest.raises(
        MechsafetyError, match=r"^prompt 1 of \d+ is of type Prompt; expected text or a list of messages; pass \[p"
    ):
        prompt_list(ms.prompts.builtin_prompts("plain"))


@given(st.integers(-3, 3), st.integers(0, 2))
def test_whole_numbers(number, least):
    for value in (number, np.int64(number)):
        if number >= least:
            assert whole_number("n", value, least) == number
        else:
            with pytest.raises(MechsafetyError, match=rf"^n={number}; expected at least {least}$"):
                whole_number("n", value, least)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, np.float64(2)])
def test_what_is_no_whole_number(value):
    with pytest.raises(MechsafetyError, match=r"; expected a whole number$"):
        whole_number("n", value)


def test_defaults_pass_and_wrong_calls_keep_pythons_words():
    @public
    def function(prompts: Prompts = (), size: Count | None = None) -> object:
        return prompts, size

    assert function() == ((), None) and function(size=None) == ((), None)
    assert function(iter(["a"]), np.int64(3)) == (["a"], 3)
    with pytest.raises(TypeError, match=r"function\(\) got an unexpected keyword argument 'sizes'"):
        function(sizes=3)


@pytest.mark.parametrize("where", ["harmful", "harmless"])
@pytest.mark.unchecked
@pytest.mark.parametrize(("text", "said"), [(None, "None"), ("\udcff", "half a character"), (" ", "is empty")])
def test_a_pair_holds_texts(where, text, said):
    pair = PromptPair(**{"harmful": "a", "harmless": "b", where: text})
    with pytest.raises(MechsafetyError, match=rf"^pairs, pair 2: a prompt .*{said}.*; expected "):
        ms.PromptPairs((PromptPair("a", "b"), pair))


def test_labelled_prompts_and_replies():
    with pytest.raises(MechsafetyError, match=r"^prompt 2 of 2 holds half a character"):
        ms.monitors.LabelledPrompts("set", ("a", "\ud800"), (True, False))
    with pytest.raises(MechsafetyError, match=r"^text 2 of 2 in replies holds half a character"):
        ms.neurons.ReplyLikelihood(("Sure.", "\ud800"))


def test_what_is_often_given_in_a_metrics_place_gets_a_remedy(planted):
    model, pairs = planted
    for other, hint in (
        (ms.MapOptions.quick(), "pass options=MapOptions(...)"),
        (lambda logits: logits.mean(), "analyses take no function of logits"),
    ):
        with pytest.raises(MechsafetyError, match=r"expected RefusalLogOdds") as error:
            ms.map_refusal_circuit(model, pairs, other)
        assert hint in str(error.value)


def test_a_word_that_the_tokenizer_does_not_know_is_no_token_of_a_metric():
    made = ms.testbed.planted()
    model = ms.load_model((made.model, made.tokenizer))
    known = made.tokenizer.convert_ids_to_tokens(range(len(made.tokenizer)))
    assert "zebra" not in known and REFUSAL[0] in known
    with pytest.raises(MechsafetyError, match=r"the tokenizer does not know 'zebra'; expected one of its tokens"):
        ms.RefusalLogOdds.of(model, ["zebra"])
    assert len(ms.RefusalLogOdds.of(model, [REFUSAL[0]]).refusal_ids) == 1
