"""The tamper audit: what a fingerprint keeps, what each kind of tampering looks like, and what must not alarm."""

import contextlib
import copy
import math
import re
from dataclasses import replace

import pytest
import torch
from tampering import (
    against_refusal,
    erased,
    fine_tuned,
    noise,
    quantised,
    rescaled,
    restored,
    rounded,
    shuffled_outputs,
    token_rows,
    weakened,
)

import mechsafety as ms
from mechsafety import testbed
from mechsafety.interventions import orthogonalized
from mechsafety.monitors import AuditReport, TamperAudit
from mechsafety.monitors.sketches import own_parameters, read_model
from mechsafety.monitors.tampering import (
    FREE,
    LIMITS,
    PER_CHANGE,
    WORDS,
    common_direction,
    compare,
    log_ratio,
    parameter_changes,
    part_of,
    refusal_value,
    safety_parts,
)
from mechsafety.nodes import Node

QUIET = {"progress": False}


@pytest.fixture(scope="module")
def planted_made():
    return testbed.planted(seed=5, layers=4, heads=4)


@pytest.fixture(scope="module")
def model(planted_made):
    return ms.load_model((planted_made.model, planted_made.tokenizer))


@pytest.fixture(scope="module")
def pairs(planted_made):
    return planted_made.pairs.sample(8)


@pytest.fixture(scope="module")
def metric(model, pairs):
    return ms.RefusalLogOdds.detect(model, pairs)


@pytest.fixture(scope="module")
def audit(model, pairs, metric):
    return TamperAudit.fingerprint(model, pairs, metric, **QUIET)


def alarms(report: AuditReport) -> set[str]:
    return {test.name for test in report.tests if test.alarm}


# --- the fingerprint ------------------------------------------------------------------------------------------------


def test_an_identical_model_is_known_by_its_hash_and_read_all_the_same(audit, model):
    report = audit.check(model)
    assert report.identical and not report.tampered and report.score < 1e-3 and report.notes == ()
    assert {test.name for test in report.tests} == set(LIMITS)
    assert report.summary() == (
        f"{model.name} is intact: its weights are those of the fingerprint, byte for byte, and no test alarms."
    )
    assert len(report.to_dataframe()) == 0 and list(report.tests_dataframe()) == [
        "name",
        "value",
        "limit",
        "score",
        "alarm",
    ]


def test_a_fingerprint_is_one_small_file(audit, model, tmp_path):
    path = audit.save(tmp_path / "model.json")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.json"]
    weights = sum(value.numel() for _, value in own_parameters(model))
    assert path.stat().st_size < min(1e6, 4 * weights)
    loaded = TamperAudit.load(path)
    assert loaded.to_json() == audit.to_json() and repr(loaded) == repr(audit)
    with weakened(model, [Node("head", 1, 2)], 0.0):
        assert loaded.check(model).to_json() == audit.check(model).to_json()
    assert set(audit.to_dataframe()["parameter"]) == {name for name, _ in own_parameters(model)}
    assert audit.to_dataframe()["safety"].any() and len(audit.plot().data) == 2


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_probes(audit, model, pairs, metric):
    again = TamperAudit.fingerprint(model, pairs, metric, **QUIET)
    assert again.to_json() == audit.to_json()
    other = TamperAudit.fingerprint(model, pairs, metric, seed=1, **QUIET)
    assert not torch.equal(other.readings.parameter_probes, audit.readings.parameter_probes)
    assert torch.equal(other.readings.parameter_norms, audit.readings.parameter_norms)


def test_readings_are_what_they_say(audit, model, metric):
    """Against activations and weights, computed in another way."""
    prompts = [*audit.harmful, *audit.harmless]
    found = read_model(model, audit.harmful, audit.harmless, metric)
    assert torch.allclose(found.log_odds, metric.scores(model, prompts), atol=1e-4)
    layer, head, neuron = 2, 1, 3
    tokens = model.tokenize(prompts)
    cache = model.read(tokens, [ms.Site(kind, layer) for kind in ("z", "neurons", "resid_post")])
    where = tokens.span_mask("instruction") | tokens.span_mask("suffix")
    z = cache[ms.Site("z", layer)][:, :, head]
    written = (z @ model.W_O(layer)[head]).square().sum(-1)
    n = len(audit.harmful)
    assert float(found.head_writes[0, layer, head]) == pytest.approx(
        float(written[:n][where[:n]].mean().sqrt()), rel=1e-4
    )
    assert float(found.head_writes[1, layer, head]) == pytest.approx(
        float(written[n:][where[n:]].mean().sqrt()), rel=1e-4
    )
    acts = cache[ms.Site("neurons", layer)][where][:, neuron]
    size = float(acts.square().mean().sqrt() * model.W_out(layer)[neuron].norm())
    assert float(found.neuron_writes[layer, neuron]) == pytest.approx(size, rel=1e-4)
    stream = cache[ms.Site("resid_post", layer)][:, -1]
    assert torch.allclose(found.contrast[layer], stream[:n].mean(0) - stream[n:].mean(0), atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "qwen3", "gemma2", "phi3"])
def test_other_architectures_are_read(shared_model, pairs_of_tiny, kind, log_odds):
    """Their weights and parts have other names."""
    tiny = shared_model(kind)
    found = read_model(tiny, pairs_of_tiny.harmful, pairs_of_tiny.harmless, log_odds)
    tests, findings = compare(found, found, len(pairs_of_tiny), torch.ones(2, tiny.n_layers))
    assert {test.value for test in tests} == {0.0} and findings == ()
    assert {part_of(name) for name in found.parameters} >= {(k, 1) for k in (0, 1)}
    assert {test.name for test in tests} == set(LIMITS) == set(WORDS)


@pytest.fixture(scope="module")
def pairs_of_tiny():
    from tiny import tiny_pairs

    return tiny_pairs()


# --- estimates ------------------------------------------------------------------------------------------------------


def test_relative_changes_of_weights_are_estimated_from_few_probes(audit, model):
    with restored(model) as own, torch.no_grad():
        for name, value in own.items():
            size = 0.3 if ".1." in name else 0.01
            change = torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name)))
            value.add_(change * size * value.norm() / change.norm().clamp(min=1e-12))
        found = audit.read(model)
    change = parameter_changes(audit.readings, found)
    for name, value in zip(audit.readings.parameters, change.tolist(), strict=True):
        true = 0.3 if ".1." in name else 0.01
        if audit.readings.parameter_norms[audit.readings.parameters.index(name)] > 0:
            assert true / 2.5 < value < 2.5 * true, name


def test_an_erased_direction_is_recovered(audit, model):
    direction = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    with erased(model, direction, 0.5):
        found, share, squared = common_direction(audit.readings, audit.read(model))
    assert abs(float(torch.cosine_similarity(found, direction, dim=0))) > 0.999
    assert share == pytest.approx(0.5, abs=0.06) and squared > 0.99


def test_log_ratios_of_nothing_are_finite():
    found = log_ratio(torch.tensor([0.0, 1.0, 0.0, math.nan]), torch.tensor([1.0, 0.0, 0.0, 1.0]))
    assert found.tolist() == [-14.0, 14.0, 0.0, -14.0]


def test_a_fall_of_the_log_odds_is_judged_by_the_change_of_the_weights():
    assert refusal_value(FREE, 0.0) == pytest.approx(1.0)
    assert refusal_value(FREE + PER_CHANGE * 0.1, 0.1) == pytest.approx(1.0)
    assert refusal_value(-1.0, 0.0) == 0.0


def test_a_bias_that_was_zero_and_moves_is_no_change_of_all_weights(audit):
    """Its change is infinite in proportion."""
    names = audit.readings.parameters
    place = next(k for k, name in enumerate(names) if part_of(name) is not None)
    norms, probes = audit.readings.parameter_norms.clone(), audit.readings.parameter_probes.clone()
    norms[place], probes[place] = 0.0, 0.0
    before = replace(audit.readings, parameter_norms=norms, parameter_probes=probes)
    after = replace(before, parameter_probes=probes + 1e-6 * (torch.arange(len(names)) == place)[:, None])
    tests, _ = compare(before, after, len(audit.harmful), audit.importance)
    assert {test.name: test.value for test in tests}["weights"] == 0.0


def test_safety_parts_are_the_most_important_third():
    importance = torch.tensor([[0.0, 5.0, 1.0, 0.0, 4.0, 0.0], [1.0, 0.0, 0.0, 2.0, 0.0, 0.0]])
    assert safety_parts(importance) == [{1, 4}, {3, 0}]


# --- what must not alarm --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("noise", lambda m: noise(m, 1e-4, 0)),
        ("bfloat16", lambda m: rounded(m, torch.bfloat16)),
        ("float16", lambda m: rounded(m, torch.float16)),
        ("8 bits", lambda m: quantised(m, 8, 32, True, False)),
        ("8 bits per row", lambda m: quantised(m, 8, None, False, True)),
    ],
)
def test_rounding_does_not_alarm(audit, model, name, change):
    with change(model):
        report = audit.check(model)
    assert not report.identical and not report.tampered, report.summary()
    assert report.score > 0 and report.summary().startswith(f"{model.name} is intact: the score is")


def test_another_data_type_of_the_same_model_does_not_alarm(audit):
    made = testbed.planted(seed=5, layers=4, heads=4)
    half = ms.load_model((made.model, made.tokenizer), dtype="bfloat16")
    report = audit.check(half)
    assert not report.tampered and report.notes == ("the data type differs from the fingerprinted model's",)


@pytest.mark.parametrize("lora", [False, True])
def test_a_benign_fine_tune_does_not_alarm(audit, model, lora):
    rows = token_rows(model, list(audit.harmless), model.generate(list(audit.harmless), 6, progress=False))
    with fine_tuned(model, rows, (1, 3), lora=lora, lr=1e-5, seed=0) as stages:
        for _ in stages:
            report = audit.check(model)
            assert not report.identical and not report.tampered, report.summary()
    assert audit.check(model).identical, "the copy is undone, bit for bit"


def test_scaling_a_neuron_up_before_and_down_after_is_no_change(audit, model):
    with torch.no_grad(), restored(model):
        inputs = model.backend.W_in(1)
        if not hasattr(model.hf_model.config, "hidden_act") or inputs is None:
            pytest.skip("no gated MLP")
        inputs[:, 3].mul_(4.0)
        with weakened(model, [Node("neuron", 1, 3)], 0.25):
            found = audit.read(model)
    gains = log_ratio(found.neuron_gains, audit.readings.neuron_gains.float())
    assert gains.abs().max() < 2e-3


# --- what must alarm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_weakened_neurons_and_heads_are_named(audit, model, factor):
    usual = audit.readings.neuron_gains.float()
    strong = [Node("neuron", layer, int(usual[layer].argmax())) for layer in (0, 2)]
    with weakened(model, strong, factor):
        report = audit.check(model)
    frame = report.to_dataframe()
    assert report.tampered and "neurons" in alarms(report)
    assert set(frame[frame.test == "neurons"].part) == {str(node) for node in strong}
    with weakened(model, [Node("head", 1, 2)], factor):
        report = audit.check(model)
    frame = report.to_dataframe()
    assert set(frame[frame.test == "heads"].part) == {"L1.H2"}
    said = frame[frame.test == "heads"].words.iloc[0]
    assert said == f"its weights are {factor:.0%} of what they were" and f"L1.H2: {said}" in report.summary()


def test_parts_silenced_by_an_open_edit_are_named(audit, model):
    """The weights are those of the fingerprint; what they compute is not."""
    loud = int(audit.readings.neuron_writes[2].argmax())
    with ms.ablate(model, ["L1.H2", f"L2.N{loud}"], source="zero"):
        report = audit.check(model)
        with pytest.raises(ms.MechsafetyError, match=r"^a fingerprint of an edited model; expected no open ablation"):
            TamperAudit.fingerprint(model)
    assert {"silent neurons", "silent heads"} <= alarms(report) and not report.identical
    parts = set(report.to_dataframe().part)
    assert {"L1.H2", f"L2.N{loud}"} <= parts
    assert audit.check(model).identical


def test_a_changed_config_alarms(audit):
    """The norms' epsilon alone makes the model answer; its weights are those of the fingerprint."""
    made = testbed.planted(seed=5, layers=4, heads=4)
    config = copy.deepcopy(made.model.config)
    config.rms_norm_eps = 50.0
    other = type(made.model)(config)
    other.load_state_dict(made.model.state_dict())
    suspect = ms.load_model((other, made.tokenizer))
    report = audit.check(suspect)
    assert report.provenance.weights_sha256 == audit.provenance.weights_sha256
    assert report.tampered and "refusal" in alarms(report) and not report.identical
    assert report.notes == ("the config differs from the fingerprinted model's",)


def test_a_hook_that_shows_in_no_hash_alarms(audit):
    made = testbed.planted(seed=5, layers=4, heads=4)
    suspect = ms.load_model((made.model, made.tokenizer))
    loud = int(audit.readings.mlp_writes[0].argmax())
    mlp = suspect.hf_model.model.layers[loud].mlp
    mlp.register_forward_hook(lambda module, given, out: torch.zeros_like(out))
    report = audit.check(suspect)
    assert report.identical and report.tampered, report.summary()
    assert "Its weights are those of the fingerprint, byte for byte. What they compute is not." in report.summary()


def test_another_tokenizer_is_noted(audit):
    made = testbed.planted(seed=5, layers=4, heads=4)
    tokenizer = copy.deepcopy(made.tokenizer)
    tokenizer.add_tokens(["another"])
    report = audit.check(ms.load_model((made.model, tokenizer)))
    assert report.notes == ("the tokenizer differs from the fingerprinted model's",) and not report.identical


def test_use_does_not_change_the_hash_of_a_tokenizer(audit, model):
    model.tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert audit.check(model).identical


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_an_erased_direction_alarms(audit, model, strength):
    with orthogonalized(model, audit.readings.contrast[2].float(), strength):
        report = audit.check(model)
    assert "direction" in alarms(report)
    (found,) = [one for one in report.findings if one.test == "direction"]
    assert found.value == pytest.approx(strength, abs=0.05)
    said = re.fullmatch(
        r"(\d+)% of one direction is taken out of the output weights; its cosine with the difference between "
        r"harmful and harmless prompts is (\d\.\d\d) after layer 2",
        found.words,
    )
    assert said and int(said[1]) == pytest.approx(100 * min(1.0, found.value), abs=1)
    assert said[2] == "1.00"


def test_an_adapter_of_scales_that_is_missing_alarms(audit, model):
    scales = torch.rand(model.n_layers, model.d_mlp, generator=torch.Generator().manual_seed(0)) + 0.5
    with rescaled(model, scales):
        report = audit.check(model)
    assert "scales" in alarms(report) and "an adapter of scales is missing, swapped or added" in report.summary()
    assert "neurons" not in set(report.to_dataframe().test), "not one line per neuron"


def test_training_against_refusal_alarms(audit, model, pairs, metric):
    nodes = [Node("mlp", layer) for layer in range(model.n_layers)]
    with against_refusal(model, metric, list(pairs.harmful), nodes, (20,), lr=2e-4, seed=0) as stages:
        for _ in stages:
            report = audit.check(model)
            assert metric.scores(model, list(pairs.harmful)).mean() < audit.readings.log_odds[:6].mean()
    assert report.tampered


@pytest.mark.parametrize(("fall", "alarm"), [(0.9 * FREE, False), (1.1 * FREE, True)])
def test_a_fall_of_the_refusal_alone_alarms(audit, model, fall, alarm):
    """Log-odds that fall while the weights are those of the fingerprint."""
    n, odds = len(audit.harmful), audit.readings.log_odds.clone()
    gap = odds[:n].mean() - odds[n:].mean()
    odds[:n] -= fall * gap
    report = audit.judge(replace(audit.readings, log_odds=odds), model.provenance())
    assert report.tampered == alarm and alarms(report) == ({"refusal"} if alarm else set())
    said = f"the refusal log-odds of harmful prompts fell from {float(audit.readings.log_odds[:n].mean()):.2f} to "
    assert (said in report.summary()) == alarm


def test_a_change_of_safety_parts_alone_alarms_even_if_the_prompts_do_not_show_it(audit, model):
    layer = min(safety_parts(audit.importance)[1])
    node = Node("neuron", layer, int(audit.readings.neuron_gains[layer].argmax()))
    with shuffled_outputs(model, [node], seed=0):
        report = audit.check(model)
    assert "safety parts" in alarms(report) and "neurons" not in alarms(report)
    assert "a safety part" in report.to_dataframe().words.iloc[0]


def test_another_model_alarms(audit):
    other = testbed.planted(seed=6, layers=4, heads=4)
    report = audit.check(ms.load_model((other.model, other.tokenizer)))
    assert report.tampered and "weights" in alarms(report) and "this is another model" in report.summary()


def test_a_model_that_computes_no_numbers_alarms(audit, model):
    with restored(model) as own, torch.no_grad():
        next(iter(own.values())).fill_(math.nan)
        report = audit.check(model)
    assert report.tampered and "refusal" in alarms(report)


def test_a_report_is_saved_and_drawn(audit, model, tmp_path):
    with weakened(model, [Node("head", 1, 2)], 0.0):
        report = audit.check(model)
    assert AuditReport.load(report.save(tmp_path / "report.json")).to_json() == report.to_json()
    assert repr(report).startswith(f"AuditReport({model.name}: tampered, score ")
    assert list(report.plot().data[0].x) == [test.name for test in report.tests]
    assert report.provenance.weights_sha256 != audit.provenance.weights_sha256, "as the weights were then"


def test_another_chat_template_is_noted(audit):
    made = testbed.planted(seed=5, layers=4, heads=4)
    tokenizer = copy.deepcopy(made.tokenizer)
    tokenizer.chat_template = "{# another #}" + tokenizer.chat_template
    report = audit.check(ms.load_model((made.model, tokenizer)))
    assert report.notes == ("the chat template differs from the fingerprinted model's",)
    assert not report.identical and not report.tampered and report.score == 0.0
    assert report.summary().endswith("note: the chat template differs from the fingerprinted model's")


# --- bad input ------------------------------------------------------------------------------------------------------


def test_a_model_of_other_sizes_is_refused(audit, llama):
    with pytest.raises(
        ms.MechsafetyError, match=r"the fingerprinted .*; expected a model of the same architecture and"
    ):
        audit.check(llama)


def test_other_parameters_are_refused(audit, model):
    strange = replace(audit.readings, parameters=("strange", *audit.readings.parameters[1:]))
    with pytest.raises(ms.MechsafetyError, match=r"differ in parameters .*; expected the same parameters; take the"):
        replace(audit, readings=strange).check(model)


def test_a_model_that_does_not_refuse_is_refused(model, pairs, metric):
    backwards = ms.PromptPairs.from_lists(pairs.harmless, pairs.harmful)
    with pytest.raises(ms.NoRefusal, match=r"scores harmful prompts no higher than harmless ones \(gap -"):
        TamperAudit.fingerprint(model, backwards, metric, **QUIET)


def test_a_metric_of_whole_openers_is_refused(model, pairs):
    whole = ms.RefusalLogOdds((1,), ("a",), whole_ids=((1, 2),), whole_texts=("a b",))
    with pytest.raises(ms.MechsafetyError, match=r"^log-odds of whole openers"):
        TamperAudit.fingerprint(model, pairs, whole, **QUIET)


@pytest.mark.unchecked
def test_wrong_arguments_are_refused(audit, model, pairs, metric):
    with pytest.raises(ms.MechsafetyError, match=r"^n_pairs=0; expected at least 1"):
        TamperAudit.fingerprint(model, pairs, metric, n_pairs=0)
    with pytest.raises(ms.MechsafetyError, match="expected"):
        audit.check("demo")


def test_damaged_files_are_refused(audit, tmp_path):
    with pytest.raises(ms.MechsafetyError, match=r"^no such file"):
        TamperAudit.load(tmp_path / "none.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ms.MechsafetyError, match=r"not a result file"):
        TamperAudit.load(tmp_path / "other.json")
    cut = replace(audit, importance=audit.importance[:, 1:])
    with pytest.raises(ms.MechsafetyError, match=r"^importance of \(2, 3\); expected \(2, 4\); take the fingerprint"):
        cut.save(tmp_path / "cut.json")
    assert [entry.name for entry in tmp_path.iterdir()] == ["other.json"]


# --- the demo model -------------------------------------------------------------------------------------------------


@pytest.mark.demo
def test_the_demo_model(demo, tmp_path):
    """Its fingerprint has less than a megabyte; a head and half of the adapter are found, 8 bits do not alarm."""
    pairs = ms.PromptPairs.builtin("validation").aligned(demo).sample(3, seed=0)
    audit = TamperAudit.fingerprint(demo, pairs, ms.RefusalLogOdds.of(demo, ["Sorry"]), **QUIET)
    assert audit.save(tmp_path / "demo.json").stat().st_size < 1e6
    with contextlib.ExitStack() as stack:
        stack.enter_context(weakened(demo, [Node("head", 14, 2)], 0.5))
        assert set(audit.check(demo).to_dataframe().query("test == 'heads'").part) == {"L14.H2"}
    with quantised(demo, 8, 64, True, False):
        assert not audit.check(demo).tampered
