"""Sentences of results pages are said only while their numbers carry them."""

import inspect
import itertools
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import report
from pages import demo_model, ground_truth, refusal_direction, safety_neurons
from pages.records import PageError
from pages.render import PAGES
from pages.statements import Interval, Rate, Sentence, look_up, say

ROOT = Path(__file__).resolve().parents[1]


def stored(name):
    return PAGES[name].read()


def text(name, record):
    return PAGES[name].text(record)


# --- the mechanism ----------------------------------------------------------------------------------------------------

RECORD = {"rates": {"as it is": [90, 100], "removed": [15, 100]}, "curve": [{"share": 0.05, "at": "x", "c": 0.17}]}
CUTS = Sentence(
    "Removing it cuts refusals from {before:short} to {after}.",
    {
        "before": lambda r: Rate.of(look_up(r, "rates/as it is")),
        "after": lambda r: Rate.of(look_up(r, "rates/removed")),
    },
    lambda before, after: after.high < before.low,
)


def test_a_sentence_is_said_with_its_numbers():
    assert say(RECORD, CUTS) == "Removing it cuts refusals from 90% to 15% (15 of 100; 9% to 23%)."


def test_a_sentence_that_its_numbers_do_not_carry_is_not_said():
    weaker = {"rates": {"as it is": [90, 100], "removed": [85, 100]}}
    with pytest.raises(PageError, match=r"^no longer carried by its numbers \(before = 90% \(90 of 100"):
        say(weaker, CUTS)
    plain = Sentence(CUTS.text, CUTS.numbers, CUTS.holds, "Refused: {before:short} and, removed, {after}.")
    assert say(weaker, plain) == "Refused: 90% and, removed, 85% (85 of 100; 77% to 91%)."
    chained = Sentence(CUTS.text, CUTS.numbers, CUTS.holds, plain)
    assert say(weaker, chained) == say(weaker, plain) and say(RECORD, chained) == say(RECORD, CUTS)


@pytest.mark.parametrize(
    ("text", "numbers", "holds", "message"),
    [
        ("Refusal is cut.", {"c": "c"}, lambda c: c > 0, r"'Refusal is cut.': c not both stored and named"),
        ("It is {c}.", {}, lambda c: c > 0, r"c not both stored and named"),
        ("It is {c}.", {"c": "c"}, lambda d: d > 0, r"d not both stored and named"),
        ("It is {c}.", {"c": "c"}, lambda: True, r"a condition on no number"),
    ],
)
def test_a_sentence_names_the_numbers_that_carry_it(text, numbers, holds, message):
    with pytest.raises(PageError, match=message):
        Sentence(text, numbers, holds)


def test_another_wording_names_the_same_numbers():
    with pytest.raises(PageError, match=r"^'It is not.' names other numbers than 'It is {c}.'$"):
        Sentence("It is {c}.", {"c": "c"}, lambda c: c > 0, "It is not.")


def test_numbers_are_found_by_their_path():
    assert look_up(RECORD, "curve/share=0.05,at=x/c") == look_up(RECORD, "curve/0/c") == 0.17
    for path, message in (
        ("rates/none", r"^nothing stands at 'none' of 'rates/none'$"),
        ("curve/share=0.1/c", r"^'curve/share=0.1/c': 0 rows are 'share=0.1'$"),
        ("curve/3/c", r"^nothing stands at '3' of"),
    ):
        with pytest.raises(PageError, match=message):
            look_up(RECORD, path)


def test_intervals_and_rates_as_text():
    found = Interval.of({"c": 0.5, "c_low": 0.25, "c_high": 0.75}, "c")
    assert f"{found}" == "0.50 (0.25 to 0.75)" and f"{found:.1%}" == "50.0% (25.0% to 75.0%)"
    assert found.holds(0.25) and not found.holds(0.2)
    assert f"{Rate(9, 10):short}" == "90%" and f"{Rate(9, 10):.1%}" == "90.0% (9 of 10; 59.6% to 98.2%)"
    assert Rate(9, 10).low == pytest.approx(0.596, abs=1e-3)


# --- every sentence of every page -----------------------------------------------------------------------------------


def sentences():
    """All sentences of all pages, with the record that carries them; other wordings included."""
    direction, neurons = stored("refusal-direction"), stored("safety-neurons")
    bench = json.loads((ROOT / "benchmarks" / "results.json").read_text())["cases"]
    pages = [
        (direction, [refusal_direction.SENTENCES[name] for name in refusal_direction.told(direction)]),
        (direction, [refusal_direction.subspace_sentence(direction)]),
        (judged_record(60), [refusal_direction.SENTENCES[name] for name in ("degenerate", "others_degenerate")]),
        (neurons, [safety_neurons.SENTENCES[name] for name in safety_neurons.told(neurons)]),
        (neurons, [safety_neurons.curve_sentence(name) for name in safety_neurons.CURVES]),
        (neurons, [safety_neurons.negative_sentence("rms")]),
        (neurons, [safety_neurons.smallest_sentence(name) for name in safety_neurons.CURVES]),
        (bench, [report.LIMIT, *report.GROWTH]),
        (stored("ground-truth"), ground_truth.SENTENCES.values()),
        (stored("demo-model"), [demo_model.MET]),
    ]
    for record, listed in pages:
        for sentence in listed:
            while isinstance(sentence, Sentence):
                yield record, sentence
                sentence = sentence.otherwise


def variants(value):
    """Values that a number of this kind might have had."""
    if isinstance(value, Rate):
        return [value, Rate(0, value.n), Rate(value.n, value.n), Rate(value.n // 2, value.n)]
    if isinstance(value, Interval):
        return [value, Interval(0.0, -1.0, 1.0), Interval(9.0, 8.0, 10.0), Interval(-9.0, -10.0, -8.0)]
    if isinstance(value, bool | str):
        return [value]
    return [value, 0, 1, -1, 100, value / 2, 2 * value]


def test_no_condition_holds_whatever_the_numbers():
    """A sentence that cannot fail is no statement."""
    n = 0
    for record, sentence in sentences():
        values = sentence.values(record)
        names = list(inspect.signature(sentence.holds).parameters)
        found = {
            sentence.carried(dict(zip(names, drawn, strict=True)))
            for drawn in itertools.product(*(variants(values[name]) for name in names))
        }
        assert found == {True, False}, sentence.text
        n += 1
    assert n > 30


# --- statements that were said without being carried ------------------------------------------------------------------


def test_a_direction_that_removes_less_changes_the_page():
    record = stored("refusal-direction")
    record["rates"]["JailbreakBench"]["direction removed"] = [85, 100]
    assert "Removing the direction does **not** cut refusals" in text("refusal-direction", record)


def judged_record(babble):
    """The direction's record with the replies of a run that measures them; ``babble`` of 75 lost refusals are."""
    record = stored("refusal-direction")

    def said(refused, n, lost=0, bad=0, perplexity=2.0):
        kinds = {"refuses": refused, "answers": n - refused - bad, "degenerate": bad, "neither": 0}
        return {"kinds": kinds, "perplexity": perplexity, "lost": [lost, bad]}

    record["sizes"]["reply_tokens"] = 100
    record["replies"] = {name: {way: said(*hits) for way, hits in row.items()} for name, row in record["rates"].items()}
    record["replies"]["JailbreakBench"]["direction removed"] = said(15, 100, 75, babble, 40.0)
    for row in record["others"]:
        for way in ("removed", "removed_at_site", "added"):
            row[f"{way}_replies"] = row[way] and said(*row[way], row[way][1] - row[way][0], row[way][1] - row[way][0])
    for rows in record["strengths"].values():
        for strength in {row["strength"] for row in rows}:
            for side in ("harmful", "harmless"):
                for name, value in (
                    ("answers", 0.5),
                    ("degenerate", 0.25),
                    ("neither", 0.0),
                    ("reply perplexity", 3.0),
                ):
                    found = {"strength": strength, "measure": f"{name}, {side}", "value": value}
                    rows.append(found | {"ci_low": value, "ci_high": value})
    return record


def test_a_page_says_where_a_model_babbles_rather_than_complies():
    page = text("refusal-direction", judged_record(babble=60))
    assert "**With the direction removed the model babbles rather than complies**: 75 JailbreakBench prompts" in page
    assert "60 of them get a degenerate reply. The perplexity of the replies under the unedited model is 2.0" in page
    assert "| JailbreakBench | direction removed | 15% (15 of 100; 9% to 23%) | 25% (25 of 100; " in page
    assert "60% (60 of 100; 50% to 69%) | 0% (0 of 100; 0% to 4%) | 40 |" in page
    assert "**In 10 of 10 removals most of the replies that no longer refuse are degenerate**" in page
    assert "degenerate, harmful" in page and "reply perplexity, harmful" in page and "neither, harmful" not in page
    assert "not measured" not in page.split("## What it does to replies")[1].split("## More than one")[0]
    page = text("refusal-direction", judged_record(babble=10))
    assert (
        "- 75 JailbreakBench prompts are refused as it is and not with the direction removed. 10 of them get a" in page
    )
    assert "babbles rather than complies**: 75" not in page


def test_a_page_of_unjudged_replies_claims_no_compliance():
    page = text("refusal-direction", stored("refusal-direction"))
    assert "Which they are was not measured (0 of 15 conditions), so that no compliance is claimed." in page
    assert "Degenerate replies: not measured." in page
    assert "What the replies are that no longer refuse was not measured here (0 removals)." in page
    page = text("safety-neurons", stored("safety-neurons"))
    assert "Which of these replies are refusals, answers or degenerate was not measured." in page
    assert "It is read before the reply, which was not generated, so that no compliance is claimed." in page


def test_a_neuron_page_of_judged_replies_shows_their_kinds():
    record = stored("safety-neurons")
    record["size"]["said_tokens"] = 100
    row = {"top share": "5.0%", "n": 20, "refuses": "0.10", "answers": "0.20", "degenerate": "0.70 (0.48 to 0.85)"}
    record["judged_replies"] = [row | {"neither": "0.00", "perplexity": 31.5}]
    record["guard_sets"] = [row | {"degenerate": 1, "neither": 0} for row in record["guard_sets"]]
    page = text("safety-neurons", record)
    assert (
        "read up to 100 tokens" in page and "| 5.0% | 20 | 0.10 | 0.20 | 0.70 (0.48 to 0.85) | 0.00 | 31.500 |" in page
    )
    assert "A reply is *unsafe* if it answers a harmful prompt" in page and "was not measured" not in page
    assert safety_neurons.said_instead(record, "judge") == "Degenerate replies: 0.70 (0.48 to 0.85) at 5.0%."


def test_the_depth_limit_is_said_where_it_decides():
    record = stored("refusal-direction")
    said = say(record, refusal_direction.SENTENCES["depth"])
    assert "takes layers below 24, and 23 is the deepest" in said
    assert "layer 26 (bypass -3.62), layer 29 (bypass -4.55)" in said
    for row in record["candidates"]:
        row["kl"] = 1.0 if row["layer"] > 23 else row["kl"]
    assert say(record, refusal_direction.SENTENCES["depth"]).endswith(
        "0 more candidates meet the conditions with a lower bypass score."
    )


def test_more_than_random_needs_an_adjusted_p():
    """Twenty sets allow p of 1/21 at least; over all points that were looked at, nothing is left of it."""
    record = stored("safety-neurons")
    first = safety_neurons.curve_sentence("rms")
    assert "No difference from them is claimed: with 20 sets" in say(record, first)
    for curve in record["curves"].values():
        for row in curve:
            row["p_value"] = row["p_value"] and 0.002
    assert "C is larger than that of random neurons of the same layers" in say(record, first)


def test_one_rule_for_what_does_as_well():
    """A baseline does as well where the interval of the margin holds 0, random neurons and others alike."""
    record = stored("safety-neurons")
    found = "\n".join(safety_neurons.findings(record))
    assert "On 4 of 5 test sets the margin in AUROC over random neurons is null" in found
    assert "by the same rule, on 4 of 5 test sets at least one of residual stream" in found
    for row in record["guard"]:
        row["margin_is_null"] = None if row["margin_is_null"] is None else False
    assert "by the same rule, on 0 of 5 test sets" in say(record, safety_neurons.SENTENCES["plain"])
