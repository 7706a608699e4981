"""The edges of backups: on planted models whose second ways are known, and with limits."""

from dataclasses import replace

import numpy as np
import pytest

import mechsafety as ms
from mechsafety import testbed
from mechsafety.circuits.budget import Budget
from mechsafety.circuits.circuit import Backup
from mechsafety.circuits.edge_backups import with_backup_edges
from mechsafety.circuits.edge_faithfulness import EdgeMeter
from mechsafety.circuits.goal import Goal
from mechsafety.circuits.search import SearchResult
from mechsafety.nodes import as_node
from mechsafety.patching import pair_runs

OPTIONS = ms.MapOptions(level="edge", limit=24, n_random=4, n_added=4, n_resamples=0)


@pytest.mark.parametrize("backups", [1, 2])
def test_a_map_of_edges_holds_every_way_of_a_planted_circuit(backups):
    made = testbed.planted(1, backups=backups, decoys=2)
    model = ms.load_model((made.model, made.tokenizer))
    circuit = ms.map_refusal_circuit(model, made.pairs, options=OPTIONS, progress=False)
    assert {member.edge for member in circuit.edges} == set(made.truth.edges)
    assert {str(backup.node) for backup in circuit.search.backups} <= {str(member.node) for member in circuit.nodes}
    assert len(circuit.search.backups) == backups
    found = testbed.score(circuit, made.truth)
    assert found.backups_found == 1.0 and found.role_accuracy == 1.0


@pytest.fixture(scope="module")
def ways():
    """A planted model with one doubled stage, meters of its edges, and the smallest set: one way alone."""
    made = testbed.planted(1, backups=1)
    model = ms.load_model((made.model, made.tokenizer))
    metric = ms.RefusalLogOdds.of(model, ["Sorry"], ["Sure"])
    meter = EdgeMeter(model, pair_runs(model, made.pairs.sample(6)), metric)
    ((first, second),) = made.truth.backups
    alone = tuple(edge for edge in made.truth.edges if second not in (edge.sender, edge.receiver))
    backup = Backup(second, first, (first, second), 0.0, 0.0, 1.0, (0.9, 1.1), 0.01)
    return made.truth, meter, SearchResult((), (), alone, {}, True), backup


def test_the_second_way_is_added_and_no_other_edge(ways):
    truth, meter, result, backup = ways
    found = with_backup_edges(result, [backup], None, [meter], Goal(0.8))
    assert set(found.circuit) == set(truth.edges)
    assert set(found.added) == set(truth.edges) - set(result.circuit)


def test_what_is_no_second_way_adds_nothing(ways):
    truth, meter, result, backup = ways
    idle = next(node for node in map(as_node, ("L0.H0", "L0.H1", "L0.H2", "L0.H3")) if node not in truth.nodes)
    for given in ([], [replace(backup, node=idle)]):
        assert with_backup_edges(result, given, None, [meter], Goal(0.8)).circuit == result.circuit


def test_a_limit_and_a_budget_leave_the_smallest_set(ways):
    _, meter, result, backup = ways
    assert with_backup_edges(result, [backup], len(result.circuit), [meter], Goal(0.8)).added == ()
    clock = iter(np.linspace(0, 1000, 50))
    spent = Budget(1.0, lambda: float(next(clock)))
    assert with_backup_edges(result, [backup], None, [meter], Goal(0.8), spent).added == ()
    assert any("edges of backups" in text for text in spent.cut)
