"""Long audio: the VAE in chunks gives what it gives for the whole, memory stays linear, the server does all of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import waveform_decoder
from audioldm2_pipeline import Call, Reference, difference, generate
from audioldm2_triton import AudioLDM2Client
from audioldm2_triton.errors import InternalError
from audioldm2_triton.server.memory import peak_resident_bytes
from benchmarks.commands.memory import device_peaks
from benchmarks.server_memory import server_processes
from chunked_vae import decode_chunked
from metrics_page import is_idle, read_metrics, wait_for_metrics
from plain_requests import check_responses, streamed, whole
from serving.local_server import LocalServer
from stepping.denoising_unet import DenoisingUNet, load_unet
from waveform_decoder import MAX_WHOLE_FRAMES, WaveformDecoder, decode_mels, load_waveform_decoder

CPU = torch.device("cpu")
WIDTH = 16


@pytest.fixture(scope="module")
def decoder(tiny_checkpoint: Path) -> WaveformDecoder:
    return load_waveform_decoder(tiny_checkpoint, CPU, torch.float32)


@pytest.fixture(scope="module")
def unet(tiny_checkpoint: Path) -> DenoisingUNet:
    return load_unet(tiny_checkpoint, WIDTH, CPU, torch.float32)


def latents(frames: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, 8, frames, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(frames))


def relative(value: Tensor, expected: Tensor) -> float:
    assert value.shape == expected.shape
    return float((value - expected).abs().max() / expected.abs().max())


class LargestTensor(TorchDispatchMode):
    """How many numbers the largest tensor has that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                # What is behind it: a mask that is only expanded takes no memory.
                self.numbers = max(self.numbers, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


@torch.no_grad()  # in inference mode attention would be one operation here, whatever it does inside
def largest(work: Callable[[], object]) -> int:
    with LargestTensor() as mode:
        work()
    return mode.numbers


@torch.inference_mode()
@pytest.mark.parametrize("frames", [1, 2, 15, 16, 17, 32, 50])
def test_chunks_give_what_the_whole_gives(frames: int, decoder: WaveformDecoder) -> None:
    expected = decoder.vae.decode(latents(frames)).sample
    for chunk_frames in (1, 16, 128):
        assert relative(decode_chunked(decoder.vae, latents(frames), chunk_frames), expected) < 1e-5


@torch.inference_mode()
def test_chunks_are_exact_but_for_rounding() -> None:
    """In float64, with statistics that differ from chunk to chunk, a single resolution among other shapes."""
    torch.manual_seed(0)
    for widths in ((8,), (8, 24), (16, 16, 32, 8)):
        vae: Any = AutoencoderKL(
            latent_channels=8,
            norm_num_groups=4,
            block_out_channels=widths,
            up_block_types=["UpDecoderBlock2D"] * len(widths),
            down_block_types=["DownEncoderBlock2D"] * len(widths),
        ).double()
        loud_at_the_end = latents(41, torch.float64) * torch.linspace(0.1, 5, 41, dtype=torch.float64)[:, None] + 1
        assert relative(decode_chunked(vae, loud_at_the_end, 8), vae.decode(loud_at_the_end).sample) < 1e-12


@torch.inference_mode()
def test_only_long_clips_go_in_chunks(decoder: WaveformDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    chunked: list[int] = []

    def decode(vae: Any, scaled: Tensor, between_chunks: Callable[[], None]) -> Tensor:
        chunked.append(scaled.shape[2])
        return decode_chunked(vae, scaled, 16, between_chunks)

    monkeypatch.setattr(waveform_decoder, "decode_chunked", decode)
    monkeypatch.setattr(waveform_decoder, "MAX_WHOLE_FRAMES", 40)
    items = [latents(frames)[0] for frames in (40, 41, 41, 7)]
    mels = decode_mels(decoder, items)
    assert chunked == [41, 41]
    for mel, item in zip(mels, items, strict=True):
        alone = decoder.vae.decode(item[None] * (1 / decoder.vae.config.scaling_factor)).sample[0, 0]
        assert relative(mel, alone) < 1e-5
        assert torch.equal(mel, alone) or item.shape[1] == 41
    items[1][0, 3, 5] = float("inf")
    with pytest.raises(InternalError, match="the VAE gave non-finite values"):
        decode_mels(decoder, items[1:2])


def test_no_tensor_of_the_vae_is_quadratic(decoder: WaveformDecoder) -> None:
    """Largest are the keys of attention, which every position needs, and what is made of one chunk."""
    frames, chunk_frames = 400, 16
    positions, chunk_positions = frames * WIDTH, chunk_frames * WIDTH

    def decode() -> Tensor:
        return decode_chunked(decoder.vae, latents(frames), chunk_frames)

    widths = decoder.vae.config.block_out_channels
    linear = max(positions * widths[-1], 2 * (chunk_positions + 2 * WIDTH) * 4**2 * max(widths))
    assert largest(decode) <= linear
    # The whole at once holds more, and so does attention with the scores of all positions.
    assert largest(lambda: decoder.vae.decode(latents(frames))) > 2 * linear
    with sdpa_kernel(SDPBackend.MATH):
        assert largest(lambda: decoder.vae.decode(latents(frames))) >= positions**2
        # Where no fused kernel fits, the scores of one chunk are held.
        assert largest(decode) <= chunk_positions * positions
        with torch.no_grad():
            unfused = decode()
    with torch.no_grad():
        assert relative(unfused, decode()) < 1e-5


def test_no_tensor_of_the_unet_is_quadratic(unet: DenoisingUNet) -> None:
    """With masks and without: the scores of the finest self-attention, a quarter of the positions, are never held."""
    frames = 400
    scores = (frames * WIDTH // 4) ** 2

    def step(valid_frames: list[int]) -> Callable[[], Tensor]:
        inputs = unet.random_inputs(len(valid_frames), frames, min(valid_frames) < frames, 16)
        return lambda: unet.denoise(inputs, None)

    for valid_frames in ([frames], [frames - 1, frames - 1]):
        run = step(valid_frames)
        assert largest(run) < scores / 2
        with sdpa_kernel(SDPBackend.MATH):
            assert largest(run) >= scores


@torch.inference_mode()
@pytest.mark.parametrize("frames", [76, 115, 181])
def test_windows_of_the_vocoder_are_the_whole_bit_for_bit(frames: int, decoder: WaveformDecoder) -> None:
    """As long as a convolution adds up in one order, which oneDNN's does not for every length: there, the last bits."""
    [mel] = decode_mels(decoder, [latents(frames)[0]])
    chunks = decoder.plan_chunks(len(mel))
    assert len(chunks) > 1

    def joined() -> Tensor:
        windows = [decoder.vocoder(mel[chunk.first_frame : chunk.end_frame]) for chunk in chunks]
        return torch.cat(
            [window[chunk.first_sample : chunk.end_sample] for window, chunk in zip(windows, chunks, strict=True)]
        )

    expected: Any = decoder.vocoder
    with torch.backends.mkldnn.flags(enabled=False):
        assert torch.equal(joined(), expected(mel))
    assert relative(joined(), expected(mel)) < 1e-5


LONG = {
    "prompt": [b"A hammer hits a wooden surface"],
    "negative_prompt": [b"low quality"],
    "audio_length_in_s": [60.0],
    "num_waveforms_per_prompt": [3],
    "num_inference_steps": [4],
    "seed": [6],
}


@pytest.mark.slow
def test_a_minute_streams_as_the_ensemble_gives_it(server: LocalServer) -> None:
    expected = whole(server, LONG)
    result = check_responses(streamed(server, LONG, wait_in_s=300), num_steps=4, num_chunks=24)
    assert result["audio"].shape == (1, 3, 60 * 16000)
    np.testing.assert_array_equal(result["audio"][0][result["order"][0]], expected["audio"][0])
    np.testing.assert_array_equal(result["score"], expected["score"])
    assert np.abs(expected["audio"]).max() > 0.01


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_minutes_stream_as_the_ensemble_gives_them(server: LocalServer) -> None:
    seconds = 300
    request = {
        "prompt": [b"rain"],
        "audio_length_in_s": [float(seconds)],
        "num_inference_steps": [1],
        "guidance_scale": [1.0],
        "seed": [6],
    }
    expected = whole(server, request)
    result = check_responses(streamed(server, request, wait_in_s=900), num_steps=1, num_chunks=118)
    assert result["audio"].shape == (1, 1, seconds * 16000)
    np.testing.assert_array_equal(result["audio"], expected["audio"])
    assert np.abs(expected["audio"]).max() > 0.01


def test_long_audio_equals_the_reference(server: LocalServer, reference: Reference) -> None:
    call = Call("rain", audio_length_in_s=43.0, num_inference_steps=1, guidance_scale=1.0, seed=2)
    assert call.audio_length_in_s * 25 > MAX_WHOLE_FRAMES
    with AudioLDM2Client(server.grpc_url) as client:
        audio = generate(client, call).audio
    assert difference(audio, reference.generate(call)) <= reference.tolerance(call)


def test_each_stage_tells_its_peak_memory(server: LocalServer) -> None:
    with AudioLDM2Client(server.grpc_url) as client:
        client.generate("rain", audio_length_in_s=1.0, num_inference_steps=1)
    wait_for_metrics(server, is_idle, "an idle server")
    processes = server_processes(server.process.pid)
    stages = ("decoder", "denoiser", "text_conditioning")
    assert set(processes) == {*stages, "audioldm2_stream", "tritonserver"}
    told = device_peaks(read_metrics(server))
    assert set(told) == {(stage, "cpu") for stage in stages}
    for stage in stages:
        peak = peak_resident_bytes(processes[stage])
        # The kernel's own figure may fall by some pages again.
        assert 0.9 * peak < told[stage, "cpu"] < 1.01 * peak, stage
