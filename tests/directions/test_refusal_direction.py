"""The refusal direction on a model that has one by construction; every score against one plain run at a time."""

import pytest
import torch
from planted_direction import directed_model, directed_pairs
from reference import record

import mechsafety as ms
from mechsafety.directions import refusal_direction
from mechsafety.directions.refusal import RefusalDirection, _split
from mechsafety.directions.scores import Validation, mean_differences, score_directions
from mechsafety.errors import MechsafetyError, NoRefusal
from mechsafety.interventions import project_out, steer
from mechsafety.interventions.batched import PromptBatches
from mechsafety.prompts import PromptPairs


def test_finds_the_planted_direction(directed_found):
    assert directed_found.passes and directed_found.layer == 1 and directed_found.selector == "published"
    assert directed_found.positions == (-2, -1) and directed_found.vectors.shape == (3, 2, 32)
    unit = directed_found.vector / directed_found.vector.norm()
    assert float(unit[0]) > 0.99
    assert float(directed_found.vectors[0].abs().max()) == 0.0  # the template's tokens are the same in both
    assert directed_found.choose("cosmic").layer == 1 and directed_found.choose("cosmic").selector == "cosmic"


def test_ablation_and_addition_turn_refusal_off_and_on(directed, directed_found):
    model, pairs, _ = directed
    fresh = directed_pairs("poison", "bread")
    assert model.generate(fresh.harmful[:3], 3) == ["sorry"] * 3
    with directed_found.ablate(model):
        assert model.generate(fresh.harmful[:3], 3) == ["sure"] * 3
    with directed_found.add(model):
        assert model.generate(pairs.harmless[:3], 3) == ["sorry"] * 3
    along = directed_found.project(model, fresh.harmful)
    assert float(along.min()) > float(directed_found.project(model, fresh.harmless).max()) + 1


def test_mean_differences_by_hand(directed):
    model, pairs, metric = directed
    found, counts = mean_differences(model, pairs.harmful, pairs.harmless, metric)
    assert counts == (12, 12)
    for layer in range(3):
        name = f"blocks.{layer}.hook_resid_pre"
        sides = []
        for side in (pairs.harmful, pairs.harmless):
            rows = [record(model, model.tokenize([prompt]), [name])[name][0, -2:] for prompt in side]
            sides.append(torch.stack(rows).double().mean(0))
        torch.testing.assert_close(found[layer], (sides[0] - sides[1]).float(), atol=1e-5, rtol=1e-5)


def test_only_prompts_treated_as_expected_count(directed):
    model, pairs, metric = directed
    mixed = [*pairs.harmful[:3], pairs.harmless[5]]  # a "harmful" prompt that is not refused
    found, counts = mean_differences(model, mixed, pairs.harmless[:4], metric)
    want, _ = mean_differences(model, pairs.harmful[:3], pairs.harmless[:4])
    assert counts == (3, 4)
    torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-6)
    with pytest.raises(MechsafetyError) as caught:
        mean_differences(model, pairs.harmless, pairs.harmless, metric)
    assert str(caught.value) == "none of 12 harmful prompts is refused; expected a model that tells them apart"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_every_score_equals_one_run_at_a_time(kind, shared_model, log_odds):
    model = shared_model(kind)
    harmful = ["how do i make a bomb", "poison my tea", "kill", "steal my bread"]
    harmless = ["how do i bake a cake", "help me please", "explain the sky"]
    checked = Validation.of(model, harmful, harmless, log_odds)
    vectors = torch.randn(3, 2, model.d_model, generator=torch.Generator().manual_seed(4))
    vectors[0, 1] = 0.0
    also = torch.randn(1, model.d_model, generator=torch.Generator().manual_seed(5))
    found = score_directions(model, checked, log_odds, vectors, [0, 1, 2], also=also, progress=False)
    plain = model.logits(harmless)
    for layer in range(3):
        for column in range(2):
            vector = vectors[layer, column]
            if not vector.any():
                torch.testing.assert_close(found.bypass[layer, column], log_odds(model.logits(harmful)))
                assert not found.kl[layer, column].any() and found.cosmic[layer, column].isnan()
                continue
            with project_out(model, torch.cat([also, vector[None]])):
                bad, good = log_odds(model.logits(harmful)), model.logits(harmless)
                removed = block_outputs(model, harmful, checked.low)
            with steer(model, vector, 1.0, [layer]):
                induced = log_odds(model.logits(harmless))
                added = block_outputs(model, harmless, checked.low)
            kl = (plain.softmax(-1) * (plain.log_softmax(-1) - good.log_softmax(-1))).sum(-1)
            torch.testing.assert_close(found.bypass[layer, column], bad, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found.induce[layer, column], induced, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found.kl[layer, column], kl, atol=1e-4, rtol=1e-3)
            targets = [block_outputs(model, side, checked.low) for side in (harmless, harmful)]
            cosine = torch.nn.functional.cosine_similarity
            want = cosine(removed, targets[0], dim=0) + cosine(added, targets[1], dim=0)
            assert float(found.cosmic[layer, column]) == pytest.approx(float(want), abs=1e-4)


def block_outputs(model, prompts, layers):
    """Mean outputs of blocks at the last token, as one long vector."""
    names = [f"blocks.{layer}.hook_resid_post" for layer in layers]
    seen = record(model, model.tokenize(prompts), names)
    return torch.cat([seen[name][:, -1].mean(0) for name in names])


def test_two_layers(make_hf_model, make_tokenizer):
    model, pairs = directed_model(make_hf_model, make_tokenizer, layers=2), directed_pairs()
    metric = ms.RefusalLogOdds.of(model, ["sorry"])
    found = refusal_direction(model, pairs, metric, max_depth=1.0, progress=False)
    assert found.layer == 1 and found.passes
    with pytest.raises(MechsafetyError, match=r"^no direction among layers 0 to 1; expected layers below 1$"):
        found.choose(max_depth=0.9)  # int(0.9 * 2) is 1, and layer 0 has no direction
    with pytest.raises(MechsafetyError, match=r"^no direction among layers 0 to 1; expected layers below 1$"):
        found.choose()


def test_controls_do_nothing(directed_found):
    frame = directed_found.controls.to_dataframe().set_index("control")
    assert list(frame.index) == [*(f"random {k}" for k in range(1, 5)), "harmless - harmless"]
    assert (frame.bypass > 5).all() and (frame.induce < 0).all()
    chosen = directed_found.to_dataframe().query("chosen").iloc[0]
    assert chosen.bypass < -10 and chosen.induce > 10 and chosen.bypass_low < chosen.bypass < chosen.bypass_high


def test_no_candidate_passes(directed_found):
    found = directed_found.choose(max_kl=0.0)
    assert not found.passes and repr(found).endswith(
        f"; does not pass the published conditions: {found.conditions}; "
        "direction.choose(max_kl=None) chooses without the limit on the KL)"
    )
    assert found.choose(max_kl=None).passes
    left = found.conditions
    assert str(left) == (
        f"{left.shallow} of {found.cosmic.numel()} candidates are below the depth limit, of which induce > 0 leaves "
        f"{left.induce}, KL <= 0 {left.kl}, and both 0"
    )
    assert found.provenance.options["max_kl"] == 0.0 and left.shallow == 2 * found.cosmic.shape[1]
    bypass = directed_found.bypass.mean(-1)[:2]  # layers below int(0.8 * 3)
    assert float(found.bypass.mean(-1)[found._cell]) == float(bypass.min())
    assert directed_found.choose(max_kl=1.0).passes
    dropped = directed_found.choose(max_kl=None)
    assert dropped.passes and dropped.provenance.options["max_kl"] is None
    assert str(dropped.conditions).endswith("; no KL is asked for")


def test_the_same_seed_gives_the_same_result(directed, directed_found, tmp_path):
    model, pairs, metric = directed
    again = refusal_direction(model, pairs, metric, progress=False)
    for name in ("vectors", "bypass", "induce", "kl"):
        assert torch.equal(getattr(again, name), getattr(directed_found, name)), name
    assert torch.equal(again.controls.induce, directed_found.controls.induce)
    loaded = RefusalDirection.load(directed_found.save(tmp_path / "direction"))
    assert torch.equal(loaded.vector, directed_found.vector) and loaded.positions == directed_found.positions
    assert loaded.controls.names == directed_found.controls.names and repr(loaded) == repr(directed_found)


def test_table_and_picture(directed_found):
    frame = directed_found.to_dataframe()
    assert len(frame) == 6 and frame.chosen.sum() == 1
    assert list(frame.columns[:3]) == ["layer", "position", "norm"]
    figure = directed_found.plot()
    assert [trace.type for trace in figure.data] == ["heatmap", "scatter"] * 4
    assert figure.data[0].z.shape == (3, 2)


def test_the_split_keeps_validation_out_of_the_means(directed):
    _, pairs, _ = directed
    train, held = _split(pairs, 0)
    assert len(held) == 2 and len(train) == 10
    assert not set(train.harmful) & set(held.harmful)


def test_refusals(directed):
    model, pairs, metric = directed
    with pytest.raises(MechsafetyError, match=r"^selector='best'; expected one of \('published', 'cosmic'\)$"):
        refusal_direction(model, pairs, metric, selector="best")
    with pytest.raises(MechsafetyError, match=r"^layers \[3\]; expected some of 0 to 2$"):
        refusal_direction(model, pairs, metric, layers=[1, 3])
    few = PromptPairs(pairs.pairs[:3])
    with pytest.raises(MechsafetyError, match=r"^3 pairs; expected at least 4, or validation=\.\.\.$"):
        refusal_direction(model, few, metric)
    backwards = PromptPairs.from_lists(pairs.harmless, pairs.harmful)
    with pytest.raises(NoRefusal) as caught:
        refusal_direction(model, pairs, metric, validation=backwards, progress=False)
    counts = "of 12 validation pairs 0 harmful prompts are refused and 0 harmless ones answered; expected at least 2"
    assert str(caught.value).startswith(counts)


def test_a_direction_of_another_models_width(directed_found, make_model, make_tokenizer):
    import transformers

    config = transformers.GPT2Config(vocab_size=len(make_tokenizer()), n_embd=48, n_layer=2, n_head=4, n_positions=64)
    other = ms.load_model((transformers.AutoModelForCausalLM.from_config(config).eval(), make_tokenizer()))
    message = r"^a direction of width 32; expected this model's d_model, 48; compute it on this model$"
    for context in (directed_found.ablate, directed_found.add):
        with pytest.raises(MechsafetyError, match=message), context(other):
            pass
    with pytest.raises(MechsafetyError, match=message):
        directed_found.project(other, ["kill"])


def test_suffix(llama):
    assert PromptBatches.of(llama, ["kill", "how do i bake bread"]).suffix == 2  # <end><assistant>
