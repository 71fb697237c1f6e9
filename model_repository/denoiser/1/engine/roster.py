"""The roster: the requests in an engine, and which of their waveforms are in flight."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from audioldm2_triton.errors import UnavailableError, as_exception
from audioldm2_triton.server import faults
from engine.job import Job, JobStatus
from engine.limits import EngineLimits, EngineLoad
from engine.policy import Waiting, admit
from stepping.waveform import WaveformState


@dataclass
class Admission:
    """The outcome of an admission."""

    entered: int = 0  # waveforms
    started: list[Job] = field(default_factory=list)  # whose first waveform has entered
    failed: list[tuple[Job, Exception]] = field(default_factory=list)


class Roster:
    """The requests of one engine, from their arrival until they are answered. Belongs to the engine's lock."""

    def __init__(self, limits: EngineLimits) -> None:
        self.jobs: list[Job] = []  # in order of arrival
        self.in_flight: dict[WaveformState, Job] = {}  # each waveform with its owner, in order of admission
        self._limits = limits
        self._looks = 0

    @property
    def room(self) -> int:
        """Latent frames that may still enter; negative while a waveform longer than the limit is in flight."""
        return self._limits.max_active_frames - self._frames(self.in_flight)

    @property
    def load(self) -> EngineLoad:
        self._looks += 1
        waiting = sum(job.status is JobStatus.WAITING for job in self.jobs)
        pending = [waveform for job in self.jobs for waveform in job.pending]
        return EngineLoad(
            number=self._looks,
            active_rows=sum(waveform.unet_items for waveform in self.in_flight),
            pending_rows=sum(waveform.unet_items for waveform in pending),
            active_requests=len(self.jobs) - waiting,
            waiting_requests=waiting,
            is_full=waiting >= self._limits.max_waiting,
            free_frames=self.room - self._frames(pending),
        )

    def add(self, job: Job) -> None:
        """Raises `UnavailableError` if there is no room and the waiting list is full."""
        load = self.load
        if self.jobs and self._frames(job.waveforms) > load.free_frames:
            job.status = JobStatus.WAITING
            if load.is_full:
                raise UnavailableError(
                    f"denoiser is full: {load.active_requests} requests in flight and {load.waiting_requests} waiting;"
                    " try again later"
                )
        self.jobs.append(job)

    def admit(self) -> Admission:
        """Admits waveforms, as `policy.admit` decides."""
        waiting = [job for job in self.jobs if job.pending]
        sizes = (Waiting(tuple(self._frames([waveform]) for waveform in job.pending)) for job in waiting)
        admission = Admission()
        for job, count in zip(waiting, admit(sizes, self.room, not self.in_flight), strict=False):
            try:
                for _ in range(count):
                    self._let_in(job, admission)
            except BaseException as error:
                admission.failed.append((job, as_exception(error)))
        return admission

    def _let_in(self, job: Job, admission: Admission) -> None:
        faults.at("denoiser.admit")
        self.in_flight[job.pending.popleft()] = job
        admission.entered += 1
        if job.status is not JobStatus.IN_FLIGHT:
            job.status = JobStatus.IN_FLIGHT
            admission.started.append(job)

    def leave(self, waveforms: Iterable[WaveformState]) -> bool:
        """Removes waveforms from flight. Returns whether any of them was in flight."""
        before = len(self.in_flight)
        for waveform in waveforms:
            self.in_flight.pop(waveform, None)
        return len(self.in_flight) < before

    def remove(self, job: Job) -> None:
        self.jobs.remove(job)

    def owners_of(self, waveforms: Iterable[WaveformState]) -> list[Job]:
        """Returns the requests of the given waveforms that are in flight, each once."""
        owners = (self.in_flight.get(waveform) for waveform in waveforms)
        return list(dict.fromkeys(job for job in owners if job is not None))

    def request_of(self) -> dict[WaveformState, int]:
        """Returns each waveform in flight with its request's number, which does not keep the request alive."""
        return {waveform: id(job) for waveform, job in self.in_flight.items()}

    def _frames(self, waveforms: Iterable[WaveformState]) -> int:
        return sum(self._limits.frames(waveform.unet_items, waveform.row_frames) for waveform in waveforms)
