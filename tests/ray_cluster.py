"""A real Ray cluster of several nodes on this machine, and hands to kill its processes with.

Ray runs in a process of its own, so that no test imports it.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class LocalCluster:
    """A head that takes no work, and `count` nodes of one processor each."""

    def __init__(self, count: int) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="xr-"))  # the names of Ray's sockets must be short
        # No token of Ray's own in the user's home.
        self.environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_TMPDIR": str(self._folder),
            "RAY_health_check_initial_delay_ms": "0",  # a lost node is noticed in seconds
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_failure_threshold": "5",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.ray_cluster"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=self.environment,
            cwd=ROOT,
        )
        self.address = self._told()
        self.raylets = [self.add() for _ in range(count)]

    def add(self, **environment: str) -> int:
        """One more node; the process of its raylet."""
        self._say({"add": environment})
        return self._told()

    def remove(self, raylet: int) -> None:
        self._say({"remove": raylet})
        self._told()

    def close(self) -> None:
        for pid in self.workers():  # one of them may be stopped
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.communicate(timeout=60)
        shutil.rmtree(self._folder, ignore_errors=True)

    def workers(self) -> dict[int, str]:
        """What each worker is doing: "ray::" and the name of the job."""
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit() and parent_of(int(folder.name)) in self.raylets:
                found[int(folder.name)] = title_of(int(folder.name))
        return found

    def stop_at(self, job: str, seconds: float = 240) -> int:
        """Stop the first worker that is seen at a job of this name, in its middle; its process."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for pid, title in self.workers().items():
                if job in title:
                    os.kill(pid, signal.SIGSTOP)
                    if job in title_of(pid):
                        return pid
                    os.kill(pid, signal.SIGCONT)
            time.sleep(0.002)
        raise AssertionError(f"no worker was seen at {job}")

    def _say(self, message: object) -> None:
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _told(self):
        for line in self._process.stdout:
            if line.startswith("told "):
                return json.loads(line.removeprefix("told "))
        raise AssertionError("the cluster has ended")


def title_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def main() -> None:
    """The cluster's process: says its address, then does as it is told until stdin ends."""
    from ray.cluster_utils import Cluster

    small = {"include_dashboard": False, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    print("told", json.dumps(cluster.address), flush=True)
    nodes = {}
    for line in sys.stdin:
        message = json.loads(line)
        answer = None
        if "add" in message:
            node = cluster.add_node(num_cpus=1, env_vars=message["add"], **small)
            answer = node.all_processes["raylet"][0].process.pid
            nodes[answer] = node
        else:
            cluster.remove_node(nodes.pop(message["remove"]))
        print("told", json.dumps(answer), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
