"""The roster: the requests in an engine, and which of their waveforms are in flight."""

import time
from collections.abc import Collection, Iterable, Set
from dataclasses import dataclass, field
from math import inf

from audioldm2_triton.contract import BATCH
from audioldm2_triton.errors import UnavailableError, as_exception
from audioldm2_triton.server import faults
from audioldm2_triton.server.settings import LAXITY
from engine.foresight import Ahead, lateness, rounds_until_entry, seconds_ahead
from engine.job import Job, JobStatus
from engine.laxity import Held, HeldWaveform, Room, least_item_seconds, round_seconds, schedule, seconds_alone
from engine.limits import EngineLimits, EngineLoad
from engine.pace import Pace
from engine.policy import Waiting, admit
from stepping.forward_plan import ForwardCosts
from stepping.waveform import WaveformState


@dataclass
class Admission:
    """The outcome of an admission."""

    has_changed: bool = False  # which waveforms are in flight
    started: list[Job] = field(default_factory=list)  # whose first waveform has entered
    failed: list[tuple[Job, Exception]] = field(default_factory=list)


class Roster:
    """The requests of one engine, from their arrival until they are answered. Belongs to the engine's lock."""

    def __init__(self, limits: EngineLimits) -> None:
        self.jobs: list[Job] = []  # in order of arrival
        self.in_flight: dict[WaveformState, Job] = {}  # each waveform with its owner, in order of admission
        self.paused: dict[WaveformState, Job] = {}  # between two of their steps
        self._limits = limits
        self._looks = 0
        self._is_stale = True  # something came or left since it was decided who steps
        self._turn_since = 0.0  # when the last turn by age ended, or work came
        self._review_at = inf

    @property
    def room(self) -> int:
        """Latent frames that may still enter; negative while a waveform longer than the limit is in flight."""
        return self._limits.max_active_frames - self._frames(self.in_flight)

    @property
    def _pending(self) -> list[WaveformState]:
        """The waveforms that are paused or not yet in flight, in order of arrival."""
        return [*self.paused, *(waveform for job in self.jobs for waveform in job.pending)]

    @property
    def load(self) -> EngineLoad:
        self._looks += 1
        waiting = sum(job.status is JobStatus.WAITING for job in self.jobs)
        pending = self._pending
        return EngineLoad(
            number=self._looks,
            active_rows=sum(waveform.unet_items for waveform in self.in_flight),
            pending_rows=sum(waveform.unet_items for waveform in pending),
            active_requests=len(self.jobs) - waiting,
            waiting_requests=waiting,
            is_full=waiting >= self._limits.max_waiting,
            free_frames=self.room - self._frames(pending),
        )

    def add(self, job: Job, costs: ForwardCosts | None, pace: Pace) -> None:
        """Takes in a request.

        Raises `UnavailableError`, which says when to try again, if there is no room and either the waiting list is full
        or the request could not be done by its deadline after those before it.
        """
        load = self.load
        if self.jobs and self._frames(job.waveforms) > load.free_frames:
            job.status = JobStatus.WAITING
            if load.is_full:
                full = f"{load.active_requests} requests in flight and {load.waiting_requests} waiting"
                raise UnavailableError(f"denoiser is full: {full}; {self._when(costs, pace)}")
            if job.request.deadline_ns > 0 and costs is not None:
                self._check_promise(job, costs, pace)
        if not self.jobs:
            self._turn_since = time.monotonic()
        self.jobs.append(job)
        self._is_stale = True

    def _check_promise(self, job: Job, costs: ForwardCosts, pace: Pace) -> None:
        """Raises `UnavailableError` for a request that others before it make late; alone it would be done in time."""
        now = time.monotonic()
        left_s = job.request.deadline_ns / 1e9 - now
        needed_s = job.least_seconds * pace.least
        if self._limits.scheduling == LAXITY:
            most_s = sum(self._most(each, costs) for each in self.jobs) * pace.least
            if lateness(left_s, needed_s, most_s) <= 0:
                return  # as nearly always: a burst of requests must not be ranked again and again
            held = [self._held(each, costs, ()) for each in (*self.jobs, job)]
            wait_s = seconds_ahead(held, now, costs, self._limits.max_active_rows, pace.least)
        else:
            round_s = round_seconds(self._held_waveforms(self.in_flight, ()), costs) * pace.least
            wait_s = self._rounds_until_entry([*self._pending, *job.pending]) * round_s
        late_s = lateness(left_s, needed_s, wait_s)
        if late_s > 0:
            raise UnavailableError(
                f"denoiser is busy: {left_s:.1f} s are left, but those before it take about {wait_s:.1f} s, and it at"
                f" least {needed_s:.1f} s; retry after {late_s:.1f} s"
            )

    def _when(self, costs: ForwardCosts | None, pace: Pace) -> str:
        round_s = 0.0 if costs is None else round_seconds(self._held_waveforms(self.in_flight, ()), costs) * pace.usual
        # By laxity there may be room for whoever waits, so that it is the first to be done who makes a place.
        first = min((each.table.num_evaluations - each.evaluation for each in self.in_flight), default=0)
        wait_s = (self._rounds_until_entry(self._pending[:1]) or first) * round_s
        return f"retry after {wait_s:.1f} s" if wait_s else "try again later"

    def admit(self, costs: ForwardCosts | None, pace: float, amid_step: Collection[WaveformState]) -> Admission:
        """Admits waveforms, or pauses and resumes them too, as the limits' scheduling says.

        Args:
            pace: what a forward takes usually, as a multiple of its cost.
            amid_step: which cannot pause.
        """
        if self._limits.scheduling == LAXITY and costs is not None:
            return self._schedule(time.monotonic(), costs, pace, amid_step)
        return self._admit_in_order()

    def _admit_in_order(self) -> Admission:
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

    def _schedule(
        self, now: float, costs: ForwardCosts, pace: float, amid_step: Collection[WaveformState]
    ) -> Admission:
        """Changes who is in flight, as `laxity.schedule` decides, if something came or left since it last did."""
        admission = Admission()
        if not self._is_stale and now < self._review_at:
            return admission
        limits = self._limits
        held = [self._held(job, costs, amid_step) for job in self.jobs]
        room = Room(limits.max_active_frames, limits.max_active_rows, limits.max_started)
        decided = schedule(held, now, self._turn_since, costs, room, pace)
        self._is_stale, self._review_at = False, decided.review_at
        if decided.turn is not None:
            self.jobs[decided.turn].has_turn = True
        for job, count in zip(list(self.jobs), decided.counts, strict=True):
            try:
                self._set_stepping(job, count, admission)
            except BaseException as error:
                admission.failed.append((job, as_exception(error)))
        return admission

    def _held(self, job: Job, costs: ForwardCosts, amid_step: Collection[WaveformState]) -> Held:
        waveforms = self._held_waveforms(job.unfinished, job.pending, amid_step)
        deadline = job.request.deadline_ns / 1e9 if job.request.deadline_ns > 0 else inf
        is_batch = job.request.priority == BATCH
        has_begun = len(job.pending) < len(job.waveforms)
        return Held(
            job.submitted_ns / 1e9, deadline, is_batch, self._alone(job, costs), waveforms, job.has_turn, has_begun
        )

    def _alone(self, job: Job, costs: ForwardCosts) -> float:
        if job.alone is None:  # which is asked before its first step
            job.alone = seconds_alone(self._held_waveforms(job.waveforms, job.pending), costs)
        return job.alone

    def _most(self, job: Job, costs: ForwardCosts) -> float:
        """Returns the seconds that its steps take at most, in forwards of as many items as there is room for."""
        if job.most is None:
            waveforms = self._held_waveforms(job.waveforms, job.pending)
            at_best = (
                each.evaluations * each.items * least_item_seconds(each.frames, costs, self._limits.max_active_rows)
                for each in waveforms
            )
            job.most = max(self._alone(job, costs), sum(at_best))
        return job.most

    def _held_waveforms(
        self,
        waveforms: Iterable[WaveformState],
        pending: Collection[WaveformState],
        amid_step: Collection[WaveformState] = (),
    ) -> tuple[HeldWaveform, ...]:
        waiting = set(pending)
        return tuple(
            HeldWaveform(
                waveform.step_items,
                waveform.row_frames,
                self._frames([waveform]),
                waveform.table.num_evaluations - waveform.evaluation,
                waveform.in_turns,
                waveform not in waiting,
                waveform in amid_step,
            )
            for waveform in waveforms
        )

    def _set_stepping(self, job: Job, count: int, admission: Admission) -> None:
        """Has the first so many of a job's unfinished waveforms in flight, and no others."""
        unfinished = job.unfinished
        for waveform in unfinished[count:]:
            if waveform in self.in_flight:
                self.paused[waveform] = self.in_flight.pop(waveform)
                admission.has_changed = True
        for waveform in unfinished[:count]:
            if waveform in self.paused:
                del self.paused[waveform]
                self._put_in_flight(waveform, job, admission)
            elif waveform not in self.in_flight:
                self._let_in(job, admission)

    def _let_in(self, job: Job, admission: Admission) -> None:
        faults.at("denoiser.admit")
        self._put_in_flight(job.pending.popleft(), job, admission)
        if job.status is not JobStatus.IN_FLIGHT:
            job.status = JobStatus.IN_FLIGHT
            admission.started.append(job)

    def _put_in_flight(self, waveform: WaveformState, job: Job, admission: Admission) -> None:
        self.in_flight[waveform] = job
        waveform.last_step = time.perf_counter()  # it has not waited: the turn is another length's
        admission.has_changed = True

    def leave(self, waveforms: Iterable[WaveformState]) -> bool:
        """Removes waveforms from flight. Returns whether any of them was in flight."""
        before = len(self.in_flight)
        for waveform in waveforms:
            self.in_flight.pop(waveform, None)
            self.paused.pop(waveform, None)
        self._is_stale = True
        return len(self.in_flight) < before

    def remove(self, job: Job) -> None:
        self.jobs.remove(job)
        self._is_stale = True
        if job.has_turn:
            self._turn_since = time.monotonic()

    def owners_of(self, waveforms: Iterable[WaveformState]) -> list[Job]:
        """Returns the requests of the given waveforms that are in flight or paused, each once."""
        owners = (self.in_flight.get(waveform) or self.paused.get(waveform) for waveform in waveforms)
        return list(dict.fromkeys(job for job in owners if job is not None))

    def at_stake(self, grouped: Set[WaveformState]) -> tuple[WaveformState, ...]:
        """Returns the waveforms in flight, and the paused ones whose histories are still in their groups' batches."""
        return (*self.in_flight, *(grouped & self.paused.keys()))

    def request_of(self) -> dict[WaveformState, int]:
        """Returns each waveform in flight with its request's number, which does not keep the request alive."""
        return {waveform: id(job) for waveform, job in self.in_flight.items()}

    def _rounds_until_entry(self, pending: Iterable[WaveformState]) -> int:
        def ahead(waveforms: Iterable[WaveformState]) -> list[Ahead]:
            return [Ahead(self._frames((each,)), each.table.num_evaluations - each.evaluation) for each in waveforms]

        return rounds_until_entry(ahead(self.in_flight), ahead(pending), self.room)

    def _frames(self, waveforms: Iterable[WaveformState]) -> int:
        return sum(self._limits.frames(waveform.unet_items, waveform.row_frames) for waveform in waveforms)
