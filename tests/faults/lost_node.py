"""A cluster of three nodes on this machine, of which one is lost while it trains.

``python -m tests.faults.lost_node RUN WORD...`` runs ``sbir-ray WORD...`` on it, kills the node on
which the worker trains once the run has saved its second checkpoint, and ends with the command's
exit code.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from sbir_ray import checkpoint

# Before Ray is imported, which reads them then.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ.pop("RAY_ADDRESS", None)
# Short, since Ray makes sockets in it.
os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray-")

from ray.cluster_utils import Cluster

from tests.faults.drivers import driving
from tests.faults.kit import TRAINS, alive


def main() -> int:
    run, *words = sys.argv[1:]
    # The head has no CPU: all that is asked for is on the two others.
    cluster = Cluster(True, head_node_args={"num_cpus": 0})
    try:
        nodes = {node.node_id: node for node in (cluster.add_node(num_cpus=1) for _ in range(2))}
        with driving(*words, folder=Path(run).parent, address=cluster.address) as driver:
            driver.until(lambda: len(checkpoint.listed(Path(run))) >= 2)
            (worker,) = alive(TRAINS, cluster.global_state)
            cluster.remove_node(nodes.pop(worker["Address"]["NodeID"]), allow_graceful=False)
            print("lost the node of the worker", worker["Pid"], flush=True)
            code = driver.wait()
            print(driver.said.read_text())
            return code
    finally:
        cluster.shutdown()
        shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)


if __name__ == "__main__":
    signal.alarm(500)
    sys.exit(main())
