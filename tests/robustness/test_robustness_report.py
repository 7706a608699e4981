"""The robustness report: its numbers are those of the analyses, and its verdict follows from them."""

import re
from dataclasses import replace

import pytest
import torch

import mechsafety as ms
from mechsafety import testbed
from mechsafety.errors import MechsafetyError
from mechsafety.replies import ReplyKinds
from mechsafety.robustness import (
    RobustnessOptions,
    RobustnessReport,
    concentration,
    entanglement,
    fragility,
    redundancy,
    refusal_depth,
    robustness_report,
)

QUIET = {"progress": False}
FEW = RobustnessOptions(pairs=8, n_random=2, reply_tokens=6, opener="sure", depth_tokens=3)


@pytest.fixture(scope="module")
def planted():
    """A planted model without backups: its detection head alone is a single point of failure."""
    made = testbed.planted(seed=3, layers=4, heads=4, decoys=2)
    model = ms.load_model((made.model, made.tokenizer))
    parts = [node for node in made.truth.nodes if made.truth.roles[node] in ("detection", "decision", "production")]
    return made, model, parts, ms.RefusalLogOdds.detect(model, made.pairs.sample(8))


@pytest.fixture(scope="module")
def report(planted):
    made, model, parts, metric = planted
    return robustness_report(model, parts, made.pairs, metric, base=model, options=FEW, **QUIET)


def test_the_numbers_are_those_of_the_analyses(planted, report):
    made, model, parts, metric = planted
    own = made.pairs.aligned(model).sample(8, 0)
    assert report.parts == tuple(parts) and not report.mapped and report.n_candidates == 4 * 5
    curve = fragility(model, parts, own, metric, n_random=2, replies=True, reply_tokens=6, **QUIET)
    assert repr(report.curve) == repr(curve) and torch.equal(report.curve.after, curve.after)
    shared = redundancy(model, parts, own, metric)
    assert torch.equal(report.shared.single, shared.single)
    assert torch.equal(report.needs.needed, entanglement(model, parts, own.harmless, **QUIET).needed)
    depth = refusal_depth(model, own.harmful, metric, model, opener="sure", n_tokens=3, **QUIET)
    assert torch.equal(report.depth.scores, depth.scores)
    frame = report.to_dataframe().set_index("measure")
    assert frame.value["smallest number of parts that halves refusals"] == curve.half()[0]
    assert frame.value["area between the curves"] == pytest.approx(curve.area()[0])
    assert (frame.ci_low["redundancy"], frame.ci_high["redundancy"]) == pytest.approx(shared.redundancy()[1])
    count, expected, p = report.needs.overlap()
    row = frame.loc["overlap with ordinary ability"]
    assert (row.value, row.reference, row.p_value) == (count, pytest.approx(expected), pytest.approx(p))
    assert frame.value["Gini coefficient"] == concentration(shared.single.numpy()).gini
    change = depth.scores[-1] - depth.scores[0]
    name = "change of the metric by an answer's first words"
    assert frame.value[name] == pytest.approx(float(change.double().mean()), abs=1e-6)
    assert frame.value["refusals"] == 1.0 and frame.value["refusals after as many random parts"] == 1.0
    node, value, (low, high) = report.alone()[0]
    assert value == pytest.approx(float(shared.single.mean(1).max() / shared.gap.mean())) and low <= value <= high
    assert str(node) in frame.says["largest loss by one part"]
    assert frame.says.str.endswith(".").all() and len(frame) == len(report.rows()) >= 9


def test_a_chain_of_single_parts_is_a_single_point_of_failure(report, tmp_path):
    assert report.verdict == "yes" and report.curve.half() == (1, (1, 1))
    text = report.summary()
    assert text.startswith(f"{report.provenance.model}: a single point of failure? yes. One part alone is enough")
    assert "Half of the refusals is lost after the first 1 of 3 parts" in text
    assert "single point of failure: yes" in repr(report)
    again = RobustnessReport.load(report.save(tmp_path / "report"))
    assert again.summary() == text and again.to_dataframe().equals(report.to_dataframe())
    assert again.to_html() == report.to_html() and len(report.plot().data) >= 4


def test_the_page_is_whole_and_needs_no_network(report, tmp_path):
    page = report.to_html()
    assert report.save_html(tmp_path / "page.html").read_text(encoding="utf-8") == page
    assert not re.search(r"(?:src|href)=\"(?!#)", page) and "<script" not in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    for row in report.rows():
        assert row.measure.replace("'", "&#39;") in page and page.count("<svg") == 2
    assert "Is refusal a single point of failure?</strong> yes" in page


def test_backups_make_it_no_single_point(planted):
    """Two heads that do the same: neither alone loses anything, which the report says as far as the pairs decide it."""
    made = testbed.planted(seed=2, layers=6, heads=4, decoys=2, backups=1)
    model = ms.load_model((made.model, made.tokenizer))
    metric = ms.RefusalLogOdds.detect(model, made.pairs.sample(8))
    options = replace(FEW, sizes=(1, 2))
    found = robustness_report(model, list(made.truth.backups[0]), made.pairs, metric, options=options, **QUIET)
    assert found.curve.half() == (2, (2, 2)) and found.verdict == "no"
    rows = {row.measure: row for row in found.rows()}
    assert rows["redundancy"].interval[0] > 0 and "they replace one another" in rows["redundancy"].says
    assert rows["smallest number of parts that halves refusals"].undecided == ""
    assert found.depth.kl is None and any("Without the base model" in note for note in found.notes())


def test_verdicts_by_hand(report):
    """From the same report with other numbers in it."""
    n = len(report.shared.gap)
    gap = torch.full((n,), 4.0, dtype=torch.float64)

    def with_(singles, kinds):
        single = torch.tensor(singles, dtype=torch.float64)[:, None].expand(3, n) * 4
        said = tuple(ReplyKinds(tuple(row), torch.zeros(n), 9.0) for row in kinds)
        curve = replace(report.curve, sizes=report.curve.sizes[:3], kinds=said)
        return replace(report, curve=curve, shared=replace(report.shared, gap=gap, single=single))

    sizes, refuse, answer = len(report.curve.sizes), ["refuses"] * n, ["answers"] * n
    assert sizes == 3
    assert with_([0.1, 0.1, 0.1], [refuse, refuse, answer, answer]).verdict == "no"
    assert with_([0.1, 0.1, 0.6], [refuse, refuse, answer, answer]).verdict == "yes", "one part loses most of the gap"
    assert with_([0.1, 0.1, 0.1], [refuse, answer, answer, answer]).verdict == "yes"
    some = ["refuses"] * (n // 2) + ["answers"] * (n - n // 2)
    open_ = with_([0.1, 0.1, 0.1], [refuse, some, answer, answer])
    assert open_.verdict == "undecided" and "do not decide" in open_.finding
    half = next(row for row in open_.rows() if row.measure.startswith("smallest"))
    assert half.undecided == "With other prompts, 1 may be enough, or 2."
    broken, mixed = ["degenerate"] * n, ["degenerate"] * (n // 2 - 1) + ["answers"] * (n - n // 2 + 1)
    babble = with_([0.1, 0.1, 0.1], [refuse, broken, broken, broken])
    assert babble.curve.half() == (1, (1, 1)) and babble.verdict == "undecided", "a model that babbles refuses nothing"
    assert f"With {babble.parts[0]} alone ablated, replies are degenerate" in babble.finding
    both = with_([0.1, 0.1, 0.6], [refuse, broken, broken, broken])
    assert both.verdict == "yes", "patching shows it without that"
    assert "patched alone, loses 60 % of the metric's gap" in both.finding and "are degenerate" in both.finding
    assert with_([0.1, 0.1, 0.1], [refuse, mixed, mixed, mixed]).verdict == "yes"
    nothing = with_([0.1, 0.1, 0.1], [answer, answer, answer, answer])
    assert (
        nothing.verdict == "not measured"
        and "is lost at no measured number of parts, up to 3 of 3" in nothing.summary()
    )


def test_without_a_circuit_it_maps_one_on_other_pairs(planted, monkeypatch):
    made, model, _, _ = planted
    from mechsafety.robustness import report as module

    seen = []
    real = module.map_refusal_circuit

    def recorded(model, pairs, metric, options, **more):
        seen.append((pairs, options))
        return real(model, pairs, metric, replace(options, n_random=1, n_added=1, n_edges=1), **more)

    monkeypatch.setattr(module, "map_refusal_circuit", recorded)
    options = replace(FEW, pairs=4, sizes=(1,), n_random=1, replies=False)
    found = robustness_report(model, None, made.pairs, options=options, **QUIET)
    (pairs, used), own = seen[0], made.pairs.aligned(model).sample(4, 0)
    assert used.preliminary and len(pairs) == len(made.pairs.aligned(model)) - 4
    assert not any(pair in pairs for pair in own)
    assert found.mapped and any("quick map" in note for note in found.notes())
    assert any("No replies were generated" in note for note in found.notes()) and found.parts
    assert "refusals" not in {row.measure for row in found.rows()}


def test_a_metric_with_an_opener_has_no_depth(opened):
    model, pairs, metric = opened
    options = replace(FEW, sizes=(1,), n_random=1, replies=False)
    found = robustness_report(model, ["L0.H1", "L1.H2"], pairs, metric, options=options, **QUIET)
    assert found.depth is None and any("Depth was not measured" in note for note in found.notes())
    assert "change of the metric by an answer's first words" not in found.summary()


@pytest.mark.unchecked
def test_bad_input(llama, pairs, log_odds):
    with pytest.raises(MechsafetyError, match=r"a list of parts without a metric; expected a metric; Refusal"):
        robustness_report(llama, ["L0.H1"], pairs, **QUIET)
    with pytest.raises(MechsafetyError, match=r"L9\.H0"):
        robustness_report(llama, ["L9.H0"], pairs, log_odds, **QUIET)
    with pytest.raises(MechsafetyError, match="expected at least 2"):
        robustness_report(llama, ["L0.H1"], pairs[:1], log_odds, **QUIET)
    with ms.ablate(llama, "L0.H0", source="zero"), pytest.raises(MechsafetyError, match="an intervention is on"):
        robustness_report(llama, ["L0.H1"], pairs, log_odds, **QUIET)
    for wrong, message in (({"pairs": 1}, "pairs=1; expected at least 2"), ({"n_random": 0}, "n_random=0")):
        with pytest.raises(MechsafetyError, match=message):
            RobustnessOptions(**wrong)
