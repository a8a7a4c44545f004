"""A child under a memory limit, with real children: what is beyond it ends them, in one line, and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from exporter.errors import ExporterError
from exporter.validate import limits, onnx_worker
from exporter.validate.child import OverLimit, WorkerDied, run_worker
from exporter.validate.limits import Enforced, Limit
from exporter.validate.onnx_kernels import CPU, CUDA

MIB = 1 << 20
LIMIT = 160 * MIB
WHOSE = "the 0.2 GiB of profile tiny"

BEYOND = "kept = []\n    for _ in range(40): kept.append(bytearray(b'x') * (8 << 20)); time.sleep(0.01)\n    return {}"
BELOW = "kept = bytearray(b'x') * (60 << 20); time.sleep(0.2); return {'memory': memory(), 'asked': asked}"
READS = """
    import mmap
    with open(asked['text'], 'rb') as f, mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ) as m:
        for _ in range(2): sum(m[i] for i in range(0, len(m), 4096))
    return {'memory': memory()}"""


@dataclass(frozen=True)
class Question:
    text: str = "?"


def run(body: str, limit: Limit, text: str = "?", time_limit: float = 60) -> dict[str, Any]:
    code = (
        f"import time\nfrom exporter.validate.child import *\ndef run(asked, report):\n    {body}\nsys.exit(serve(run))"
    )
    command = (sys.executable, "-c", code)
    return run_worker(Question(text), "", time_limit, runtime="runtime", subject="x.gguf", command=command, limit=limit)


def groups() -> list[Path]:
    """Groups that this process made and that are there."""
    return [path for _, parent in limits._parents() for path in parent.glob(f"exporter-{os.getpid()}-*")]


def has_groups() -> bool:
    group = limits._make_group(Limit(LIMIT, ""))
    if group is not None:
        group.close()
    return group is not None


with_groups = pytest.mark.skipif(not has_groups(), reason="no control group for memory can be made here")
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
WAYS = [pytest.param("cgroup", marks=with_groups), pytest.param("rlimit", marks=linux), "watch"]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    children = psutil.Process().children(recursive=True)
    yield
    assert psutil.Process().children(recursive=True) == children
    assert groups() == []


@pytest.mark.parametrize("by", WAYS)
def test_beyond_the_limit(by: limits.By) -> None:
    started = time.monotonic()
    with pytest.raises(OverLimit, match=rf"^x\.gguf needs more than {WHOSE} in runtime$") as error:
        run(BEYOND, Limit(LIMIT, WHOSE, by=by))
    assert "--context" in (error.value.hint or "")
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("by", WAYS)
def test_below_the_limit(by: limits.By) -> None:
    answer = run(BELOW, Limit(LIMIT, WHOSE, by=by), text="what?")
    assert answer["asked"] == {"text": "what?"}
    memory = answer["memory"]
    assert (memory["limit_bytes"], memory["limit_by"]) == (LIMIT, by)
    assert memory["peak_rss_bytes"] > 60 * MIB
    if by == "cgroup":
        assert 60 * MIB < memory["limit_peak_bytes"] <= LIMIT


@pytest.mark.parametrize("by", WAYS)
def test_an_error_of_its_own_is_no_lack_of_memory(by: limits.By) -> None:
    with pytest.raises(ExporterError, match=r"^it is too hot$") as error:
        run("raise ExporterError('it is too hot')", Limit(LIMIT, WHOSE, by=by))
    assert not isinstance(error.value, WorkerDied)


@pytest.mark.parametrize("by", WAYS)
def test_a_crash_is_no_lack_of_memory(by: limits.By) -> None:
    with pytest.raises(WorkerDied, match=r"^runtime was killed by SIGKILL while running x\.gguf$") as error:
        run("import os; os.kill(os.getpid(), 9)", Limit(LIMIT, WHOSE, by=by))
    assert not isinstance(error.value, OverLimit)


@pytest.mark.parametrize("by", WAYS)
def test_a_hang_ends(by: limits.By) -> None:
    with pytest.raises(WorkerDied, match=r"^x\.gguf did not finish in runtime within 0\.5 s$"):
        run("time.sleep(60)", Limit(LIMIT, WHOSE, by=by), time_limit=0.5)


def test_the_best_that_is_here_is_taken() -> None:
    best = "cgroup" if has_groups() else "rlimit" if sys.platform == "linux" else "watch"
    assert run(BELOW, Limit(LIMIT, WHOSE))["memory"]["limit_by"] == best


def test_a_way_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_make_group", lambda limit: None)
    with pytest.raises(ExporterError, match="lets us set no memory limit by cgroup"):
        run(BELOW, Limit(LIMIT, WHOSE, by="cgroup"))


# Files


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A file that is larger than the limit leaves room for, in the cache as if it had just been written."""
    path = tmp_path / "big"
    path.write_bytes(os.urandom(MIB) * 100)
    path.read_bytes()
    return path


@with_groups
def test_a_mapped_file_counts(big: Path) -> None:
    memory = run(READS, Limit(LIMIT, WHOSE, (big,), by="cgroup"), str(big))["memory"]
    assert memory["limit_peak_bytes"] > 100 * MIB
    assert memory["limit_read_again_bytes"] == 0


@with_groups
def test_a_file_that_is_in_the_cache_already_would_be_free(big: Path) -> None:
    """The trap that `files` is for: pages are counted where they were read first."""
    memory = run(READS, Limit(LIMIT, WHOSE, by="cgroup"), str(big))["memory"]
    assert memory["limit_peak_bytes"] < 60 * MIB


@with_groups
def test_a_file_that_does_not_fit_is_read_again(big: Path) -> None:
    memory = run(READS, Limit(64 * MIB, WHOSE, (big,), by="cgroup"), str(big))["memory"]
    assert memory["limit_read_again_bytes"] > 20 * MIB
    assert memory["limit_peak_bytes"] <= 65 * MIB


def test_a_missing_file_is_not_ours_to_report(tmp_path: Path) -> None:
    limits.drop_from_cache([tmp_path / "none"])


# Groups


@with_groups
def test_children_of_the_child_are_counted_and_ended() -> None:
    grow = "kept = bytearray(b'x') * (200 << 20)"
    with pytest.raises(OverLimit, match="needs more than"):
        run(f"import subprocess; subprocess.run([sys.executable, '-c', {grow!r}]); return {{}}", Limit(LIMIT, WHOSE))
    left = "import subprocess; subprocess.Popen(['sleep', '60'], stdout=2, start_new_session=True); return {}"
    run(left, Limit(LIMIT, WHOSE, by="cgroup"))  # the fixture sees that the group is gone, and with it the sleeper


@with_groups
def test_a_killed_parents_group_is_swept() -> None:
    code = (
        "import os, signal\nfrom exporter.validate.limits import *\n"
        "with enforced(Limit(1 << 28, '', by='cgroup')) as e: print(e.path, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    left = Path(done.stdout.strip())
    with limits.enforced(Limit(LIMIT, "", by="cgroup")) as enforced:
        assert isinstance(enforced, limits._Group)
        assert enforced.path.is_dir()
        assert not left.exists()
        limits.sweep(enforced.path.parent)  # not that of a living one
        assert enforced.path.is_dir()
    assert not enforced.path.exists()


@with_groups
def test_a_group_that_lets_nothing_in_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_runs", lambda command: "cgroup.procs" not in " ".join(command))
    assert run(BELOW, Limit(LIMIT, WHOSE))["memory"]["limit_by"] != "cgroup"


# /proc/self/mountinfo and /proc/self/cgroup of other machines.
SYSTEMD = (
    "35 24 0:30 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n",
    "0::/user.slice/user-1000.slice/user@1000.service/app.slice/term.scope\n",
)
HYBRID = (
    "30 24 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    "33 24 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    "34 24 0:30 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n",
    "4:memory:/job\n1:cpu:/\n0::/\n",
)
DOCKER = (
    "40 24 0:26 /docker/0a1b /sys/fs/cgroup/memory ro master:9 - cgroup cgroup rw,memory\n",
    "4:memory:/docker/0a1b/inner\n",
)


@pytest.mark.parametrize(
    ("machine", "found"),
    [
        (SYSTEMD, [(2, "/sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/app.slice/term.scope")]),
        (HYBRID, [(2, "/sys/fs/cgroup/unified"), (1, "/sys/fs/cgroup/memory/job")]),
        (DOCKER, [(1, "/sys/fs/cgroup/memory/inner")]),
        (("", ""), []),
    ],
)
def test_where_our_group_is(tmp_path: Path, machine: tuple[str, str], found: list[tuple[int, str]]) -> None:
    (tmp_path / "mountinfo").write_text(machine[0])
    (tmp_path / "cgroup").write_text(machine[1])
    assert [(version, str(own)) for version, own, _ in limits.own_groups(tmp_path)] == found
    assert limits.own_groups(tmp_path / "none") == []


def test_version_2_takes_the_nearest_group_that_passes_memory_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are only written and read here: no kernel has made them."""
    own = tmp_path / "user.slice" / "app.slice" / "term.scope"
    own.mkdir(parents=True)
    for path, passed in [(own, ""), (own.parent, "memory pids"), (own.parents[1], "cpu memory"), (tmp_path, "memory")]:
        (path / "cgroup.subtree_control").write_text(passed + "\n")
    monkeypatch.setattr(limits, "own_groups", lambda: [(2, own, tmp_path)])
    assert [path for _, path in limits._parents()] == [own.parent, own.parents[1], tmp_path]
    group = limits._Group2(Limit(LIMIT, ""), own)
    group.set_up()
    written = {name: (own / name).read_text() for name, _ in group.limits}
    assert written == {"memory.max": str(LIMIT), "memory.swap.max": "0", "memory.oom.group": "1"}
    assert int((own / "cgroup.procs").read_text()) > 0
    (own / "memory.events").write_text("low 0\nhigh 0\nmax 0\noom 0\noom_kill 1\n")
    assert not group.exceeded("")  # the machine's own lack of memory
    (own / "memory.events").write_text("low 0\nhigh 0\nmax 7\noom 1\noom_kill 1\n")
    assert group.exceeded("")
    (own / "memory.peak").write_text("12345\n")
    (own / "memory.stat").write_text("anon 5\nworkingset_refault_file 3\n")
    again = 3 * os.sysconf("SC_PAGE_SIZE")
    figures = {"limit_bytes": LIMIT, "limit_by": "cgroup", "limit_peak_bytes": 12345, "limit_read_again_bytes": again}
    assert group.figures() == figures


def test_every_way_has_words() -> None:
    assert set(limits.WORDS) == {"cgroup", "rlimit", "watch", "cuda"}
    assert Enforced(Limit(5, "")).figures() == {"limit_bytes": 5, "limit_by": "watch"}


# GPUs


def test_options_of_the_cuda_provider() -> None:
    assert limits.cuda_options(0) == {}
    assert limits.cuda_options(15 << 30)["gpu_mem_limit"] == str(15 << 30)


def test_on_cuda_the_runtime_keeps_the_limit() -> None:
    limit = Limit(17 << 30, "", device=15 << 30)
    asked = onnx_worker.Request("model.onnx", 1, CUDA)
    assert onnx_worker.under(asked, limit) == (replace(asked, device_limit=15 << 30), None)
    assert onnx_worker.under(asked, None) == (asked, None)
    asked = replace(asked, provider=CPU)
    assert onnx_worker.under(asked, limit) == (asked, limit)


def test_a_share_of_the_gpu_for_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here: what torch is asked for."""
    torch = pytest.importorskip("torch")
    asked: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: type("P", (), {"total_memory": 80 << 30}))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: asked.append(given))
    assert limits.limit_torch(16 << 30) == 0.2
    assert limits.limit_torch(90 << 30, 1) == 1.0
    assert asked == [(0.2, 0), (1.0, 1)]
