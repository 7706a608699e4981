"""Relocation: against models whose layers are known, by whole hybrid models, and with backups that take over."""

from contextlib import contextmanager

import pytest
import torch

import mechsafety as ms
from mechsafety import testbed
from mechsafety.errors import MechsafetyError
from mechsafety.replies import ReplyKinds
from mechsafety.robustness import Relocation, relocation
from mechsafety.sites import Site, SiteKind

QUIET = {"progress": False}
FEW = {"max_new_tokens": 4, "limit": 99.0, "progress": False}


@pytest.fixture(scope="module")
def doubled():
    """Makes copies of one planted model: its decision head is in layer 1, with a backup in layer 3."""
    made = testbed.planted(seed=2, layers=6, heads=4, decoys=2, backups=1)
    (primary, backup), pairs = made.truth.backups[0], made.pairs.sample(8)
    assert (primary.layer, backup.layer) == (1, 3)

    def copy(*lost):
        one = testbed.planted(seed=2, layers=6, heads=4, decoys=2, backups=1)
        size = one.model.config.head_dim
        for head in lost:
            start = head.index * size
            one.model.model.layers[head.layer].self_attn.o_proj.weight.data[:, start : start + size] = 0.0
        return ms.load_model((one.model, one.tokenizer))

    whole = copy()
    return copy, whole, primary, backup, pairs.harmful, ms.RefusalLogOdds.detect(whole, pairs)


# --- which layer ----------------------------------------------------------------------------------------------------


def test_the_layer_of_an_edit_is_found_in_memory_and_in_another_model(doubled, tmp_path):
    copy, model, primary, backup, prompts, metric = doubled
    lost = lambda: ms.ablate(model, [primary, backup], source="zero")  # noqa: E731
    found = relocation(model, lost, prompts, metric, **FEW)
    assert not model.edited and found.layers == tuple(range(6))
    assert found.ceiling.share("refuses") == 1.0 and found.floor.share("refuses") == 0.0
    # one of the two heads suffices, and the first is in layer 1
    assert [one.share("refuses") for one in found.patched] == [0, 1, 1, 1, 1, 1]
    assert found.half() == (1, (1, 1)) == found.half("log_odds")
    assert [value for value, _ in found.recovered()] == [0, 1, 1, 1, 1, 1]
    assert found.self_patch.kinds == found.floor.kinds and torch.equal(found.self_log_odds, found.floor_log_odds)
    # after the last layer only the final norm and the unembedding are left, which no edit has changed
    assert found.log_odds[-1].tolist() == pytest.approx(found.ceiling_log_odds.tolist(), abs=1e-4)
    assert found.ceiling_log_odds.tolist() == pytest.approx(metric.scores(model, prompts).tolist(), abs=1e-4)
    base = copy(primary, backup)
    other = relocation(model, base, prompts, metric, **FEW)
    assert other.log_odds.flatten().tolist() == pytest.approx(found.log_odds.flatten().tolist(), abs=1e-3)
    assert [one.kinds for one in other.patched] == [one.kinds for one in found.patched]
    assert other.edited.weights_sha256 != other.provenance.weights_sha256 == found.edited.weights_sha256
    assert "the first layer that recovers half is 1 (95 % 1 to 1)" in repr(found)
    frame = found.to_dataframe()
    assert list(frame.run) == ["floor", "ceiling", "self-patch"] + ["patched"] * 6
    assert list(frame.layer[3:]) == list(range(6)) and frame.layer[:3].isna().all()
    assert frame.refused_low.le(frame.refused).all() and len(found.plot().data) == 6
    again = Relocation.load(found.save(tmp_path / "found"))
    assert repr(again) == repr(found) and again.to_dataframe().equals(frame)


def test_the_reverse_direction_loses_refusals_from_the_edited_layer_on(doubled):
    _, model, primary, backup, prompts, metric = doubled
    found = relocation(
        model, lambda: ms.ablate(model, [primary, backup], source="zero"), prompts, metric, into="aligned", **FEW
    )
    assert found.floor.share("refuses") == 1.0 and found.ceiling.share("refuses") == 0.0
    # the aligned model's layer 3 has the backup: refusals are lost only with edited values after it
    assert [one.share("refuses") for one in found.patched] == [1, 1, 1, 0, 0, 0]
    assert found.half()[0] == 3


def test_patched_replies_are_those_of_a_hybrid_model(make_model, make_hf_model, make_tokenizer, pairs, log_odds):
    """Layers of one model up to a layer, of the other from there on: the same tokens from plain generation."""
    aligned, edited = make_model("llama", seed=0), make_model("llama", seed=1)
    prompts = pairs.harmful
    found = relocation(aligned, edited, prompts, log_odds, max_new_tokens=5, limit=99.0, batch_size=3, **QUIET)
    for layer in range(3):
        hybrid = make_hf_model("llama", seed=1)
        hybrid.model.embed_tokens.load_state_dict(make_hf_model("llama", seed=0).model.embed_tokens.state_dict())
        hybrid.model.layers[: layer + 1].load_state_dict(
            make_hf_model("llama", seed=0).model.layers[: layer + 1].state_dict()
        )
        one = ms.load_model((hybrid, make_tokenizer()))
        assert found.log_odds[layer].tolist() == pytest.approx(log_odds.scores(one, prompts).tolist(), abs=1e-3)
        said = one.generate(prompts, 5, progress=False)
        assert list(found.patched[layer].kinds) == list(ms.judge_replies(aligned, prompts, said, limit=99.0).kinds)
        loss = ms.replies.reply_loss(aligned, prompts, said)
        assert found.patched[layer].loss.tolist() == pytest.approx(loss.tolist(), abs=1e-3, nan_ok=True)


def test_layers_can_be_chosen_and_edits_of_the_stream_are_replaced_too(shared_model, pairs, log_odds):
    """A vector that is added after layer 1 is part of that layer's output, which the donor's values replace."""
    model = shared_model("llama")
    vector = torch.linspace(-2, 2, model.d_model)

    @contextmanager
    def steered():
        with model.hooks([(Site(SiteKind.RESID_POST, 1), lambda tensor: tensor + vector)]):
            yield

    found = relocation(model, steered, pairs.harmful, log_odds, layers=[2, 1, 0], **FEW)
    assert found.layers == (0, 1, 2)
    assert found.log_odds[0].tolist() == pytest.approx(found.floor_log_odds.tolist(), abs=1e-4)
    assert found.log_odds[1].tolist() == pytest.approx(found.ceiling_log_odds.tolist(), abs=1e-4)
    assert found.half("log_odds")[0] == 1
    # neither refuses: no way from floor to ceiling
    assert found.half() == (None, (None, None)) and "no layer recovers half" in repr(found)
    assert found.to_dataframe().recovered[3:].isna().all()


def test_a_metric_with_an_opener_reads_after_it(opened):
    model, pairs, metric = opened
    found = relocation(model, lambda: ms.ablate(model, "L1.H2", source="zero"), pairs.harmful, metric, **FEW)
    assert found.ceiling_log_odds.tolist() == pytest.approx(metric.scores(model, pairs.harmful).tolist(), abs=1e-3)
    assert found.log_odds[2].tolist() == pytest.approx(found.ceiling_log_odds.tolist(), abs=1e-3)
    assert found.log_odds[0].tolist() == pytest.approx(found.floor_log_odds.tolist(), abs=1e-3)


# --- the trap -------------------------------------------------------------------------------------------------------


def test_after_work_on_the_mapped_place_alone_the_mechanism_is_in_the_backup(doubled):
    """The hardened model refuses as before, so that rates show nothing; the relocation shows the later layer."""
    copy, model, primary, backup, prompts, metric = doubled
    base = copy(primary, backup)
    before = relocation(model, base, prompts, metric, **FEW)
    # the mapped head no longer does the work, as after training to refuse without it; its backup does
    hardened = copy(primary)
    after = relocation(hardened, base, prompts, metric, **FEW)
    assert before.ceiling.share("refuses") == after.ceiling.share("refuses") == 1.0
    assert before.half()[0] == primary.layer and after.half()[0] == backup.layer
    assert before.moved(after) == (2, (2.0, 2.0)) and after.moved(before)[0] == -2
    assert before.moved(before) == (0, (0.0, 0.0))
    decoy = relocation(copy(*_decoys(doubled)), base, prompts, metric, **FEW)
    assert before.moved(decoy) == (0, (0.0, 0.0)), "a decoy does no work, so that nothing moves without it"
    fewer = relocation(model, base, prompts[:4], metric, layers=[1], **FEW)
    with pytest.raises(MechsafetyError, match="two relocations with other prompts; expected the same prompts in both"):
        before.moved(fewer)


def _decoys(doubled):
    made = testbed.planted(seed=2, layers=6, heads=4, decoys=2, backups=1)
    found = [node for node in made.truth.decoys if node.kind == "head"]
    assert found
    return found


# --- by hand --------------------------------------------------------------------------------------------------------


def _by_hand(patched, floor=(0, 0, 0, 0), ceiling=(1, 1, 1, 1)):
    from mechsafety.results import Provenance

    def kinds(flags):
        return ReplyKinds(tuple("refuses" if flag else "answers" for flag in flags), torch.zeros(len(flags)), 9.0)

    def scores(flags):
        return torch.tensor(flags).float()

    about = Provenance("tiny", "0" * 64, "float32", "cpu", "0" * 64, options={"prompts_sha256": "a"})
    return Relocation(
        about, about, {}, "edited", tuple(range(len(patched))), kinds(floor), kinds(ceiling), kinds(floor),
        tuple(map(kinds, patched)), scores(floor), scores(ceiling), scores(floor), torch.stack([*map(scores, patched)]),
    )  # fmt: skip


def test_shares_and_half_by_hand():
    found = _by_hand([(0, 0, 0, 0), (1, 0, 0, 0), (1, 1, 0, 0), (1, 1, 1, 1)])
    assert [value for value, _ in found.recovered()] == [0, 0.25, 0.5, 1]
    first, (low, high) = found.half()
    assert first == 2 and low == 1 and high == 3, "with other prompts it is a layer earlier or later"
    down = _by_hand([(1, 1, 1, 1), (1, 0, 0, 0)], floor=(1, 1, 1, 1), ceiling=(0, 0, 0, 0))
    assert [value for value, _ in down.recovered()] == [0, 0.75] and down.half()[0] == 1
    never = _by_hand([(0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0)])
    assert never.half() == (None, (None, None)) and found.moved(never)[0] is None
    assert found.moved(never)[1][0] >= 1, "never counts as one layer after the last"
    with pytest.raises(MechsafetyError, match=r"measure='x'; expected one of \('refusals', 'log_odds'\)"):
        found.half("x")
    with pytest.raises(MechsafetyError, match="two relocations with other layers"):
        found.moved(down)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.unchecked
def test_bad_input(llama, make_model, pairs, log_odds):
    prompts = pairs.harmful

    def refused(message, edited, **options):
        with pytest.raises(MechsafetyError, match=message):
            relocation(llama, edited, prompts, log_odds, **{**FEW, **options})

    lost = lambda: ms.ablate(llama, "L1.MLP", source="zero")  # noqa: E731
    refused("edited is of type str; expected a LensModel, or a function that returns a context manager", "base")
    refused("edited returns an object of type int", lambda: 3)
    refused("edited cannot be called without arguments", lambda nodes: nodes)
    refused("the same model object was given twice", llama)
    refused(r"has \(layers, neurons per layer, tokens\)", make_model("gpt2"))
    refused(r"layers \[3\]; expected at least one, from 0 to 2", lost, layers=[3])
    refused(r"layers \[\]", lost, layers=[])
    refused(r"into='both'; expected one of \('edited', 'aligned'\)", lost, into="both")
    refused("max_new_tokens=0", lost, max_new_tokens=0)
    nothing = lambda: ms.ablate(llama, "L1.MLP", 0.0, source="zero")  # noqa: E731
    refused("both models give the same replies and the same log-odds to these prompts", nothing)
    with lost(), pytest.raises(MechsafetyError, match="an intervention is on"):
        relocation(llama, lost, prompts, log_odds, **FEW)
    assert not llama.edited


def test_an_edit_that_is_never_the_same_fails_the_self_patch(llama, pairs, log_odds):
    @contextmanager
    def noisy():
        with llama.hooks([(Site(SiteKind.MLP_OUT, 2), lambda tensor: tensor + torch.randn_like(tensor))]):
            yield

    with pytest.raises(MechsafetyError, match="with its own values put back is not the edited model"):
        relocation(llama, noisy, pairs.harmful, log_odds, layers=[0], **FEW)
    assert not llama.edited
