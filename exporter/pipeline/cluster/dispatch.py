"""Jobs and machines: each job goes to a free machine when what it needs is done, and again when its worker was lost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import ExporterError
from exporter.pipeline.cluster.machines import Machine, Machines, last_line
from exporter.pipeline.cluster.ticket import Ticket
from exporter.pipeline.cluster.work import Outcome, perform

_TRIES = 3  # workers that a job may lose
_LOOK_SECONDS = 1.0
_NO_MACHINE_SECONDS = 120.0  # without any machine, before the run gives up


@dataclass(frozen=True)
class Job:
    """Something that a worker does: `call(*arguments)`, on files in the model's output folder `folder`.

    group: of jobs that others wait for together; after: groups that must be done. twice: whether a worker that was
    lost, but lives, may do it beside the one that was sent after it.
    """

    name: str
    folder: Path
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    group: str = ""
    after: frozenset[str] = frozenset()
    twice: bool = False


class Dispatcher:
    """Runs jobs on the machines of a cluster, one at a time on each."""

    def __init__(self, ray: Any, ticket: Ticket, machines: Machines, on_lost: Callable[[str], None]) -> None:
        self._ray, self._ticket, self._machines, self._on_lost = ray, ticket, machines, on_lost
        self._perform = ray.remote(perform)
        self._waiting: list[Job] = []
        self._running: dict[Any, tuple[Job, Machine]] = {}
        self._failed: dict[str, Mapping[str, Any]] = {}
        self._lost: Counter[str] = Counter()
        self._seen = time.monotonic()

    def run(self, jobs: Sequence[Job], on_done: Callable[[Job, Outcome], None]) -> None:
        """Do all jobs, earlier ones first where there is a choice. `on_done` is called here, once for each.

        A job whose group before failed gets the same error. Raises ExporterError when no machine is left.
        """
        self._waiting = list(jobs)
        while self._waiting or self._running:
            for job, error in self._hopeless():
                self._end(job, Outcome(error=error), on_done)
            self._send()
            if not self._running:
                self._require_machines()
                continue
            ended, _ = self._ray.wait(list(self._running), num_returns=1, timeout=_LOOK_SECONDS)
            # Ray may wait for minutes for a worker that hangs on a machine that is known to be lost.
            gone = [reference for reference, (_, machine) in self._running.items() if self._machines.lost(machine)]
            for reference in {*ended, *gone}:
                job, machine = self._running.pop(reference)
                outcome = self._outcome(reference, job, machine) if reference in ended else self._again(job, machine)
                if outcome is None:
                    self._waiting.insert(0, job)
                else:
                    self._end(job, outcome, on_done)

    def _end(self, job: Job, outcome: Outcome, on_done: Callable[[Job, Outcome], None]) -> None:
        if outcome.error is not None and job.group:
            self._failed.setdefault(job.group, outcome.error)
        on_done(job, outcome)

    def _hopeless(self) -> list[tuple[Job, Mapping[str, Any]]]:
        """Jobs that wait for what failed, taken off the list."""
        found = [(j, self._failed[g]) for j in self._waiting for g in sorted(j.after) if g in self._failed]
        taken = {id(job) for job, _ in found}
        self._waiting = [job for job in self._waiting if id(job) not in taken]
        return list({id(job): (job, error) for job, error in found}.values())

    def _send(self) -> None:
        busy = [machine for _, machine in self._running.values()]
        free = self._machines.free(busy)
        for job in list(self._waiting):
            if not free:
                return
            open_groups = {j.group for j in (*self._waiting, *(j for j, _ in self._running.values()))}
            if job.after & open_groups:
                continue
            machine = free.pop(0)
            name = "" if job.twice else job.name
            task = self._perform.options(**machine.options(self._ray, job.name))
            reference = task.remote(self._ticket, job.folder, name, job.call, job.arguments)
            self._running[reference] = (job, machine)
            self._waiting.remove(job)

    def _require_machines(self) -> None:
        """Nothing runs: machines are on their way, or were lost."""
        now = time.monotonic()
        if self._machines.free(()):
            self._seen = now
        elif now - self._seen > _NO_MACHINE_SECONDS:
            raise ExporterError(
                "no machine of the cluster is left", hint="`ray status` shows them; the same command goes on"
            )
        else:
            time.sleep(_LOOK_SECONDS)

    def _outcome(self, reference: Any, job: Job, machine: Machine) -> Outcome | None:
        """What a job came to; None where its worker was lost, and the job is to be sent again."""
        try:
            outcome: Outcome = self._ray.get(reference)
            self._seen = time.monotonic()
            return outcome
        except self._ray.exceptions.RayTaskError as error:  # before `perform` was reached
            return Outcome(error=_failure(f"{machine.name} cannot take work: {last_line(error)}"))
        except self._ray.exceptions.OutOfMemoryError:
            return self._again(job, machine, f"{machine.name} ran out of memory", "a smaller --max-memory")
        except self._ray.exceptions.WorkerCrashedError:
            return self._again(job, machine, f"the worker on {machine.name} was killed", "not enough memory there?")
        except self._ray.exceptions.RayError:
            return self._again(job, machine)

    def _again(self, job: Job, machine: Machine, reason: str = "", hint: str = "") -> Outcome | None:
        """None, for another try; after the last one the error."""
        reason = reason or f"{machine.name} was lost"
        self._lost[job.name] += 1
        if self._lost[job.name] < _TRIES:
            self._on_lost(f"{job.name}: {reason}")
            return None
        message = f"{reason}; {job.name} has now lost {_TRIES} workers"
        return Outcome(error=_failure(message, hint or "`ray status` shows the machines; the same command goes on"))


def _failure(message: str, hint: str | None = None) -> dict[str, Any]:
    return {"message": message, "hint": hint, "exit_code": 1}
