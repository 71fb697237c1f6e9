"""A checkpoint that speaks, on a real server: the reference's audio for every transcription, and clear refusals."""

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from audioldm2_pipeline import Call, Reference, difference, generate, in_any_order
from audioldm2_triton import AsyncAudioLDM2Client, AudioLDM2Client, InvalidArgumentError
from audioldm2_triton.cli import main
from audioldm2_triton.server.settings import SettingsError
from checkpoints.building import build
from checkpoints.verification import verify
from serving.local_server import LocalServer, local_server
from text_encoders import TextEncoders, encode_texts, load_text_encoders
from transcriptions import tokenize_transcription

PROMPT, GREETING = "A female reporter is speaking", "wish you have a good day"
LENGTH = 48  # tokens of the tiny checkpoint


@pytest.fixture(scope="module")
def speech_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "tiny-speech"
    build("tiny-speech", path)
    return path


STATES = 8  # of GPT-2, as the checkpoint's configuration says; the default for speech, 512, has a test of its own


@pytest.fixture(scope="module")
def speech_server(speech_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    log = tmp_path_factory.mktemp("speech") / "log"
    with local_server(speech_checkpoint, log, f"--max-new-tokens={STATES}") as running:
        yield running


@pytest.fixture(scope="module")
def speech_reference(speech_checkpoint: Path) -> Reference:
    return Reference(speech_checkpoint)


@pytest.fixture(scope="module")
def encoders(speech_checkpoint: Path) -> TextEncoders:
    return load_text_encoders(speech_checkpoint, torch.device("cpu"), torch.float32, STATES)


def test_audio_of_several_transcriptions_equals_the_reference(
    speech_server: LocalServer, speech_reference: Reference
) -> None:
    """In one request: the same prompt with other words, another prompt, with and without guidance."""
    calls = [
        Call(PROMPT, "low quality", 0.64, 4, 3.5, 2, 1, transcription=GREETING),
        Call(PROMPT, "", 0.64, 3, 2.0, 2, 2, transcription="No!"),
        Call("a man whispers", "low quality", 0.64, 4, 1.0, 2, 3, transcription="over and " * 10),
    ]
    with AudioLDM2Client(speech_server.http_url) as client:
        results = client.generate(
            [call.prompt for call in calls],
            negative_prompt=[call.negative_prompt for call in calls],
            audio_length_in_s=0.64,
            num_inference_steps=[call.num_inference_steps for call in calls],
            guidance_scale=[call.guidance_scale for call in calls],
            num_waveforms_per_prompt=2,
            seed=[call.seed for call in calls],
            transcription=[call.transcription for call in calls],
        )
    for call, result in zip(calls, results, strict=True):
        assert in_any_order(result.audio, speech_reference.generate(call)) <= speech_reference.tolerance(call)
    assert "`transcription` from 89 tokens to the checkpoint's 48" in speech_server.log.read_text()


@pytest.mark.parametrize("url", ["grpc_url", "http_url"])
def test_streamed_audio_equals_the_reference(url: str, speech_server: LocalServer, speech_reference: Reference) -> None:
    call = Call(PROMPT, "noise", 0.5, 3, seed=4, transcription="Good evening")
    with AudioLDM2Client(getattr(speech_server, url)) as client:
        arguments = {name: value for name, value in vars(call).items() if name != "prompt"}
        *_, finished = client.stream(call.prompt, **arguments)
    assert difference(finished.result.audio, speech_reference.generate(call)) <= speech_reference.tolerance(call)


def test_the_words_are_heard_and_only_they_differ(speech_server: LocalServer, speech_reference: Reference) -> None:
    call = Call(PROMPT, audio_length_in_s=0.3, num_inference_steps=8, seed=5, transcription=GREETING)
    with AudioLDM2Client(speech_server.grpc_url) as client:
        audio, again = (generate(client, call).audio for _ in range(2))
        other = generate(client, Call(**{**vars(call), "transcription": "wish you have a bad day"})).audio
    assert difference(again, audio) <= speech_reference.tolerance(call)
    assert difference(other, audio) > 1e-3


def test_the_asyncio_client_and_the_command_line_say_the_same(
    speech_server: LocalServer, speech_reference: Reference, tmp_path: Path
) -> None:
    call = Call(PROMPT, audio_length_in_s=0.3, num_inference_steps=2, seed=6, transcription=GREETING)
    expected = speech_reference.generate(call)

    async def generate_one() -> np.ndarray:
        async with AsyncAudioLDM2Client(speech_server.grpc_url) as client:
            arguments = {"audio_length_in_s": 0.3, "num_inference_steps": 2, "seed": 6, "transcription": GREETING}
            return (await client.generate(PROMPT, **arguments)).audio

    assert difference(asyncio.run(generate_one()), expected) <= speech_reference.tolerance(call)
    arguments = ["--audio-length-in-s=0.3", "--num-inference-steps=2", "--seed=6", f"--transcription={GREETING}"]
    file = tmp_path / "said.wav"
    assert main([PROMPT, *arguments, f"--url={speech_server.grpc_url}", f"--output={file}"]) == 0
    written, _ = soundfile.read(file)
    assert np.abs(written - expected[0]).max() < 1e-3  # 16 bits


@pytest.mark.parametrize(
    ("transcription", "given", "accepted"),
    [
        (None, "None", "the words to say"),
        ("", "''", "not blank"),
        (" \n", r"' \n'", "not blank"),
        ("?!", "'?!'", "characters that the checkpoint can say"),
        ("x" * 2001, "'xxx", "at most 2000 characters"),
        ([GREETING, None], "''", "not blank"),
    ],
)
def test_what_cannot_be_said(transcription: Any, given: str, accepted: str, speech_server: LocalServer) -> None:
    prompt: Any = [PROMPT] * 2 if isinstance(transcription, list) else PROMPT
    with AudioLDM2Client(speech_server.grpc_url) as client, pytest.raises(InvalidArgumentError) as caught:
        client.generate(prompt, num_inference_steps=1, audio_length_in_s=0.1, transcription=transcription)
    assert f"`transcription`: got {given}" in str(caught.value)
    assert accepted in str(caught.value).partition("but expected")[2]


def test_other_checkpoints_refuse_a_transcription(server: LocalServer) -> None:
    with AudioLDM2Client(server.grpc_url) as client:
        with pytest.raises(InvalidArgumentError, match=r"`transcription`: got 'wish.*' but expected none, because"):
            client.generate(PROMPT, num_inference_steps=1, transcription=GREETING)
        assert client.server_info().transcription == "refused"


def test_a_server_tells_that_it_needs_a_transcription(speech_server: LocalServer) -> None:
    with AudioLDM2Client(speech_server.http_url) as client:
        assert client.server_info().transcription == "required"


@pytest.mark.parametrize("add_blank", [False, True])
@pytest.mark.parametrize("text", ["no", GREETING, "b" * (LENGTH - 1), "b" * LENGTH, "b" * (LENGTH + 1)])
def test_equals_the_references_encode_prompt(
    text: str, add_blank: bool, encoders: TextEncoders, speech_reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the reference's end of the text overwrites a blank, or has no room."""
    pipeline = speech_reference.pipeline
    for tokenizer in (pipeline.tokenizer_2, encoders.second_tokenizer):
        monkeypatch.setattr(tokenizer, "add_blank", add_blank)
    with torch.no_grad():
        states, mask, generated = pipeline.encode_prompt(
            PROMPT, "cpu", 1, True, transcription=text, negative_prompt="low quality"
        )
    tokens = tokenize_transcription(encoders.second_tokenizer, text)
    ours = encode_texts(encoders, ["low quality", PROMPT], [(), tokens], [LENGTH] * 2)
    length = len(tokens)
    assert mask.sum(1).tolist() == [0, length]
    assert ours.attention_mask.sum(1).tolist() == [0, length]
    torch.testing.assert_close(ours.prompt_embeds, states[:, :length], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours.generated_prompt_embeds, generated, atol=2e-5, rtol=1e-4)


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("tokenizer_2/tokenizer_config.json", {"phonemize": True}, "install the Python package phonemizer, and espeak"),
        ("tokenizer_2/tokenizer_config.json", {"model_max_length": 0}, "model_max_length of tokenizer_2: got 0"),
        ("projection_model/config.json", {"max_seq_length": 47}, "got 47 but expected 48, the model_max_length"),
    ],
)
def test_a_checkpoint_that_cannot_speak_here_does_not_load(
    file: str, changes: dict[str, Any], message: str, speech_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(speech_checkpoint, tmp_path / "broken")
    change(checkpoint / file, **changes)
    with pytest.raises(SettingsError, match=message):
        load_text_encoders(checkpoint, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("component", "file", "edit"),
    [
        ("tokenizer_2", "model_index.json", lambda index: index.update(tokenizer_2=["transformers", "T5Tokenizer"])),
        ("text_encoder_2", "text_encoder_2/config.json", lambda config: config.pop("ffn_dim")),
        ("text_encoder_2", "text_encoder_2/config.json", lambda config: config.update(num_hidden_layers=3)),
        ("text_encoder_2", "text_encoder_2/config.json", lambda config: config.update(vocab_size=182)),
        ("projection_model", "projection_model/config.json", lambda config: config.update(max_seq_length=47)),
        ("projection_model", "projection_model/config.json", lambda config: config.update(text_encoder_1_dim=48)),
    ],
)
def test_verify_names_what_is_wrong(
    component: str, file: str, edit: Callable[[dict[str, Any]], object], speech_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(speech_checkpoint, tmp_path / "broken")
    assert verify(checkpoint) == []
    content = json.loads((checkpoint / file).read_text())
    edit(content)
    (checkpoint / file).write_text(json.dumps(content))
    assert component in {fault.component for fault in verify(checkpoint)}


def test_more_states_than_gpt2_has_positions_for_are_refused(speech_checkpoint: Path) -> None:
    with pytest.raises(SettingsError, match="max_new_tokens: got 973 but expected fewer than GPT-2's 1024 positions"):
        load_text_encoders(speech_checkpoint, torch.device("cpu"), torch.float32, 973)


def test_512_states_unless_told_otherwise(speech_checkpoint: Path) -> None:
    """As the pipeline's documentation demands for speech."""
    speaking = load_text_encoders(speech_checkpoint, torch.device("cpu"), torch.float32)
    assert speaking.num_generated_states == 512


@pytest.mark.slow
@pytest.mark.parametrize("compile_option", ["off", "on"])
def test_speech_of_512_states_equals_the_reference(
    compile_option: str, speech_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Through both doors, uncompiled and compiled."""
    reference = Reference(speech_checkpoint, max_new_tokens=512)
    call = Call(PROMPT, "low quality", 0.32, 3, 3.5, 1, 1, transcription=GREETING)
    options = (f"--compile={compile_option}", "--compile-lengths-in-s=0.32")
    with (
        local_server(speech_checkpoint, tmp_path_factory.mktemp("512") / "log", *options) as running,
        AudioLDM2Client(running.grpc_url) as client,
    ):
        for ensemble in (True, False):
            result = generate(client, call, ensemble)
            assert difference(result.audio, reference.generate(call)) <= reference.tolerance(call)
