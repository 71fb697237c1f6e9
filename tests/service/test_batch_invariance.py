"""A request's audio does not depend on what else is in flight, and a failing neighbour does no harm."""

import random
from concurrent.futures import ThreadPoolExecutor

from audioldm2_pipeline import Call, Reference, difference, generate, in_any_order, random_call
from audioldm2_triton import AudioLDM2Client, GenerationResult, InvalidArgumentError
from serving.local_server import LocalServer


def test_alone_in_a_request_with_others_and_among_concurrent_others(server: LocalServer, reference: Reference) -> None:
    generator = random.Random(0)
    calls = [random_call(generator, audio_length_in_s=1.0, num_waveforms_per_prompt=2) for _ in range(6)]
    calls += [random_call(generator) for _ in range(6)]
    with AudioLDM2Client(server.grpc_url) as client:
        alone = [generate(client, call) for call in calls]
        together = client.generate(
            [call.prompt for call in calls[:6]],
            negative_prompt=[call.negative_prompt for call in calls[:6]],
            audio_length_in_s=1.0,
            num_inference_steps=[call.num_inference_steps for call in calls[:6]],
            guidance_scale=[call.guidance_scale for call in calls[:6]],
            num_waveforms_per_prompt=2,
            seed=[call.seed for call in calls[:6]],
        )
        with ThreadPoolExecutor(len(calls)) as pool:
            fronts = [True, False] * 6
            concurrent = list(pool.map(lambda call, ensemble: generate(client, call, ensemble), calls, fronts))
    for call, expected, result in zip(calls[:6], alone[:6], together, strict=True):
        assert in_any_order(result.audio, expected.audio) <= reference.tolerance(call)
        assert result.seed == expected.seed
    for call, expected, result in zip(calls, alone, concurrent, strict=True):
        assert in_any_order(result.audio, expected.audio) <= reference.tolerance(call)


def test_bad_requests_among_good_ones_fail_alone(server: LocalServer, reference: Reference) -> None:
    good = [Call(f"sound number {index}", audio_length_in_s=0.5, seed=index) for index in range(6)]
    with AudioLDM2Client(server.grpc_url) as client:
        alone = [generate(client, call) for call in good]

        def attempt(index: int) -> GenerationResult | InvalidArgumentError:
            try:
                if index % 2:
                    return client.generate("bad", guidance_scale=51.0)
                return generate(client, good[index // 2])
            except InvalidArgumentError as error:
                return error

        with ThreadPoolExecutor(12) as pool:
            outcomes = list(pool.map(attempt, range(12)))
    assert all(isinstance(outcome, InvalidArgumentError) for outcome in outcomes[1::2])
    for call, expected, outcome in zip(good, alone, outcomes[::2], strict=True):
        assert isinstance(outcome, GenerationResult)
        assert difference(outcome.audio, expected.audio) <= reference.tolerance(call)
