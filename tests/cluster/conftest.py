"""A Ray cluster of two nodes on this machine."""

import os

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_worker_niceness", "0")  # otherwise a busy machine starves the replicas


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
