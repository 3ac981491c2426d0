"""Runs on Ray: two nodes of this machine; drivers, actors and nodes are killed, one is added; the rows are the same."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("ray")
from ray.cluster_utils import Cluster
from small_plans import PLAN, rows, run_file, write_plan

# Alone, as .ci/run does: it starts a dozen processes, which beside other tests wait for each other.
pytestmark = pytest.mark.skipif("IPR_FAST_CLUSTER" not in os.environ, reason="set IPR_FAST_CLUSTER=1 to run it")
# Ray's limits of time, which a busy machine would meet. A node that is lost is found by its closed port.
LIMITS = {
    **dict.fromkeys(("agent_register_timeout_ms", "health_check_timeout_ms"), "600000"),
    **dict.fromkeys(("worker_register_timeout_seconds", "gcs_server_request_timeout_seconds"), "600"),
    **dict.fromkeys(("gcs_rpc_server_connect_timeout_s", "gcs_rpc_server_reconnect_timeout_s"), "600"),
    **{"health_check_initial_delay_ms": "0", "health_check_period_ms": "1000"},
}
SHARDS = 30
TEXT = PLAN.split("[arms.")[0].replace("samples = 10", "samples = 60") + "[arms.refined]\niterations = 60\n"


@pytest.fixture
def cluster(monkeypatch):
    """A cluster whose head computes nothing."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    for name, value in LIMITS.items():
        monkeypatch.setenv(f"RAY_{name}", value)
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80_000_000}
    cluster = started(lambda: Cluster(initialize_head=True, head_node_args=head))
    yield cluster
    cluster.shutdown()


def started(start):
    """Start a node. Ray gives it 30 seconds, which a busy machine may not do in."""
    for _ in range(10):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    raise TimeoutError("no node of Ray starts on this machine")


def add_node(cluster):
    """Add a node of one core."""
    return started(lambda: cluster.add_node(num_cpus=1, object_store_memory=80_000_000))


def raylet_of(node) -> int:
    return node.all_processes["raylet"][0].process.pid


def actors_of(node) -> list[int]:
    """The processes of a node's actors, by their titles."""
    children = Path(f"/proc/{raylet_of(node)}/task/{raylet_of(node)}/children").read_text().split()
    return [int(child) for child in children if b"ray::Actor" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_until(condition, driver):
    """Wait for a condition; a driver that ends before is a failure."""
    while not condition():
        assert driver.poll() is None, driver.stderr.read()
        time.sleep(0.05)


def test_rows_are_the_same_whoever_is_killed(cluster, tmp_path):
    file, out = write_plan(tmp_path, TEXT), tmp_path / "out"
    command = [sys.executable, "-m", "ipr_fast", "evaluate", str(file), "--out", str(out), "--device", "cpu", "--quiet"]
    first, second = add_node(cluster), add_node(cluster)

    def done() -> int:
        return len(list(out.glob("*.parquet")))

    def start(*options: str) -> subprocess.Popen:
        ray = ["--ray", cluster.address]
        return subprocess.Popen([*command, *ray, *options], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    driver = start("--workers", "1")
    wait_until(lambda: done() >= 2, driver)
    driver.send_signal(signal.SIGKILL)
    driver.communicate()

    driver, before = start(), done()  # resumed with another number of workers
    wait_until(lambda: done() >= before + 2 and actors_of(first), driver)
    os.kill(actors_of(first)[0], signal.SIGKILL)
    before = done()
    wait_until(lambda: done() >= before + 2, driver)
    for node in (first, second):
        os.kill(raylet_of(node), signal.SIGKILL)
    assert done() < SHARDS - 2, "the run was over before its nodes were lost"
    add_node(cluster)  # without which it would never end
    out_text, error = driver.communicate()
    assert driver.returncode == 0, error
    assert f"{SHARDS} of {SHARDS} shards are in {out}" in out_text  # Ray may write lines of its own
    run_file(file, tmp_path / "here")
    assert rows(out) == rows(tmp_path / "here")
    assert len(list(out.glob("*.parquet"))) == SHARDS
