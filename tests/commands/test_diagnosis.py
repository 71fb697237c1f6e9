"""When a server counts as failed, and how often it is restarted: decisions over plain data, without a server."""

import pytest

from serving.diagnosis import (
    MAX_INSIDE_DECODER,
    Observation,
    Patience,
    RestartLimit,
    StageProcess,
    diagnose,
    full_decoders,
    restart_delay,
)

PATIENCE = Patience(stopped_in_s=3, silent_in_s=10, stalled_in_s=20)
LABELS = '{engine="cpu",model="denoiser"}'
ALIVE = StageProcess("denoiser", alive=True, stopped=False)
STOPPED = StageProcess("denoiser", alive=True, stopped=True)


def page(rows: float, steps: float, broken: float = 0, other_broken: float = 0) -> dict[str, float]:
    return {
        f"audioldm2_rows_in_flight{LABELS}": rows,
        "audioldm2_rows_in_flight": rows,
        f"audioldm2_steps_total{LABELS}": steps,
        f"audioldm2_engine_broken{LABELS}": broken,
        'audioldm2_engine_broken{engine="cuda:1",model="denoiser"}': other_broken,
    }


def first_failure(*observations: Observation) -> tuple[float, str] | None:
    """When a series of observations leads to which verdict."""
    previous, lasting = None, {}  # type: tuple[Observation | None, Lasting]
    for observation in observations:
        reason, lasting = diagnose(observation, previous, lasting, PATIENCE)
        if reason:
            return observation.time_s, reason
        previous = observation
    return None


def series(*metrics: dict[str, float] | None, stage: StageProcess = ALIVE) -> tuple[Observation, ...]:
    return tuple(Observation(float(second), (stage,), page) for second, page in enumerate(metrics))


def test_a_dead_stage_is_a_failure_at_once() -> None:
    dead = StageProcess("decoder", alive=False, stopped=False)
    assert first_failure(Observation(5.0, (ALIVE, dead), page(0, 0))) == (5.0, "the process of decoder has died")


def test_a_stopped_stage_may_go_on_within_its_time() -> None:
    assert first_failure(*series(*[page(0, 0)] * 9, stage=STOPPED)) == (3.0, "the process of denoiser is stopped")
    stages = (STOPPED, STOPPED, STOPPED, ALIVE, STOPPED, STOPPED, STOPPED)
    assert first_failure(*(Observation(float(at), (stage,), page(0, 0)) for at, stage in enumerate(stages))) is None


def test_an_engine_without_a_step_stalls_only_with_rows_in_flight() -> None:
    assert first_failure(*series(*[page(0, 7)] * 60)) is None
    assert first_failure(*series(*[page(2, 7)] * 60)) == (21.0, f"the engine{LABELS} makes no step")
    slow = [page(2, second // 15) for second in range(200)]  # a step every 15 s
    assert first_failure(*series(*slow)) is None


def test_a_model_that_takes_no_request_stalls_only_while_some_wait() -> None:
    labels = '{model="denoiser",version="1"}'

    def waiting(requests: float, executions: float) -> dict[str, float]:
        return {f"nv_inference_pending_request_count{labels}": requests, f"nv_inference_exec_count{labels}": executions}

    assert first_failure(*series(*[waiting(0, 7)] * 60)) is None
    assert first_failure(*series(*[waiting(2, 7)] * 60)) == (21.0, f"the model{labels} takes no request")
    slow = [waiting(2, second // 15) for second in range(200)]  # an execution every 15 s
    assert first_failure(*series(*slow)) is None


@pytest.mark.parametrize("model", ["music_text_conditioning", "decoder"])
def test_a_stage_without_progress_stalls_only_with_requests_inside(model: str) -> None:
    labels = f'{{model="{model}"}}'

    def inside(requests: float, progress: float) -> dict[str, float]:
        return {f"audioldm2_stage_requests{labels}": requests, f"audioldm2_stage_progress_total{labels}": progress}

    stalled = (21.0, f"the model{labels} makes no progress")
    assert first_failure(*series(*[inside(0, 7)] * 60)) is None
    assert first_failure(*series(*[inside(2, 7)] * 60)) == stalled
    # More and more come, and some are answered as late by another thread.
    assert first_failure(*series(*[inside(2 + second - second % 9, 7) for second in range(60)])) == stalled
    slow = [inside(2, second // 15) for second in range(200)]  # a forward every 15 s
    assert first_failure(*series(*slow)) is None


def test_a_silent_metrics_page_is_a_failure_in_time() -> None:
    assert first_failure(*series(*[None] * 60)) == (10.0, "the metrics page does not answer")
    assert first_failure(*series(*[*[None] * 9, page(0, 0)] * 5)) is None


def test_one_broken_engine_of_two_is_no_failure() -> None:
    assert first_failure(*series(page(0, 0, broken=1))) is None
    assert first_failure(*series(*[page(0, 0, 1, 1)] * 5)) == (1.0, "all engines of denoiser are broken")


def test_a_broken_engine_has_time_to_answer_what_it_held() -> None:
    busy = page(0, 0, 1, 1) | {"audioldm2_stage_requests": 2.0}
    assert first_failure(*series(*[busy] * 9)) == (3.0, "all engines of denoiser are broken")
    assert first_failure(*series(busy, busy, *[page(0, 0, 1, 1)] * 9)) == (2.0, "all engines of denoiser are broken")


def test_a_decoder_is_full_when_too_many_are_inside() -> None:
    def inside(model: str, requests: float) -> dict[str, float]:
        return {f'audioldm2_stage_requests{{model="{model}"}}': requests}

    limit = MAX_INSIDE_DECODER
    pages = inside("decoder", limit) | inside("music_decoder", limit + 1) | inside("denoiser", limit + 1)
    stage = StageProcess("music_decoder", alive=True, stopped=False)
    assert full_decoders(Observation(0, (), pages)) == {"music_decoder"}
    assert full_decoders(Observation(0, (stage,), pages)) == {"music_decoder"}
    assert full_decoders(Observation(0, (stage, stage), pages)) == set()  # each has room
    assert full_decoders(Observation(0, (), None)) == set()


def test_restarts_wait_longer_and_longer_and_end() -> None:
    limit = RestartLimit(count=4, window_in_s=100, longest_delay_in_s=3)
    failures = tuple(float(at) for at in range(5))
    assert [restart_delay(failures[: count + 1], limit) for count in range(5)] == [0, 1, 2, 3, None]


@pytest.mark.parametrize("pause", [100.0, 1000.0])
def test_old_failures_do_not_count(pause: float) -> None:
    limit = RestartLimit(count=1, window_in_s=100)
    assert restart_delay((0.0, pause), limit) == 0
