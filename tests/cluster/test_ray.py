"""Two replicas on two nodes give the bytes of one process, also when a worker or a whole node is killed.

``make test-ray`` runs this; it needs the extra ``ray``.
"""

import os
import signal
import threading
import time

import psutil
import pytest
import swept

import mechsafety as ms

pytest.importorskip("ray")

SHARED = [
    "activation patching",
    "paths into slots",
    "path matrix",
    "node attribution",
    "eap-ig",
    "acdc",
    "map of neurons",
    "map within a budget",
    "safety neurons",
    "curve of log-odds",
    "refusal direction",
    "replies",
    "fragility",
]


@pytest.fixture(scope="module")
def two_nodes(make_cluster):
    make_cluster()
    executor = ms.RayExecutor(replicas=2)
    yield executor
    executor.close()


@pytest.mark.parametrize("name", SHARED)
def test_the_same_bytes(name, two_nodes):
    alone = swept.as_bytes(swept.CALLS[name]())
    with ms.running(executor=two_nodes):
        assert swept.as_bytes(swept.CALLS[name]()) == alone


def replicas():
    """Processes of the replicas of this process' clusters."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "ray::Replica" in " ".join(process.info["cmdline"] or ()):
            found.append(process)
    return found


def during(folder, n, act):
    """A thread that acts once a run folder holds so many items, and what it noted."""
    noted = []

    def watch():
        while swept.n_items(folder) < n:
            time.sleep(0.002)
        act()
        noted.append(swept.n_items(folder))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread, noted


def test_a_worker_is_killed_in_the_middle(two_nodes, tmp_path, caplog):
    alone = swept.as_bytes(swept.CALLS["map"]())
    thread, noted = during(tmp_path, 20, lambda: os.kill(replicas()[0].pid, signal.SIGKILL))
    with ms.running(tmp_path, executor=two_nodes):
        assert swept.as_bytes(swept.CALLS["map"]()) == alone
    thread.join(10)
    assert noted and noted[0] < swept.n_items(tmp_path) and "a replica was lost" in caplog.text


def test_a_cluster_that_is_too_small_is_said_at_once(two_nodes, tmp_path):
    many = ms.RayExecutor(replicas=50)
    small = pytest.raises(ms.MechsafetyError, match=r"room for 2 of 50 replicas \(1 processors and")
    with small, ms.running(executor=many):
        swept.CALLS["paths"]()


def test_errors_of_the_call_come_back(two_nodes, llama, pairs, log_odds):
    with pytest.raises(ms.MechsafetyError, match="positions"), ms.running(executor=two_nodes):
        ms.activation_patching(llama, pairs, log_odds, positions="nowhere", progress=False)


def test_stored_runs_cannot_travel(two_nodes, llama, pairs, log_odds):
    runs = ms.patching.pair_runs(llama, pairs)
    refused = pytest.raises(ms.MechsafetyError, match="pass pairs rather than their stored runs")
    with refused, ms.running(executor=two_nodes):
        ms.activation_patching(llama, runs, log_odds, progress=False)


def test_a_run_of_a_cluster_goes_on_in_one_process_and_back(two_nodes, tmp_path):
    alone, out = swept.as_bytes(swept.CALLS["map"]()), tmp_path / "out"
    assert swept.killed("map", tmp_path / "run", out, 15) is not None
    before = swept.n_items(tmp_path / "run")
    with ms.running(tmp_path / "run", executor=two_nodes):
        assert swept.as_bytes(swept.CALLS["map"]()) == alone
    assert swept.n_items(tmp_path / "run") > before
    with ms.running(tmp_path / "run"):
        assert swept.as_bytes(swept.CALLS["map"]()) == alone


def test_a_node_is_killed_in_the_middle(make_cluster, tmp_path):
    alone = swept.as_bytes(swept.CALLS["map"]())
    cluster, second = make_cluster()
    executor = ms.RayExecutor(replicas=2)
    thread, noted = during(tmp_path, 20, lambda: cluster.remove_node(second, allow_graceful=False))
    with ms.running(tmp_path, executor=executor):
        assert swept.as_bytes(swept.CALLS["map"]()) == alone
    thread.join(60)
    executor.close()
    # what the node held was computed again: because Ray said that it is gone, or before that because it took too long
    assert noted and noted[0] < swept.n_items(tmp_path)
