"""Two nodes with an address each: the second one lives in a network namespace of its own, and is then killed.

Needs root and the command ``ip``; otherwise it is left out.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import swept

import mechsafety as ms

ray = pytest.importorskip("ray")

HEAD, SECOND, PORT = "10.213.77.1", "10.213.77.2", 6399
START = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=1", "--object-store-memory=100000000"]


def shell(*words, check=True):
    return subprocess.run(words, check=check, capture_output=True, text=True)


@pytest.fixture
def namespace():
    """Name of a network namespace, joined with this one by a pair of virtual devices."""
    name = f"ms{os.getpid()}"
    if os.geteuid() or not shutil.which("ip") or shell("ip", "netns", "add", name, check=False).returncode:
        pytest.skip("no network namespaces here")
    try:
        shell("ip", "link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b")
        shell("ip", "link", "set", f"{name}b", "netns", name)
        shell("ip", "addr", "add", f"{HEAD}/24", "dev", f"{name}a")
        shell("ip", "link", "set", f"{name}a", "up")
        inside = ("ip", "netns", "exec", name)
        shell(*inside, "ip", "addr", "add", f"{SECOND}/24", "dev", f"{name}b")
        shell(*inside, "ip", "link", "set", f"{name}b", "up")
        shell(*inside, "ip", "link", "set", "lo", "up")
        yield name
    finally:
        kill_all(name)
        shell("ip", "link", "del", f"{name}a", check=False)
        shell("ip", "netns", "del", name, check=False)


def kill_all(name):
    """Kill every process of a namespace at once, as when a machine loses power."""
    for number in shell("ip", "netns", "pids", name, check=False).stdout.split():
        os.kill(int(number), signal.SIGKILL)


@pytest.fixture
def nodes(namespace, tmp_path):
    """Address of the cluster; the second node runs in the namespace."""
    head = subprocess.Popen(
        [*START, "--head", f"--node-ip-address={HEAD}", f"--port={PORT}", "--include-dashboard=false", "--block"],
        stdout=subprocess.DEVNULL,
    )
    second = None
    try:
        wait_for_port()
        joins = [*START, f"--address={HEAD}:{PORT}", f"--node-ip-address={SECOND}", "--block"]
        second = subprocess.Popen(["ip", "netns", "exec", namespace, *joins], stdout=subprocess.DEVNULL)
        ray.init(address=f"{HEAD}:{PORT}", _node_ip_address=HEAD, log_to_driver=False)
        until(lambda: len([node for node in ray.nodes() if node["Alive"]]) == 2)
        yield f"{HEAD}:{PORT}"
    finally:
        ray.shutdown()
        for process in (second, head):
            if process is not None:
                process.terminate()
                process.wait(60)
        left = Path("/tmp/ray/ray_current_cluster")  # ray.init() would look for this cluster
        if left.is_file() and left.read_text().strip() == f"{HEAD}:{PORT}":
            left.unlink()


def wait_for_port():
    import socket

    def open_now():
        with socket.socket() as one:
            return one.connect_ex((HEAD, PORT)) == 0

    until(open_now)


def until(holds, seconds=180):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.5)


def test_two_addresses_give_the_same_bytes_until_and_after_one_is_gone(nodes, namespace, tmp_path):
    from test_ray import during

    alone = swept.as_bytes(swept.CALLS["map"]())
    assert sorted(node["NodeManagerAddress"] for node in ray.nodes()) == [HEAD, SECOND]
    executor = ms.RayExecutor(nodes, replicas=2)
    with ms.running(executor=executor):
        assert swept.as_bytes(swept.CALLS["map"]()) == alone
    assert shell("ip", "netns", "pids", namespace).stdout.split()
    thread, noted = during(tmp_path / "run", 20, lambda: kill_all(namespace))
    with ms.running(tmp_path / "run", executor=executor):
        assert swept.as_bytes(swept.CALLS["map"]()) == alone
    thread.join(60)
    executor.close()
    assert not shell("ip", "netns", "pids", namespace).stdout.split()
    # what the node held was computed again: because Ray said that it is gone, or before that because it took too long
    assert noted and noted[0] < swept.n_items(tmp_path / "run")
