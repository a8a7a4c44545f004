"""The machines of a cluster that may work: those that see what the driver sees."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError, Refused
from exporter.pipeline.cluster.ticket import Seen, Ticket, look
from exporter.pipeline.cluster.work import Outcome, perform

_LOOK_SECONDS = 300.0  # for a machine to open the checkpoint and answer


@dataclass(frozen=True)
class Machine:
    """A place for one job: a machine, or the share of it that goes with one of its GPUs."""

    node: str
    name: str
    cpus: int
    gpus: int = 0
    share: int = 0

    def options(self, ray: Any, job: str) -> dict[str, Any]:
        """For a task that runs here and nowhere else, once."""
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id=self.node, soft=False)
        return {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus,
            "scheduling_strategy": strategy,
            "max_retries": 0,
            "name": job,
        }


class Machines:
    """Those that are there now. One that joins later is asked the same questions before it gets work."""

    def __init__(self, ray: Any, ticket: Ticket, on_refused: Callable[[str], None]) -> None:
        self._ray, self._on_refused = ray, on_refused
        self._perform = ray.remote(perform)
        self._accepted: dict[str, list[Machine]] = {}
        self._refused: set[str] = set()
        self._alive: set[str] = set()
        self._asked: dict[Any, list[Machine]] = {}
        self.ticket = ticket

    def require_alike(self, mark: str, otherwise: Path) -> Ticket:
        """Ask every machine; the ticket for all jobs, with the device and the cache of all.

        `mark`: a file in the ticket's cache; where a machine does not see it, the cache is `otherwise`. Raises Refused
        for one that differs, ExporterError where there is none.
        """
        asked = self._ask(self._new(), mark)
        if not asked:
            raise ExporterError("the Ray cluster has no processors", hint="`ray status` shows its machines")
        seen: list[Seen] = []
        devices: dict[str, str] = {}
        for reference, places in asked.items():
            seen.append(self._answer(reference, places))
            devices[seen[-1].device] = places[0].name
            self._accepted[places[0].node] = places
        if len(devices) > 1:
            raise Refused(
                f"{devices['cpu']} has no GPU, {devices['cuda']} has one: they would make different numbers",
                hint="--device cpu",
            )
        self.ticket = replace(self.ticket, device=next(iter(devices)))
        if not all(each.cache for each in seen):
            self.ticket = replace(self.ticket, cache=otherwise)
            otherwise.mkdir(parents=True, exist_ok=True)
        return self.ticket

    def free(self, busy: Sequence[Machine]) -> list[Machine]:
        """Places where nothing runs, of machines that are there and alike."""
        self._alive = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
        self._accepted = {node: places for node, places in self._accepted.items() if node in self._alive}
        self._take_new()
        return [place for places in self._accepted.values() for place in places if place not in busy]

    def lost(self, machine: Machine) -> bool:
        """Whether a machine was not there any more when `free` looked."""
        return machine.node not in self._alive

    def _take_new(self) -> None:
        """Ask machines that joined, without waiting for them."""
        self._asked |= self._ask(self._new(), "")
        if not self._asked:
            return
        answered, _ = self._ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)
        for reference in answered:
            places = self._asked.pop(reference)
            try:
                seen = self._answer(reference, places)
                if seen.device != self.ticket.device:
                    raise Refused(f"{places[0].name} computes on {seen.device}, not on {self.ticket.device}")
                self._accepted[places[0].node] = places
            except ExporterError as error:
                self._refused.add(places[0].node)
                self._on_refused(error.message)

    def _new(self) -> list[list[Machine]]:
        known = {*self._accepted, *self._refused, *(places[0].node for places in self._asked.values())}
        nodes = [node for node in self._ray.nodes() if node["Alive"] and node["NodeID"] not in known]
        return [places for node in nodes if (places := _places(node, self.ticket.device))]

    def _ask(self, machines: Sequence[list[Machine]], mark: str) -> dict[Any, list[Machine]]:
        asked = {}
        for places in machines:
            task = self._perform.options(**places[0].options(self._ray, f"look at {places[0].name}"))
            asked[task.remote(self.ticket, None, "", look, (self.ticket, mark))] = places
        return asked

    def _answer(self, reference: Any, places: Sequence[Machine]) -> Seen:
        name, exceptions = places[0].name, self._ray.exceptions
        try:
            outcome: Outcome = self._ray.get(reference, timeout=_LOOK_SECONDS)
        except exceptions.GetTimeoutError:
            raise ExporterError(
                f"{name} is busy with other work, or does not answer", hint="`ray status` shows what runs there"
            ) from None
        except exceptions.RayTaskError as error:  # exporter is not there, or has no such function
            raise Refused(
                f"{name} has no exporter {self.ticket.versions['exporter']}: {last_line(error)}",
                hint="install the same versions on all machines",
            ) from None
        except exceptions.RayError as error:
            raise ExporterError(f"{name} was lost: {last_line(error)}", hint="run the same command again") from None
        if outcome.error is not None:
            raise Refused(f"{name}: {outcome.error['message']}", hint=outcome.error["hint"])
        seen: Seen = outcome.value
        return seen


def new_mark(cache: Path) -> Path:
    """A file in the cache that machines are to look for."""
    cache.mkdir(parents=True, exist_ok=True)
    mark = cache / f".cluster-{secrets.token_hex(8)}"
    mark.touch()
    return mark


def last_line(error: Exception) -> str:
    """What Ray's error ends with; it begins with a traceback."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1].strip()[:300]


def _places(node: dict[str, Any], device: str) -> list[Machine]:
    """One, or one for each GPU of a machine; none on a machine that takes no tasks."""
    cpus, gpus = int(node["Resources"].get("CPU", 0)), int(node["Resources"].get("GPU", 0))
    if not cpus:
        return []
    name = f"machine {node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
    count = 1 if device == "cpu" else max(1, min(gpus, cpus))
    each = 1 if gpus and device != "cpu" else 0
    return [Machine(node["NodeID"], name, cpus // count, each, i) for i in range(count)]
