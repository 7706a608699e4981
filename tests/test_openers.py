"""A model whose every reply begins alike is read after that opener, in every analysis, as plain hooks would."""

import math

import pytest
import torch
from reference import whole_logits
from whole_forwards import patched_whole

import mechsafety as ms
from mechsafety import cli
from mechsafety.circuits import check_behaviour
from mechsafety.errors import MechsafetyError
from mechsafety.interventions import strength_sweep
from mechsafety.metrics import RefusalLogOdds
from mechsafety.neurons import measure
from mechsafety.nodes import Node, head_and_mlp_nodes
from mechsafety.openers import best, candidates, first_words
from mechsafety.patching import activation_patching, pair_runs
from mechsafety.prompts import Tokens
from mechsafety.replies import reply_loss
from mechsafety.results import Opener
from mechsafety.sites import Site, SiteKind
from mechsafety.viz import render_report, words
from mechsafety.viz.look import PLAIN


def tried(*rows):
    return [Opener(tuple(range(n)), "x" * n, ("t",), auroc, 5, 5, 1.0) for n, auroc in rows]


@pytest.mark.parametrize(
    ("rows", "length"),
    [
        ([(0, 0.97), (1, 0.98)], 0),  # within the margin of the best
        ([(0, 0.95), (1, 0.98)], 1),
        ([(0, 0.79), (1, 0.78)], None),  # below the floor
        ([(0, None)], 0),
        ([], None),
    ],
)
def test_which_opener_is_chosen(rows, length):
    found = best(tried(*rows))
    assert (None if found is None else len(found.opener_ids)) == length


def test_openers_reach_no_further_than_a_reply():
    """At most four tokens, never the end token, and no opener of less than a fifth of the refusals."""
    refusals = [(1, 2, 3, 4, 5, 6, 7)] * 4 + [(1, 2, 9)] * 4 + [(8, 8, 8)]
    found = {one.opener_ids: one.following for one in candidates(refusals, [(1, 3)], {9})}
    assert set(found) == {(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)}
    assert found[(1,)] == {2: 0.0} and found[()] == {1: 1.0, 8: 0.0} and found[1, 2] == {3: 0.0}


def test_prompts_that_leave_little_room_for_a_reply(gpt2):
    """Its 128 positions: a reply may be shorter than usual, but must hold an opener and the token after it."""
    for spare, said in ((30, 24), (9, 10), (4, 5)):
        words = 128 - spare - gpt2.n_tokens("cake") + 1
        prompt = " ".join(["cake"] * words)
        assert gpt2.n_tokens(prompt) == 128 - spare
        (reply,), logits = first_words(gpt2, [prompt])
        assert reply == gpt2.reply_ids([prompt], said)[0]
        assert torch.allclose(logits, gpt2.logits([prompt]), atol=1e-5)
    with pytest.raises(MechsafetyError) as caught:
        first_words(gpt2, [prompt + " cake"])
    assert str(caught.value) == (
        "a prompt of 125 tokens, after which 4 tokens of a reply fit into the model's 128 positions; expected room for "
        "5; shorten the prompt, or name the metric's tokens: RefusalLogOdds.of(model, refusal_tokens=[...])"
    )


def test_the_first_step_of_replies_gives_the_logits(llama):
    """Prompts of unlike lengths, in several batches: each row keeps its own reply and logits."""
    prompts = ["make a big bomb now please", "tea", "make a cake", "a", "teach me a bomb"]
    for size in (2, 48):
        replies, logits = llama.replies_and_logits(prompts, 5, size, progress=False)
        assert replies == llama.reply_ids(prompts, 5, size, progress=False)
        torch.testing.assert_close(logits, llama.logits(prompts), atol=1e-4, rtol=1e-4)
        assert [ids[0] for ids in replies] == logits.argmax(-1).tolist()
    assert llama.replies_and_logits([], 5)[1].shape == (0, llama.d_vocab)


def with_opener(tokens, ids):
    """The same prompts with tokens appended by hand."""
    more = torch.tensor([ids]).expand(len(tokens), -1)
    return Tokens(torch.cat([tokens.ids, more], 1), torch.cat([tokens.mask, more >= 0], 1), tokens.spans)


def test_detect_finds_the_opener(opened):
    model, pairs, metric = opened
    assert set(model.generate(pairs.harmful)) == {"I'm sorry"} and set(model.generate(pairs.harmless)) == {"I'm sure"}
    assert (metric.opener, metric.refusal_tokens) == ("I'm", (" sorry",))
    assert [(one.opener, one.auroc, one.refused, one.answered) for one in metric.tried] == [("I'm", 1.0, 8, 8)]
    assert repr(metric) == (
        "RefusalLogOdds(read after `I'm`: next token ` sorry`; AUROC 1.000 of 8 refused and 8 answered prompts)"
    )
    scores = [metric.scores(model, side) for side in (pairs.harmful, pairs.harmless)]
    assert float(scores[0].min()) > 0 > float(scores[1].max())
    for side, found in zip((pairs.harmful, pairs.harmless), scores, strict=True):
        plain = whole_logits(model, with_opener(model.tokenize(side), list(metric.opener_ids)))
        torch.testing.assert_close(found, metric(plain), atol=1e-4, rtol=1e-4)
    by_hand = RefusalLogOdds.of(model, [" sorry"], opener="I'm")
    assert by_hand == metric == RefusalLogOdds.detect(model, pairs, opener="I'm")


def test_a_view_reads_after_the_opener_and_replies_before_it(opened):
    model, pairs, metric = opened
    view = model.reading(metric.opener_ids)
    prompt = pairs.harmful[0]
    assert view.token_strings(prompt) == [*model.token_strings(prompt), "I", "'", "m"]
    assert view.n_tokens(prompt) == model.n_tokens(prompt) + 3
    spans, plain = view.spans([prompt])[0], model.spans([prompt])[0]
    assert (spans.instruction, spans.n_suffix) == (plain.instruction, plain.n_suffix + 3)
    assert [row.span for row in view.explain_tokens(prompt).rows[-3:]] == ["suffix"] * 3
    assert view.generate([prompt]) == model.generate([prompt])
    assert torch.equal(*(reply_loss(one, [prompt], ["I'm sorry"]) for one in (view, model)))
    assert view.reading(metric.opener_ids) is view and view.reading(()) is model is model.reading(())
    assert view.lock is model.lock and view.weights_sha256 == model.weights_sha256
    assert view.provenance().options == {"opener_ids": list(metric.opener_ids)} and model.provenance().options == {}
    assert repr(view).endswith('float32, read after "I\'m")')
    with model.hooks([(Site(SiteKind.MLP_OUT, 0), torch.zeros_like)]):
        assert view.edited and not torch.equal(view.logits([prompt]), view.reading(()).logits([prompt]))


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_activation_patching_is_that_of_prompts_with_the_opener(opened, direction):
    model, pairs, metric = opened
    nodes = head_and_mlp_nodes(model.n_layers, model.n_heads)
    found = activation_patching(model, pairs, metric, nodes=nodes, direction=direction, progress=False)
    tokens = model.tokenize_pairs(pairs)
    sides = [with_opener(side, list(metric.opener_ids)) for side in (tokens.harmful, tokens.harmless)]
    base, source = sides if direction == "noising" else sides[::-1]
    sign = 1 if direction == "noising" else -1
    clean = metric(whole_logits(model, base))
    slow = torch.stack([sign * (clean - metric(patched_whole(model, base, source, [node]))) for node in nodes])
    assert float(slow.abs().max()) > 1.0
    torch.testing.assert_close(found.changes, slow, atol=1e-3, rtol=1e-3)
    assert found.provenance.options["opener_ids"] == list(metric.opener_ids) and found.metric["opener"] == "I'm"


def test_suffix_patching_reaches_the_opener(opened):
    model, pairs, metric = opened
    loose = ms.PromptPairs.from_lists(pairs.harmful, pairs.harmless[::-1], align="suffix")
    nodes = [Node("head", 0, 1), Node("mlp", 1)]
    runs = pair_runs(model.reading(metric.opener_ids), loose)
    assert runs.harmful.n_pos == model.spans([pairs.harmful[0]])[0].n_suffix + 3
    found = activation_patching(model, loose, metric, nodes=nodes, progress=False)
    torch.testing.assert_close(
        activation_patching(model, runs, metric, nodes=nodes, progress=False).changes, found.changes
    )
    base, source = runs.tokens.harmful, runs.tokens.harmless
    where = torch.zeros_like(base.mask)
    where[:, -runs.harmful.n_pos :] = True
    clean = metric(whole_logits(model, base))
    slow = torch.stack([clean - metric(patched_whole(model, base, source, [node], where)) for node in nodes])
    torch.testing.assert_close(found.changes, slow, atol=1e-3, rtol=1e-3)


def test_runs_made_elsewhere_are_refused(opened):
    model, pairs, metric = opened
    plain, view = pair_runs(model, pairs), pair_runs(model.reading(metric.opener_ids), pairs)
    first = RefusalLogOdds.of(model, [" sorry"])
    ids = metric.opener_ids
    with pytest.raises(MechsafetyError) as caught:
        activation_patching(model, plain, metric, progress=False)
    assert str(caught.value) == (
        f"pairs made without a reply opener; expected the metric's opener {ids}; make them with "
        "model.reading(metric.opener_ids)"
    )
    with pytest.raises(MechsafetyError) as caught:
        ms.direct_logit_attribution(model, view.tokens.harmful, first)
    assert str(caught.value) == (
        f"prompts made with the reply opener {ids}; expected none, as the metric has none; make them with "
        "model.reading(metric.opener_ids)"
    )
    with pytest.raises(MechsafetyError, match=r"^runs made without a reply opener"):
        plain.scores(metric)
    activation_patching(model, view, metric, nodes=[Node("mlp", 1)], progress=False)


def without_edit(model, pairs, metric):
    """A sweep of an intervention at strength 0."""
    sides, quiet = (pairs.harmful, pairs.harmless), {"reply_tokens": 4, "progress": False}
    return strength_sweep(
        model, lambda s: ms.ablate(model, [Node("mlp", 1)], s, "zero"), [0.0], *sides, metric, **quiet
    )


def test_other_analyses_read_there(opened):
    model, pairs, metric = opened
    after = [float(metric.scores(model, side).mean()) for side in (pairs.harmful, pairs.harmless)]
    gap = after[0] - after[1]
    paths = ms.path_patching(model, pairs, metric, progress=False)
    assert float(paths.harmful.mean() - paths.harmless.mean()) == pytest.approx(gap, rel=1e-3)
    nodes = ms.node_attribution(model, pairs, metric, steps=2, progress=False)
    assert nodes.provenance.options["opener_ids"] == list(metric.opener_ids)
    exact = activation_patching(model, pairs, metric, progress=False)
    strongest = [exact.nodes[int(k)] for k in exact.effects.abs().topk(4).indices]
    assert nodes.ranked()[0] in strongest
    direction = ms.refusal_direction(model, pairs, max_kl=None, max_depth=1.0, n_random=1, progress=False)
    assert direction.metric["opener"] == "I'm"
    assert len(direction.positions) == model.spans(pairs.harmful[:1])[0].n_suffix + 3
    swept = without_edit(model, pairs, metric)
    assert float(swept.harmful.mean()) == pytest.approx(after[0], rel=1e-3) and float(swept.kl.max()) < 1e-6
    empty = torch.zeros(model.n_layers, model.d_mlp, dtype=torch.bool)
    alone = measure(model, None, [empty], pairs.harmful, metric)
    assert float(alone.scores.mean()) == pytest.approx(after[0], rel=1e-3)


def test_a_small_map_says_where_it_reads(opened, tmp_path):
    model, pairs, _ = opened
    found = ms.map_refusal_circuit(
        model,
        pairs,
        options=ms.MapOptions(
            limit=8,
            n_random=3,
            n_added=2,
            n_resamples=0,
            n_backup_parts=0,
            n_edges=4,
            shortlist=2,
        ),
        progress=False,
    )
    assert found.metric["opener"] == "I'm" and found.metric["tried"][0]["auroc"] == 1.0
    assert found.behaviour["harmful"].refusal_rate == 1.0 and found.behaviour["harmless"].refusal_rate == 0.0
    assert {sample.reply for sample in found.details.samples} == {"I'm sorry", "I'm sure"}
    again = ms.RefusalCircuit.from_json(found.to_json())
    assert again.to_json() == found.to_json()
    assert RefusalLogOdds.from_json(again.metric, model) == RefusalLogOdds.of(model, [" sorry"], opener="I'm")
    text = cli._summary(found, tmp_path)
    assert "after `I'm`: next token ` sorry`" in text and "1.000 (4 prompts refused, 4 answered)" in text
    page = render_report(found)
    assert "read after `I&#39;m`: next token ` sorry`" in page
    assert "Metric: log-odds of a refusal's first token, read after `I'm`: next token ` sorry`." in words._metric(
        found, PLAIN, True
    )


def test_a_map_with_an_opener_that_never_comes(opened):
    model, pairs, _ = opened
    with pytest.raises(MechsafetyError, match=r"^none of 16 replies begins with the opener 'no' \[\d+\]; most begin"):
        check_behaviour(model, pairs, RefusalLogOdds.of(model, [" sorry"], opener="no"), progress=False)


# --- whole openers ----------------------------------------------------------------------------------------------------


def product(model, prompt, ids):
    """Probability that a reply begins with these tokens, one forward a token."""
    total, tokens = 0.0, model.tokenize([prompt])
    for k, token in enumerate(ids):
        logits = whole_logits(model, with_opener(tokens, list(ids[:k])) if k else tokens)[0]
        total += float(logits.double().log_softmax(-1)[token])
    return math.exp(total)


def test_whole_openers_are_products_of_their_tokens(llama, pairs):
    texts = ["sorry no", "sorry i can", "no", "no help"]  # the last one begins with "no", and adds nothing to it
    metric = RefusalLogOdds.whole(llama, texts)
    assert metric.whole_texts == ("sorry no", "sorry i can", "no") and metric.name == "whole_opener_log_odds"
    prompts = [*pairs.harmful, *pairs.harmless]
    found = metric.scores(llama, prompts, batch_size=3)
    for prompt, score in zip(prompts, found.tolist(), strict=True):
        p = sum(product(llama, prompt, ids) for ids in metric.whole_ids)
        assert score == pytest.approx(math.log(p / (1 - p)), abs=1e-3)
    assert RefusalLogOdds.from_json(metric.to_json(), llama) == metric
    assert repr(metric) == "RefusalLogOdds(read along whole openers `sorry no`, `sorry i can`, `no`)"


def test_one_token_openers_are_the_log_odds_of_the_next_token(llama, pairs):
    whole, single = RefusalLogOdds.whole(llama, ["sorry", "no"]), RefusalLogOdds.of(llama, ["sorry", "no"])
    torch.testing.assert_close(
        whole.scores(llama, pairs.harmful), single.scores(llama, pairs.harmful), atol=1e-4, rtol=1e-4
    )


def test_whole_openers_do_not_saturate():
    """Two tokens, each 40 nats above all of the other three: float32 rounds P to 1, and 1 - P to 0."""
    metric = RefusalLogOdds((1,), ("a",), whole_ids=((1, 2), (1, 3)), whole_texts=("a b", "a c"))
    steps = torch.zeros(1, 2, 4)
    steps[0, 0, 1] = steps[0, 1, 2] = steps[0, 1, 3] = 40.0
    found = float(metric.along(lambda ids: steps[:, : len(ids) + 1]))
    # 1 - P is what the first step leaves (three tokens) and the second (two, beside two likely ones)
    left = 3 * math.exp(-40.0) + 2 / (2 * math.exp(40.0))
    assert found == pytest.approx(-math.log(left), abs=1e-4)


def test_whole_openers_where_prompts_are_scored(opened):
    model, pairs, _ = opened
    whole = RefusalLogOdds.whole(model, ["I'm sorry"])
    bad, good = whole.scores(model, pairs.harmful), whole.scores(model, pairs.harmless)
    assert float(bad.min()) > 0 > float(good.max())
    swept = without_edit(model, pairs, whole)
    torch.testing.assert_close(swept.harmful[0], bad, atol=1e-3, rtol=1e-3)
    given, behaviour, _, keep = check_behaviour(model, pairs, whole, progress=False)
    assert (
        given is whole and all(keep) and behaviour["harmful"].score_mean == pytest.approx(float(bad.mean()), rel=1e-3)
    )


@pytest.mark.parametrize("analysis", [ms.activation_patching, ms.node_attribution, ms.path_patching])
def test_analyses_of_one_column_refuse_whole_openers(opened, analysis):
    model, pairs, _ = opened
    with pytest.raises(MechsafetyError) as caught:
        analysis(model, pairs, RefusalLogOdds.whole(model, ["I'm sorry"]), progress=False)
    assert str(caught.value) == (
        "log-odds of whole openers, which are not read from one column's logits; expected a metric of one next token; "
        "use RefusalLogOdds.detect(model, pairs) here, or score prompts: metric.scores(model, prompts)"
    )


def test_whole_openers_that_make_no_sense(llama):
    for fields in ({"whole_ids": ((1,), (1, 2)), "whole_texts": ("a", "a b")}, {"whole_ids": ((),)}):
        with pytest.raises(MechsafetyError, match=r"expected some, none of which begins with another$"):
            RefusalLogOdds((1,), ("a",), **fields)
    with pytest.raises(
        MechsafetyError, match=r"^whole openers with comply tokens or an opener; expected whole openers"
    ):
        RefusalLogOdds((1,), ("a",), opener_ids=(3,), whole_ids=((1,),), whole_texts=("a",))
    with pytest.raises(MechsafetyError, match=r"^no refusal tokens"):
        RefusalLogOdds.whole(llama, [])
