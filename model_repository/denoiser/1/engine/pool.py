"""The engines of one server, one per device: each request goes to the one with most room."""

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from weakref import WeakKeyDictionary, WeakValueDictionary

from audioldm2_triton.errors import UnavailableError, as_exception
from engine.engine import Engine
from engine.job import Job, OnProgress
from stepping.request import DenoisingRequest, OnDone
from stepping.schedule_table import ScheduleError, ScheduleTables


class EnginePool:
    """Takes requests, and control requests for them by name. Answers by callback, so that nothing here blocks."""

    def __init__(self, engines: Sequence[Engine], tables: ScheduleTables) -> None:
        self.engines = tuple(engines)
        self._tables = tables
        # Reading a new schedule off its scheduler can take seconds; other requests do not wait for it.
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="schedules")
        # Weak: a job is known while its engine holds it, and no longer.
        self._jobs: WeakValueDictionary[str, Job] = WeakValueDictionary()
        self._engine_of: WeakKeyDictionary[Job, Engine] = WeakKeyDictionary()

    def submit(
        self,
        request: DenoisingRequest,
        on_done: OnDone,
        is_cancelled: Callable[[], bool] | None = None,
        name: str = "",
    ) -> None:
        """Takes a request; calls `on_done` later, with the latents or the error. Raises nothing.

        Args:
            name: by which `listen` and `cancel` know it; none need be given.
        """
        try:
            if all(self._tables.has(row.scheduler, row.num_inference_steps) for row in request.rows):
                self._start(request, on_done, is_cancelled, name)
                return
            building = self._builder.submit(self._build_and_start, request, on_done, is_cancelled, name)
        except BaseException as error:
            on_done(as_exception(error))
        else:
            building.add_done_callback(partial(_answer_unstarted, on_done))

    def listen(self, name: str, after: int, on_progress: OnProgress) -> None:
        """Like `Engine.listen`; calls back with zeros at once if the name is unknown."""
        job = self._jobs.get(name)
        if job is None:
            on_progress(0, 0)
        else:
            self._engine_of[job].listen(job, after, on_progress)

    def cancel(self, name: str) -> None:
        """Cancels a named request; does nothing if the name is unknown."""
        job = self._jobs.get(name)
        if job is not None:
            self._engine_of[job].cancel(job)

    def num_steps(self, request: DenoisingRequest) -> int:
        """Returns the number of UNet evaluations of a request that was taken: those of its longest row."""
        tables = [self._tables.get(row.scheduler, row.num_inference_steps) for row in request.rows]
        return max(table.num_evaluations for table in tables)

    def deadline_ns(self, name: str) -> int:
        """Returns the deadline of a named request, on the monotonic clock in ns; 0 if it has none or is unknown."""
        job = self._jobs.get(name)
        return 0 if job is None else job.request.deadline_ns

    @property
    def is_ready(self) -> bool:
        """Returns whether any engine works."""
        return any(engine.broken is None for engine in self.engines)

    def close(self) -> None:
        """Fails every request that is held or still being built."""
        self._builder.shutdown(wait=False, cancel_futures=True)
        for engine in self.engines:
            engine.close()

    def _build_and_start(
        self, request: DenoisingRequest, on_done: OnDone, is_cancelled: Callable[[], bool] | None, name: str
    ) -> None:
        for row in request.rows:
            # The engine refuses a request that cannot run, in the contract's words.
            with contextlib.suppress(ScheduleError):
                self._tables.get(row.scheduler, row.num_inference_steps)
        self._start(request, on_done, is_cancelled, name)

    def _start(
        self, request: DenoisingRequest, on_done: OnDone, is_cancelled: Callable[[], bool] | None, name: str
    ) -> None:
        """Gives it to the engine with the most room of those that take it. Raises the last one's refusal."""
        *others, last = self._roomiest_first()
        for engine in others:
            with contextlib.suppress(UnavailableError):
                self._note(name, engine, engine.submit(request, on_done, is_cancelled))
                return
        self._note(name, last, last.submit(request, on_done, is_cancelled))

    def _note(self, name: str, engine: Engine, job: Job) -> None:
        if name:
            self._engine_of[job] = engine
            self._jobs[name] = job

    def _roomiest_first(self) -> list[Engine]:
        """Raises `UnavailableError` if no engine works any more."""
        working = [engine for engine in self.engines if engine.broken is None]
        if not working:
            raise UnavailableError("denoiser: every engine is broken; restart the server")
        return sorted(working, key=lambda engine: engine.load.free_frames, reverse=True)


def _answer_unstarted(on_done: OnDone, building: "Future[None]") -> None:
    """Answers a request that the schedules' thread did not reach, or could not start."""
    if building.cancelled():
        on_done(UnavailableError("denoiser is shutting down; try again"))
        return
    error = building.exception()
    if error is not None:
        on_done(as_exception(error))
