"""One engine without a UNet: it decides as the real one does, and a forward takes what it costs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, inf

from audioldm2_triton.server.settings import LAXITY
from engine.foresight import Ahead, lateness, rounds_until_entry, seconds_ahead
from engine.laxity import Held, HeldWaveform, Room, round_seconds, schedule, seconds_alone
from engine.limits import EngineLimits
from engine.policy import InFlight, Waiting, admit, next_group, plan_groups
from simulation.pace import STEADY, Pace
from simulation.workload import Request
from stepping.forward_plan import ForwardCosts


@dataclass(eq=False)
class Waveform:
    left: int  # evaluations
    started: bool = False
    last_step: float = 0.0  # or its entry


@dataclass(eq=False)
class Job:
    """A request in an engine."""

    request: Request
    alone: float
    waveforms: list[Waveform]
    waits: bool = False  # there was no room on arrival
    has_turn: bool = False
    stepping: int = 0  # how many of its first unfinished waveforms are in flight
    began: float | None = None
    finished: float | None = None

    @property
    def latency(self) -> float:
        return inf if self.finished is None else self.finished - self.request.arrived

    @property
    def deadline(self) -> float:
        return self.request.arrived + self.request.timeout


@dataclass
class _Group:
    members: list[tuple[Job, Waveform]]
    seconds: float


@dataclass
class SimulatedEngine:
    """Steps the requests that it is given. Its clock stands at the end of the last forward."""

    costs: ForwardCosts
    limits: EngineLimits
    pace: Pace = STEADY  # of the machine; what is decided goes by the costs alone
    now: float = 0.0
    forwards: int = 0
    pauses: int = 0
    foresees: bool = True  # it refuses at once what others make late
    longest_round: float = 0.0
    jobs: list[Job] = field(default_factory=list)
    _groups: list[_Group] = field(default_factory=list)
    _is_stale: bool = True
    _turn_since: float = 0.0
    _review_at: float = inf

    @property
    def free_frames(self) -> int:
        held = sum(len(job.waveforms) * self._frames(job) for job in self.jobs)
        return self.limits.max_active_frames - held

    @property
    def _room(self) -> int:
        return self.limits.max_active_frames - sum(job.stepping * self._frames(job) for job in self.jobs)

    def submit(self, request: Request) -> Job | None:
        """Takes a request on its arrival, which must not be later than the clock. Returns None if it is refused."""
        parts = [HeldWaveform(request.items, request.frames, 0, request.steps)] * request.waveforms
        waveforms = [Waveform(request.steps) for _ in parts]
        job = Job(request, seconds_alone(parts, self.costs), waveforms)
        if not self.jobs:
            self._turn_since = self.now = max(self.now, request.arrived)
        elif request.waveforms * self._frames(job) > self.free_frames:
            job.waits = True
            if sum(other.waits for other in self.jobs) >= self.limits.max_waiting:
                return None
            if self.foresees and self._is_promised_too_late(job):
                return None
        self.jobs.append(job)
        self._is_stale = True
        return job

    def run(self, until: float) -> None:
        """Runs every forward that begins before a time."""
        while self.jobs and self.now < until:
            self._expire()
            if self._is_stale or self.now >= self._review_at:
                if not self.jobs:
                    break
                self._decide()
            group = self._groups[next_group([min(part.last_step for _, part in g.members) for g in self._groups])]
            seconds = group.seconds * self.pace.at(self.now)
            steps = 1
            if len(self._groups) == 1:  # nothing can change before
                changes = (until, self._review_at, self.pace.changes_after(self.now))
                horizon = min(*changes, *(job.deadline for job in self.jobs))
                left = min(part.left for _, part in group.members)
                steps = left if horizon == inf else max(1, min(left, ceil((horizon - self.now) / seconds)))
            self.now += steps * seconds
            self.forwards += steps
            for _, part in group.members:
                part.last_step, part.left = self.now, part.left - steps
            if any(part.left == 0 for _, part in group.members):
                self._finish({job for job, part in group.members if part.left == 0})

    def _is_promised_too_late(self, job: Job) -> bool:
        limits = self.limits
        if limits.scheduling == LAXITY:
            held = [self._held(each) for each in (*self.jobs, job)]
            wait = seconds_ahead(held, self.now, self.costs, limits.max_active_rows, 1.0)
        else:
            stepping, pending = list[HeldWaveform](), list[HeldWaveform]()
            for each in (*self.jobs, job):
                parts = self._held(each).waveforms
                stepping += parts[: each.stepping]
                pending += parts[each.stepping :]
            in_flight, waiting = (
                [Ahead(part.room, part.evaluations) for part in parts] for parts in (stepping, pending)
            )
            wait = rounds_until_entry(in_flight, waiting, self._room) * round_seconds(stepping, self.costs)
        needed = job.request.steps * self.costs.cheapest(job.request.items, job.request.frames, False)[0]
        return lateness(job.deadline - self.now, needed, wait) > 0

    def _finish(self, jobs: set[Job]) -> None:
        self._is_stale = True
        for job in jobs:
            job.stepping -= sum(part.left == 0 for part in job.waveforms)
            job.waveforms = [part for part in job.waveforms if part.left]
            if not job.waveforms:
                job.finished = self.now
                self.jobs.remove(job)
                if job.has_turn:
                    self._turn_since = self.now

    def _expire(self) -> None:
        """Drops whoever cannot be done by its deadline any more, as the engine does before a step."""
        for job in [each for each in self.jobs if each.deadline < inf]:
            left = max(part.left for part in job.waveforms)
            if self.now + left * self.costs.cheapest(job.request.items, job.request.frames, False)[0] > job.deadline:
                self.jobs.remove(job)
                self._is_stale = True
                if job.has_turn:
                    self._turn_since = self.now

    def _decide(self) -> None:
        counts = self._by_laxity() if self.limits.scheduling == LAXITY else self._in_order()
        for job, count in zip(self.jobs, counts, strict=True):
            self.pauses += max(0, job.stepping - count)
            for part in job.waveforms[job.stepping : count]:
                part.last_step = self.now
            job.stepping = count
            for part in job.waveforms[:count]:
                part.started = True
            if count and job.began is None:
                job.began, job.waits = self.now, False
        self._is_stale = False
        members = [(job, part) for job in self.jobs for part in job.waveforms[: job.stepping]]
        plain = [InFlight(id(job), job.request.items, job.request.frames, False) for job, _ in members]
        self._groups = []
        for planned in plan_groups(plain, self.costs):
            lengths = {plain[index].frames for index in planned.indices}
            items = sum(plain[index].items for index in planned.indices)
            seconds = self.costs.cheapest(items, max(lengths), len(lengths) > 1)[0]
            self._groups.append(_Group([members[index] for index in planned.indices], seconds))
        self.longest_round = max(self.longest_round, sum(group.seconds for group in self._groups))

    def _in_order(self) -> list[int]:
        waiting = [job for job in self.jobs if job.stepping < len(job.waveforms)]
        sizes = [Waiting((self._frames(job),) * (len(job.waveforms) - job.stepping)) for job in waiting]
        entering = admit(sizes, self._room, not any(job.stepping for job in self.jobs))
        more = dict(zip(map(id, waiting), entering, strict=False))
        return [job.stepping + more.get(id(job), 0) for job in self.jobs]

    def _by_laxity(self) -> list[int]:
        limits = self.limits
        room = Room(limits.max_active_frames, limits.max_active_rows, limits.max_started)
        held = [self._held(job) for job in self.jobs]
        decided = schedule(held, self.now, self._turn_since, self.costs, room)
        self._review_at = decided.review_at
        if decided.turn is not None:
            self.jobs[decided.turn].has_turn = True
        return decided.counts

    def _held(self, job: Job) -> Held:
        request = job.request
        parts = tuple(
            HeldWaveform(request.items, request.frames, self._frames(job), part.left, started=part.started)
            for part in job.waveforms
        )
        has_begun = job.began is not None
        return Held(request.arrived, job.deadline, request.is_batch, job.alone, parts, job.has_turn, has_begun)

    def _frames(self, job: Job) -> int:
        return self.limits.frames(job.request.items, job.request.frames)


def simulate(requests: Sequence[Request], engines: Sequence[SimulatedEngine]) -> list[Job | None]:
    """Returns what became of requests in order of arrival, each at the engine with the most room; None: refused."""
    jobs = []
    for request in requests:
        for engine in engines:
            engine.run(request.arrived)
        jobs.append(max(engines, key=lambda engine: engine.free_frames).submit(request))
    for engine in engines:
        engine.run(inf)
    return jobs
