"""The engines of one server, one per device: each request goes to the one with most room."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from audioldm2_triton.errors import AudioLDM2Error, UnavailableError
from denoising_request import DenoisingRequest, OnDone
from engine import Engine
from job import Job, OnProgress
from schedule_table import ScheduleError, ScheduleTables

logger = logging.getLogger(__name__)


class EnginePool:
    """Takes requests and control requests by name; every answer is a callback, so that nothing here blocks."""

    def __init__(self, engines: Sequence[Engine], tables: ScheduleTables) -> None:
        self.engines = tuple(engines)
        self._tables = tables
        # A schedule that is new can take seconds to read off its scheduler; others need not wait for it.
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="schedules")
        self._jobs: dict[str, tuple[Engine, Job]] = {}

    def submit(
        self,
        request: DenoisingRequest,
        on_done: OnDone,
        is_cancelled: Callable[[], bool] | None = None,
        name: str = "",
    ) -> None:
        """Takes a request in; `on_done` is called once, with the latents or with why there are none.

        Args:
            name: by which `listen` and `cancel` know it; none need be given.
        """
        if all(self._tables.has(row.scheduler, row.num_inference_steps) for row in request.rows):
            self._start(request, on_done, is_cancelled, name)
        else:
            self._builder.submit(self._build_and_start, request, on_done, is_cancelled, name)

    def listen(self, name: str, after: int, on_progress: OnProgress) -> None:
        """As `Engine.listen`; with zeros at once for a name that is not known yet, or not any more."""
        if name not in self._jobs:
            on_progress(0, 0)
            return
        engine, job = self._jobs[name]
        engine.listen(job, after, on_progress)

    def cancel(self, name: str) -> None:
        """A name that is not known is left alone."""
        if name in self._jobs:
            engine, job = self._jobs[name]
            engine.cancel(job)

    def close(self) -> None:
        self._builder.shutdown(cancel_futures=True)
        for engine in self.engines:
            engine.close()

    def _build_and_start(
        self, request: DenoisingRequest, on_done: OnDone, is_cancelled: Callable[[], bool] | None, name: str
    ) -> None:
        try:
            for row in request.rows:
                self._tables.get(row.scheduler, row.num_inference_steps)
        except ScheduleError:
            pass  # the engine refuses it in the contract's words
        self._start(request, on_done, is_cancelled, name)

    def _start(
        self, request: DenoisingRequest, on_done: OnDone, is_cancelled: Callable[[], bool] | None, name: str
    ) -> None:
        def forget_and_answer(outcome: object) -> None:
            self._jobs.pop(name, None)
            on_done(outcome)  # type: ignore[arg-type]

        try:
            engine = self._roomiest()
            job = engine.submit(request, forget_and_answer if name else on_done, is_cancelled)
        except Exception as error:
            if not isinstance(error, AudioLDM2Error):
                logger.exception("denoiser: a request could not be started")
            on_done(error)
            return
        if name:
            self._jobs[name] = engine, job
            if job.done:  # already, before its name was known
                self._jobs.pop(name, None)

    def _roomiest(self) -> Engine:
        """Raises `UnavailableError` where no engine works any more."""
        working = [engine for engine in self.engines if engine.broken is None]
        if not working:
            raise UnavailableError("denoiser: every engine is broken; restart the server")
        return max(working, key=lambda engine: engine.load.free_frames)
