"""Torch's switches of the process and the thread change no number of any analysis, and break none."""

import dataclasses
import threading
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
import pandas as pd
import pytest
import torch

import mechsafety as ms
from mechsafety.attribution import sahara, ships
from mechsafety.interventions import scale
from mechsafety.monitors.features import read_prompts
from mechsafety.neurons import ability, greedy_replies
from mechsafety.probes import span_means
from mechsafety.results import Provenance
from mechsafety.settled import settled

MASK = torch.zeros(2, 48, dtype=torch.bool)
MASK[0, :5] = MASK[1, 3] = True
NODES = [ms.Node("head", 1, 2), ms.Node("mlp", 0), ms.Node("neuron", 1, 7)]
QUIET = {"progress": False}


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype, "put back"
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def all_together(*contexts):
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


STATES = {
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "deterministic": deterministic,
}
# all that can hold at once, on every analysis; each by itself on what analyses rest on
TOGETHER = ("inference", "float64", "autocast", "meta", "deterministic")


@pytest.fixture(scope="module")
def things(pairs, log_odds, directed, directed_found, make_hf_model, make_tokenizer):
    plain, aligned = (make_hf_model("llama", layers=2) for _ in range(2))
    with torch.no_grad():
        for block in aligned.model.layers:
            block.mlp.up_proj.weight *= 1.3
    return {
        "model": ms.load_model((plain, make_tokenizer())),
        "second": ms.load_model((aligned, make_tokenizer())),
        "pairs": ms.PromptPairs(pairs.pairs[:2]),
        "four": pairs,
        "shallow": ms.load_model((make_hf_model("llama", layers=1), make_tokenizer())),
        "metric": log_odds,
        "directed": directed,
        "found": directed_found,
        "vector": torch.linspace(-1, 1, 32),
    }


def steered(model, vector, run):
    with ms.steer(model, vector, 0.5, layers=[1]), ms.ablate(model, NODES, 0.5, prompts=["tea", "car"]):
        return run()


def guard(model, pairs):
    prompts = tuple(f"{w} {p}" for p in pairs.harmful + pairs.harmless for w in ("tea", "please", "car"))
    unsafe = tuple(k < 6 for k in range(12))
    made = ms.monitors.SafetyGuard.fit(model, MASK, ms.monitors.LabelledPrompts("set", prompts, unsafe))
    return made.weights, made.predict_all(prompts)


ANALYSES = {
    "tokens": lambda o: o["model"].tokenize(o["pairs"].harmful),
    "logits": lambda o: o["model"].logits(o["pairs"].harmful),
    "generate": lambda o: o["model"].generate(o["pairs"].harmful, 4, progress=False),
    "cache": lambda o: dict(o["model"].cache(o["pairs"].harmful, ["z", "resid", "head_out"]).acts),
    "norm": lambda o: o["model"].frozen_final_norm(o["vector"])(o["vector"]),
    "mlp": lambda o: o["model"].mlp(1, o["vector"][None]),
    "edits": lambda o: steered(o["model"], o["vector"], lambda: o["model"].logits(o["pairs"].harmful)),
    "removal": lambda o: removed(o["model"], o["vector"], o["pairs"]),
    "orthogonalized": lambda o: removed(o["model"], o["vector"], o["pairs"], ms.interventions.orthogonalized),
    "activation_patching": lambda o: ms.activation_patching(o["model"], o["pairs"], o["metric"], nodes=NODES, **QUIET),
    "path_patching": lambda o: ms.path_patching(
        o["model"], o["pairs"], o["metric"], senders=NODES[:2], receivers=[(ms.Node("head", 1, 1), "v")], **QUIET
    ),
    "path_matrix": lambda o: ms.patching.path_matrix(o["model"], o["pairs"], **QUIET),
    "node_attribution": lambda o: ms.node_attribution(o["model"], o["pairs"], o["metric"], steps=2, **QUIET),
    "edge_attribution": lambda o: ms.edge_attribution(o["model"], o["pairs"], o["metric"], steps=2, **QUIET),
    "head_attribution": lambda o: ms.head_attribution(o["model"], o["pairs"], o["metric"], n_masked=1, **QUIET),
    "direct_logit_attribution": lambda o: ms.direct_logit_attribution(o["model"], o["pairs"].harmful, o["metric"]),
    "logit_lens": lambda o: ms.logit_lens(o["model"], o["pairs"], o["metric"], n_positions=2, **QUIET),
    "ships": lambda o: ships(o["model"], o["pairs"].harmful, **QUIET),
    "sahara": lambda o: sahara(o["model"], o["pairs"].harmful, 2, **QUIET),
    "refusal_direction": lambda o: ms.refusal_direction(*o["directed"], layers=[1], n_positions=1, n_random=1, **QUIET),
    "refusal_subspace": lambda o: ms.directions.refusal_subspace(
        o["directed"][0], o["found"], *o["directed"][1:], o["directed"][1], n_directions=1, **QUIET
    ),
    "direction_io": lambda o: ms.directions.direction_io(
        o["directed"][0], o["found"], ms.PromptPairs(o["directed"][1].pairs[:2]), o["directed"][2], **QUIET
    ),
    "repe_direction": lambda o: ms.directions.repe_direction(o["model"], o["four"], **QUIET),
    "projection": lambda o: o["found"].project(o["directed"][0], o["pairs"].harmful),
    "span_means": lambda o: span_means(o["model"], o["pairs"].harmful, [1], ["last"]),
    "strength_sweep": lambda o: ms.interventions.strength_sweep(
        o["model"],
        lambda strength: ms.steer(o["model"], o["vector"], strength, layers=[1]),
        [0.0, 1.0],
        *sides(o["pairs"]),
        o["metric"],
        reply_tokens=2,
        limit=9.0,
        **QUIET,
    ),
    "contrast_neurons": lambda o: ms.neurons.contrast_neurons(o["model"], o["pairs"], **QUIET),
    "safety_neurons": lambda o: ms.safety_neurons(
        o["second"], o["model"], o["pairs"].harmful, max_new_tokens=2, **QUIET
    ),
    "dynamic_patching": lambda o: ms.neurons.dynamic_patching(
        o["model"], o["second"], MASK, o["pairs"].harmful, max_new_tokens=2, limit=9.0, **QUIET
    ),
    "causal_effect_curve": lambda o: ms.neurons.causal_effect_curve(
        o["model"], o["second"], MASK.float(), o["pairs"].harmful, o["metric"], shares=[0.1], n_random=1, **QUIET
    ),
    "ability": lambda o: ability(o["model"], o["second"], [MASK], o["pairs"].harmless, max_new_tokens=2),
    "greedy_replies": lambda o: greedy_replies(o["model"], o["pairs"].harmful, 3),
    "describe_neurons": lambda o: ms.neurons.describe_neurons(o["model"], MASK, o["pairs"].harmful[:2], **QUIET),
    "read_prompts": lambda o: read_prompts(o["model"], o["pairs"].harmful),
    "guard": lambda o: guard(o["model"], o["pairs"]),
    "discover_edges": lambda o: ms.circuits.discover_edges(
        o["shallow"], o["pairs"], o["metric"], steps=2, target=0.3, max_edges=20, **QUIET
    ),
}


def sides(pairs):
    return pairs.harmful[:2], pairs.harmless[:2]


def removed(model, vector, pairs, how=ms.interventions.project_out):
    with how(model, vector):
        return model.logits(pairs.harmful)


def plain(value):
    """What a result holds as nested lists of exact numbers; where it came from left out."""
    if isinstance(value, torch.Tensor):
        assert not value.is_inference() or not value.requires_grad
        return (str(value.dtype), value.device.type, tuple(value.shape), value.detach().numpy().tobytes())
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.tobytes())
    if isinstance(value, pd.DataFrame):
        return value.to_csv()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        frame = value.to_dataframe() if hasattr(value, "to_dataframe") else None
        return plain({k: v for k, v in fields.items() if not isinstance(v, Provenance)}), plain(frame)
    if isinstance(value, Mapping):
        return [(str(key), plain(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return repr(value)


@pytest.fixture(scope="module")
def expected(things):
    made = {}
    return lambda name: made.setdefault(name, plain(ANALYSES[name](things)))


@pytest.mark.parametrize("name", ANALYSES)
def test_no_switch_changes_an_analysis(name, things, expected):
    before = expected(name)
    with all_together(*(STATES[state]() for state in TOGETHER)):
        states = (torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.get_default_dtype())
        found = ANALYSES[name](things)
        assert states == (torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.get_default_dtype())
        assert torch.is_autocast_enabled("cpu") and torch.get_default_device().type == "meta"
    assert plain(found) == before
    assert not things["model"].edited


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", ["logits", "generate", "edits", "edge_attribution"])
def test_each_switch_by_itself(name, state, things, expected):
    before = expected(name)
    with STATES[state]():
        found = ANALYSES[name](things)
    assert plain(found) == before


@pytest.mark.parametrize("states", [TOGETHER, ("no gradients", "float16")], ids=str)
def test_a_model_is_loaded_under_any_switch(states, llama, pairs, log_odds, make_hf_model, make_tokenizer):
    hf = make_hf_model("llama")
    with all_together(*(STATES[state]() for state in states)):
        model = ms.load_model((hf, make_tokenizer()))
    assert torch.equal(model.logits(pairs.harmful), llama.logits(pairs.harmful))
    assert model.dtype == torch.float32 and model.shortcuts == llama.shortcuts
    found = [ms.node_attribution(m, pairs, log_odds, steps=1, progress=False) for m in (model, llama)]
    assert plain(found[0]) == plain(found[1])


def test_weights_made_in_inference_mode(gpt2, pairs, log_odds, make_hf_model, make_tokenizer):
    with torch.inference_mode():
        hf = make_hf_model("gpt2")
        hf.tie_weights()
    model, plain_one = ms.load_model((hf, make_tokenizer())), gpt2
    found = [ms.node_attribution(m, pairs, log_odds, steps=1, progress=False) for m in (model, plain_one)]
    assert plain(found[0]) == plain(found[1])
    # tied weights stay tied
    assert len(list(model.hf_model.parameters())) == len(list(plain_one.hf_model.parameters())), (
        "tied weights stay tied"
    )


def test_what_is_inside_an_edit_is_the_users_own(llama):
    with torch.inference_mode(), ms.steer(llama, torch.ones(32), layers=[0]):
        assert torch.is_inference_mode_enabled()
    with default_dtype(torch.float64), scale(llama, NODES, 2.0):
        assert torch.zeros(1).dtype == torch.float64


def test_the_last_thread_puts_the_dtype_back():
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    seen = []

    def first():
        with settled():
            first_in.set()
            second_in.wait(30)
        first_out.set()

    def second():
        first_in.wait(30)
        with settled():
            second_in.set()
            first_out.wait(30)
            seen.append(torch.get_default_dtype())

    with default_dtype(torch.float64):
        threads = [threading.Thread(target=work) for work in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [torch.float32], "the first thread's end changes nothing for the second"
        assert torch.get_default_dtype() == torch.float64


def interrupted():
    assert torch.zeros(1).dtype == torch.float32 and torch.zeros(1).device.type == "cpu"
    raise KeyboardInterrupt


def test_everything_is_put_back_after_an_exception():
    contexts = (torch.inference_mode(), default_dtype(torch.float64), torch.autocast("cpu"), torch.device("meta"))
    with all_together(*contexts):
        with pytest.raises(KeyboardInterrupt), settled():
            interrupted()
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
        assert torch.zeros(1).dtype == torch.float64 and torch.zeros(1).device.type == "meta"


def test_a_hook_of_a_users_own_training_keeps_its_gradients(gpt2, pairs):
    vector = torch.zeros(32, requires_grad=True)
    with ms.steer(gpt2, vector, layers=[1]):
        gpt2.forward(gpt2.tokenize(pairs.harmful)).square().sum().backward()
    assert vector.grad is not None and float(vector.grad.abs().max()) > 0
