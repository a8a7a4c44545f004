"""Ray itself: a cluster that is there, or one on this machine for as long as it is needed."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError, MissingExtra, UsageError
from exporter.pipeline.machine import usable_cpus

# Nothing is reported home, nobody else's virtual environment is made on the workers, and a proof's speed is not that
# of a background process. Ray itself says nothing: its lines on lost workers would go to stdout, among the answer.
_QUIET = {
    "RAY_DEDUP_LOGS": "1",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_worker_niceness": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_STORE_BYTES = 100_000_000  # of shared memory for what travels: records and reports
_ANSWER_SECONDS = 10.0
_LONGEST = 40  # characters of a folder in which Ray's sockets still have names that the system takes


def require_ray(address: str | None) -> None:
    """Raises MissingExtra where Ray is not installed, UsageError for an address of another kind."""
    if importlib.util.find_spec("ray") is None:  # imported, it would remember the environment of now
        raise MissingExtra("ray", "ray", "work on a cluster")
    if address and address.startswith("ray://"):
        raise UsageError(
            f"{address} is for clients outside the cluster",
            hint="run exporter on a machine of the cluster, which sees --out, with --address HOST:6379",
        )
    host, _, port = (address or "").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:  # Ray itself tries for two minutes
        socket.create_connection((host, int(port)), _ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """The ray module, connected to `address`, or to a cluster of this machine's processors that ends with the block."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    folder = None if address else _scratch()
    with _environment(_QUIET if address else _QUIET | _own_token()):
        import ray

        logging.getLogger("ray").setLevel(logging.CRITICAL)
        try:
            # Ray has workers import from the driver's working directory first: not what is called exporter there.
            with chdir(os.sep), _hushed():
                _start(ray, address, folder)
            for number, handler in handlers.items():  # Ray puts its own in their place
                signal.signal(number, handler)
            yield ray
        finally:
            ray.shutdown()
            if folder:
                shutil.rmtree(folder, ignore_errors=True)


def _start(ray: Any, address: str | None, folder: Path | None) -> None:
    quiet = {"configure_logging": False, "log_to_driver": False}
    try:
        if address:
            ray.init(address=address, **quiet)
            return
        ray.init(
            address="local",
            num_cpus=usable_cpus(),
            include_dashboard=False,
            object_store_memory=_STORE_BYTES,
            _temp_dir=str(folder),
            **quiet,
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        if address:
            raise _no_cluster(address, error) from error
        raise ExporterError(f"Ray does not start here: {_first_line(error)}", hint="--executor local") from error


def _no_cluster(address: str | None, error: Exception) -> ExporterError:
    return ExporterError(
        f"no Ray cluster at {address}: {_first_line(error)}",
        hint="`ray status` shows whether one runs; without --address one is started on this machine",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@contextmanager
def _hushed() -> Iterator[None]:
    """Nothing on stderr: what Ray's native code says there of every second that it waits, its error says too."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


@functools.cache  # Ray remembers it for as long as this process lives
def _own_token() -> dict[str, str]:
    """A password for clusters of this process alone; Ray would write one into the user's home."""
    return {} if os.environ.get("RAY_AUTH_MODE") else {"RAY_AUTH_TOKEN": secrets.token_hex(32)}


def _scratch() -> Path:
    usual = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="exporter-ray-", dir=usual if len(usual) < _LONGEST - 21 else "/tmp"))


@contextmanager
def _environment(names: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in (*names, "RAY_AUTH_MODE")}  # which Ray sets itself
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
