"""A Ray cluster of two nodes on this machine."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_worker_niceness", "0")  # otherwise a busy machine starves the replicas
# replicas import functions of the tests by name
TESTS = Path(__file__).resolve().parents[1]
PLACES = (str(TESTS), str(TESTS.parent / "scripts"), os.environ.get("PYTHONPATH", ""))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, PLACES))


@pytest.fixture(scope="module")
def make_cluster():
    """Starts clusters of two nodes with one processor each; they end with the module."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = []

    def make():
        if made:
            end()
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        second = cluster.add_node(num_cpus=1)
        made.append(cluster)
        ray.init(address=cluster.address, log_to_driver=False)
        return cluster, second

    def end():
        ray.shutdown()
        made.pop().shutdown()

    yield make
    if made:
        end()
