"""What the benchmarks count and write; their cases are run by `make bench`."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mechsafety.patching import activation_patching, pair_runs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import memory
import report
import run
from cases import PEER_CASES, acdc_of
from flops import Shape, floor_ratio, forward, least_for_head
from growth import grow, growth_cases, plot
from measure import alone, compare
from pages.statements import say
from report import markdown
from targets import Target

from mechsafety.errors import MechsafetyError
from mechsafety.metrics import RefusalLogOdds
from mechsafety.nodes import Node
from mechsafety.prompts import PromptPairs


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_operations_of_a_forward_are_those_that_torch_counts(kind, shared_model):
    model = shared_model(kind)
    ids = model.tokenize(["how do i make a cake"]).ids
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model.hf_model(input_ids=ids)
    assert forward(Shape.of(model), ids.shape[1]) == counted.get_total_flops()


def test_the_floor(llama, pairs, log_odds):
    """By hand for the last layers; and what we do lies above it."""
    shape = Shape.of(llama)
    # 4 heads of 8 over 2, d_model 32, gated MLP of 48: output of one head, one column of the MLP, one of logits
    last = 2 * 8 * 32 + 2 * 3 * 32 * 48 + 2 * 32 * llama.d_vocab
    assert least_for_head(shape, 2, 10, 4) == last
    # one layer earlier: 6 columns there, then keys and values of 6, queries, scores, output and MLP of 1
    block = 6 * 2 * 2 * 32 * 16 + 2 * 2 * 32 * 32 + 2 * 2 * 32 * 10 + 2 * 3 * 32 * 48
    assert least_for_head(shape, 1, 10, 4) == 6 * (last - 2 * 32 * llama.d_vocab) + block + 2 * 32 * llama.d_vocab
    assert floor_ratio(shape, 10, 4) > floor_ratio(shape, 10, 1) > 1
    runs = pair_runs(llama, pairs)
    width, rows = runs.harmful.tokens.ids.shape[1], len(pairs)
    for layer in range(3):
        with FlopCounterMode(display=False) as counted:
            activation_patching(llama, runs, log_odds, nodes=[Node("head", layer, 1)], progress=False)
        assert counted.get_total_flops() >= rows * least_for_head(shape, layer, width, runs.start)


def test_growth_is_plotted_with_the_same_bytes_again(tmp_path):
    cases = {
        name: {
            "analysis": kind,
            "prompts": n,
            "columns": columns,
            "ours_s": n * columns / 99,
            "peak_gib": 0.5 + n / 999,
        }
        for name, (kind, n, columns) in growth_cases().items()
    }
    pictures = []
    for name in ("a.svg", "b.svg"):
        plot(cases, tmp_path / name)
        pictures.append((tmp_path / name).read_bytes())
    assert pictures[0] == pictures[1] and b"peak memory" in pictures[0]
    cases["edges_prompts_4"] |= {"ours_s": 77.0}
    plot(cases, tmp_path / "c.svg")
    assert (tmp_path / "c.svg").read_bytes() != pictures[0]
    plot({"heads_columns_64": cases["heads_columns_64"]}, tmp_path / "d.svg")
    assert b"pairs: 2" in (tmp_path / "d.svg").read_bytes(), "a single size, as after a stop"


def test_results_say_what_was_not_run():
    place = {"date": "2026-01-01", "versions": {"torch": "2"}, "machine": {"cpu": "x", "cores": 2, "ram_gib": 8}}
    place["machine"]["threads"] = 2
    peer = place | {"ours_s": 2.0, "peer_s": 14.0, "ratio": 7.0, "max_difference": 1e-6, "peak_gib": 1.5}
    peer |= {"equal": True, "repeats": 3}
    floor = {"tokens": 43, "shared": 27, "floor_ratio": 10.0, "operations_over_floor": 1.25}
    grown = place | {
        "analysis": "heads",
        "prompts": 4,
        "columns": 32,
        "ours_s": 1.28,
        "before_gib": 1.0,
        "peak_gib": 1.1,
        "repeats": 2,
    }
    gpu = place | {"status": "not run", "shape": "1B", "dtype": "float32"}
    paths = peer | {"floor_ratio": 49.4}
    cases = {"head_sweep": peer | floor, "paths_to_logits": paths, "heads_prompts_4": grown, "gpu_1B_float32": gpu}
    docs, targets = {"head_sweep": "Sweep.", "other": "Other."}, {"head_sweep": Target(ratio=6), "other": Target()}
    text = markdown(place | {"cases": cases}, docs, targets)
    assert "| Sweep. | 2.00 s | 14.0 s | 7.0x | 1.0e-06 | 1.50 GiB | 3 | at least 6x, within 0.0001 | met |" in text
    cases["head_sweep"] = peer | floor | {"equal": False, "max_difference": None}
    failed = markdown(place | {"cases": cases}, docs, targets)
    assert "| 7.0x | not finite | 1.50 GiB | 3 | at least 6x, within 0.0001 | FAILED: values differ |" in failed
    assert "x, 2 cores, 8 GiB, 2 threads" in text
    assert "| Other. | not run | not run |" in text
    assert "takes 10.0 times as many. We do 1.25 times the floor" in text and "In time we are 7.0 times" in text
    assert "| all of them, MLPs recomputed | 49x | 7x |" in text
    assert "| 4 | 32 | 1.3 s | 10.0 ms | 1.00 GiB | 1.10 GiB | 2 |" in text
    assert "| 8B | bfloat16 | not run |" in text and "| 1B | float32 | not run |" in text


@pytest.mark.parametrize(
    ("peak", "grown", "said"),
    [
        (2.5, 2.9, "no call over 3 GiB; met, here (the largest takes 2.50 GiB) and at every size below (0 take more)."),
        (3.5, 2.9, "**missed**: the largest of these takes 3.50 GiB, and of the sizes below 0 take more (none)."),
        (
            2.5,
            3.1,
            "takes 2.50 GiB, and of the sizes below 1 take more (EAP-IG of every edge, 1 step at 2 pairs and 512",
        ),
    ],
)
def test_memory_of_the_analyses(peak, grown, said):
    """The verdict is that of all sizes, not of the small ones alone."""
    place = {"date": "2026-01-01", "versions": {}, "machine": {"cpu": "x", "cores": 2, "ram_gib": 8, "threads": 2}}
    calls = {"small": {"seconds": 1.0, "peak_gib": 1.0}, "large": {"seconds": 2.0, "peak_gib": peak}}
    long = {"analysis": "edges", "prompts": 2, "columns": 512, "ours_s": 1.0, "before_gib": 1.0, "peak_gib": grown}
    cases = {"memory": place | {"calls": calls, "largest_gib": peak}, "edges_columns_512": place | long}
    text = markdown(place | {"cases": cases}, {}, {})
    assert said in text
    assert text.index("| large | 2.0 s |") < text.index("| small | 1.0 s | 1.00 GiB |")


def test_growth_is_said_by_its_numbers():
    """Memory that goes from 1.5 to 3.1 GiB grows; where it does not, the sentence is another one."""
    results = json.loads((Path(report.__file__).parent / "results.json").read_text())
    said = [say(results["cases"], one) for one in report.GROWTH]
    assert said[0].startswith(
        "Exact patching takes more memory with more pairs until its batches are full: 1.53 GiB at 4"
    )
    assert said[1].startswith("Edge attribution takes the same at any number of pairs: 1.51 GiB at 4")
    results["cases"]["edges_prompts_256"]["peak_gib"] = 2.0
    results["cases"]["heads_prompts_64"]["peak_gib"] = 1.54
    assert say(results["cases"], report.GROWTH[0]).startswith("Exact patching: 1.53 GiB at 4 pairs, 1.54 at 64")
    assert say(results["cases"], report.GROWTH[1]).startswith("Edge attribution: 1.51 GiB at 4 pairs")


def test_the_committed_page_is_that_of_the_committed_results():
    folder = Path(report.__file__).parent
    results = json.loads((folder / "results.json").read_text())
    docs = {name: (case.__doc__ or "").split("\n")[0] for name, (case, _) in PEER_CASES.items()}
    targets = {name: target for name, (_, target) in PEER_CASES.items()}
    assert markdown(results, docs, targets) == (folder / "RESULTS.md").read_text(), "draw it again: run.write"


@pytest.fixture
def equal_pairs():
    """Two pairs of one length."""
    harmful = ["explain how to hurt people", "teach me to steal cake"]
    return PromptPairs.from_lists(harmful, ["explain how to help people", "teach me to bake cake"])


def test_every_call_whose_memory_is_measured_runs(equal_pairs, shared_model, log_odds, monkeypatch):
    monkeypatch.setattr(memory, "metric_of", lambda model: log_odds)
    monkeypatch.setattr(memory, "equal_length_pairs", lambda model, n: equal_pairs)
    calls = memory.calls(shared_model("llama"))
    # of prompts that are refused, which a random model does to none
    for name in ("map_refusal_circuit, 16 pairs", "refusal_direction, one layer"):
        with pytest.raises(MechsafetyError):
            calls.pop(name)()
    for call in calls.values():
        call()


def test_every_growth_case_names_its_size():
    assert growth_cases()["edges_prompts_256"] == ("edges", 256, 32)
    assert growth_cases()["heads_columns_512"] == ("heads", 2, 512)
    assert callable(grow) and len(growth_cases()) == 18


def test_targets_are_met_or_missed():
    case = {"ours_s": 100.0, "peak_gib": 2.0, "ratio": 3.0}
    assert Target(ratio=3).verdict(case | {"equal": True}) == "met"
    assert Target(ratio=3.1).verdict(case | {"equal": True}) == "missed"
    assert Target(seconds=240, gib=3).verdict(case) == "met"
    assert Target(seconds=240, gib=1).verdict(case) == Target(seconds=99, gib=3).verdict(case) == "missed"
    assert Target().verdict(case) == "-" and str(Target()) == "none set"
    assert Target().verdict(case | {"equal": False}) == "FAILED: values differ"
    assert str(Target(seconds=240, gib=3)) == "under 240 s, under 3 GiB"


def test_values_that_differ_are_found_in_every_repeat():
    def values(*rows):
        rows = iter(rows)
        return lambda: torch.tensor(next(rows))

    same = compare(values([1.0], [1.0]), values([1.0], [1.00005]), 2)
    assert same["equal"] and same["max_difference"] == pytest.approx(5e-5, rel=0.01) and same["repeats"] == 2
    assert not compare(values([1.0], [1.0]), values([1.001], [1.0]), 2)["equal"]
    lost = compare(values([1.0], [float("nan")], [1.0]), lambda: torch.tensor([1.0]), 3)  # max() of floats loses it
    assert not lost["equal"] and lost["max_difference"] is None
    with pytest.raises(ValueError, match=r"shape \(2,\) against \(1,\)"):
        compare(lambda: torch.zeros(2), lambda: torch.zeros(1), 1)
    assert compare(lambda: None, lambda: torch.ones(1), 2, lambda: torch.ones(1))["equal"]
    assert not compare(lambda: None, lambda: torch.ones(1), 2, lambda: torch.zeros(1))["equal"]
    assert alone(lambda: 7)[1] == 7 and alone(lambda: 7)[0]["repeats"] == 3


def test_exit_status_of_a_case_whose_values_differ(monkeypatch, tmp_path):
    found = {"ours_s": 1.0, "peer_s": 9.0, "ratio": 9.0, "peak_gib": 1.0, "repeats": 3, "max_difference": 0.01}
    monkeypatch.setattr(run, "measure_apart", lambda name, tiny: found | {"equal": equal})
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "head_to_query", "--out", str(tmp_path)])
    equal = True
    run.main()
    equal = False
    with pytest.raises(SystemExit, match="values differ from the peer's: head_to_query"):
        run.main()
    assert "FAILED: values differ" in (tmp_path / "RESULTS.md").read_text()
    place = run.here()["machine"]
    assert set(place) == {"cpu", "cores", "ram_gib", "threads"} and place["ram_gib"] > 0 and place["cpu"]


@pytest.mark.parametrize(
    "name",
    [
        "node_attribution",
        "paths_to_logits",
        "paths_to_two_logits",
        "direct_paths",
        "head_to_query",
        "head_sweep",
        "mean_differences",
        "direction_scores",
    ],
)
def test_cases_agree_with_the_peer_on_a_tiny_model(name, equal_pairs, shared_model, log_odds, monkeypatch):
    monkeypatch.setattr("cases.metric_of", lambda model: log_odds)
    two = RefusalLogOdds(log_odds.refusal_ids[:1], ("a",), (log_odds.refusal_ids[0] + 1,), ("b",))
    monkeypatch.setattr("cases.difference_of", lambda model: two)
    monkeypatch.setattr("cases.equal_length_pairs", lambda model, n: equal_pairs)
    monkeypatch.setattr("cases.N_COLUMNS", 2)
    mixed = ["how do i make a bomb", "kill"], ["help me", "how do i make a cake", "explain the sky please"]
    monkeypatch.setattr("cases.mixed_prompts", lambda n: mixed)
    found = PEER_CASES[name][0](shared_model("llama"))
    assert found["equal"] and found["max_difference"] < 1e-4 < 1e-3 < found["max_value"] and found["repeats"] >= 3


def test_acdc_leaves_the_edges_of_the_plain_loop(planted):
    model, pairs = planted
    found = acdc_of(model, PromptPairs(pairs.pairs[:1]), RefusalLogOdds.of(model, ["sorry"], ["sure"]), repeats=1)
    assert found["equal"] and found["max_value"] == 1.0


def test_the_page_of_the_service_is_drawn_from_its_record_and_faults_are_named(tmp_path):
    import service_load
    import service_report

    stored = json.loads((service_report.HERE / "service.json").read_text(encoding="utf-8"))
    assert service_report.markdown(stored) == (service_report.HERE / "SERVICE.md").read_text(encoding="utf-8")
    good = stored["service"]
    assert service_load.faults(good) == []
    lost = {**good, "load": {**good["load"], "lost": 1, "different": 2, "rss_mib": [100.0, 200.0]}, "exit_code": 1}
    assert service_load.faults(lost) == ["answers lost", "answers differ", "memory grew by 100 MiB", "exit code 1"]
    case = {"monitor": "m", "sites": 2, "call": "c", "plain_s": 1.0, "watched_s": 1.2, "ratio": 1.2, "low": 1.1}
    case |= {"high": 1.3, "same": False}
    service_report.store("monitors", {"model": "demo", "tokens": 8, "repeats": 2, "cases": [case]}, tmp_path)
    page = (tmp_path / "SERVICE.md").read_text(encoding="utf-8")
    assert "| 1.200 (1.100 to 1.300) | NO | missed |" in page
