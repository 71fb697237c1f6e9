"""Tokenizers as fine-tunes and old repositories have them: saved without a length, or as one file."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import sentencepiece_model_pb2

from checkpoints.building import build
from checkpoints.verification import verify
from text_encoders import TextEncoders, encode_texts, load_text_encoders, tokenize_t5

LONG = "rain and wind over the sea " * 300  # 2,000 words: more tokens than any encoder takes
TEXTS = ("Rain on a tin roof", "a dog barks; then, birds sing!", "")


def load(checkpoint: Path) -> TextEncoders:
    assert verify(checkpoint) == []
    return load_text_encoders(checkpoint, torch.device("cpu"), torch.float32)


def change_length(file: Path, length: int | None) -> None:
    config: dict[str, Any] = json.loads(file.read_text())
    config.pop("model_max_length", None)
    file.write_text(json.dumps(config if length is None else {**config, "model_max_length": length}))


@pytest.mark.parametrize("length", [10**30, None, 5000], ids=["1e30", "absent", "more than the encoders take"])
def test_the_length_is_the_encoders(length: int | None, tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    for tokenizer in ("tokenizer", "tokenizer_2"):
        change_length(checkpoint / tokenizer / "tokenizer_config.json", length)
    encoders = load(checkpoint)
    assert encoders.clap_tokenizer.model_max_length == 512  # RoBERTa's 514 positions begin at 2
    tokens = tokenize_t5(encoders, LONG)
    # T5's own length; or the room in GPT-2's 1024 positions beside the projection's 4 and its own 8 states.
    assert len(tokens) == (1012 if length == 5000 else 512)
    encoded = encode_texts(encoders, [LONG], [tokens], [len(tokens)])
    assert encoded.generated_prompt_embeds.isfinite().all()
    short = [tokenize_t5(load(tiny_checkpoint), text) for text in TEXTS]
    assert [tokenize_t5(encoders, text) for text in TEXTS] == short


def test_the_length_of_speech_is_the_projections(tmp_path: Path) -> None:
    build("tiny-speech", tmp_path / "speech")
    change_length(tmp_path / "speech" / "tokenizer_2" / "tokenizer_config.json", None)
    assert load(tmp_path / "speech").second_tokenizer.model_max_length == 48


def test_a_sentencepiece_model_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    folder = checkpoint / "tokenizer_2"
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.unk_id = 2
    for index, (piece, score) in enumerate(vocabulary):
        kind = {0: 3, 1: 3, 2: 2}.get(index, 1)  # control, unknown, normal
        model.pieces.add(piece=piece, score=score, type=kind)
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    (folder / "tokenizer.json").unlink()
    with_file = load(tiny_checkpoint)
    alone = load(checkpoint)
    for text in (*TEXTS, LONG):
        assert tokenize_t5(alone, text) == tokenize_t5(with_file, text)
