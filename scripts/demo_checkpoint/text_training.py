"""Training of what reads text: T5 on labels, CLAP on pairs, projection and GPT-2 on coarse spectrograms."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import soxr
import torch
from torch import Tensor, nn
from transformers import ClapFeatureExtractor

from checkpoints.shapes import component_config
from checkpoints.vocabularies import roberta_tokenizer, t5_tokenizer

from . import library, parts
from .corpus import Corpus, tensor
from .signals import SAMPLING_RATE
from .sounds import KINDS
from .training import Draw, Plan, train

T5_PLAN: Final = Plan(steps=2_500, learning_rate=2e-3)
CLAP_PLAN: Final = Plan(steps=900, learning_rate=2e-3, warmup=100)
LANGUAGE_PLAN: Final = Plan(steps=1_500, learning_rate=2e-3)
NEW_TOKENS: Final = 8  # that GPT-2 generates
_ATTRIBUTES: Final = ("high", "low", "fast", "slow", "rising", "falling", "steady", "pulsing")
_CAPTION_SENTENCES: Final = 20_000
_T5_BATCH: Final = 64
_CLAP_BATCH: Final = 40
_CLAP_CLIPS: Final = 5_000
_LANGUAGE_BATCH: Final = 48
_EMPTY: Final = 0.1  # the share of empty prompts, which guidance needs


def tokenizers(folder: Path) -> tuple[Any, Any]:
    """RoBERTa's and T5's, whose vocabularies are the words of the captions; kept in `folder`."""
    path = folder / "sentences.json"
    if not path.exists():
        seen: dict[str, None] = {}
        generator = np.random.default_rng(3)
        for _ in range(_CAPTION_SENTENCES):
            seen[library.draw_caption(generator).caption] = None
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(list(seen)), encoding="utf-8")
    sentences = json.loads(path.read_text(encoding="utf-8"))
    return roberta_tokenizer(sentences, parts.VOCABULARY), t5_tokenizer(sentences)


class LabelReader(nn.Module):
    """T5 with heads that name the kinds and the attributes of a caption: what there is to know about it."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.t5 = parts.t5(vocabulary)
        self.heads = nn.Linear(parts.T5_WIDTH, 2 * len(KINDS) + len(_ATTRIBUTES))

    def forward(self, tokens: Any) -> Tensor:
        states = self.t5(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        mask = tokens.attention_mask.unsqueeze(-1)
        logits: Tensor = self.heads((states * mask).sum(1) / mask.sum(1))
        return logits


def train_t5(folder: Path, plan: Plan = T5_PLAN) -> Any:
    _, tokenizer = tokenizers(folder)

    def error(model: Any, sounds: Sequence[Any]) -> tuple[Tensor, Tensor]:
        logits = model(tokenizer([sound.caption for sound in sounds], padding=True, return_tensors="pt"))
        labels = torch.tensor([_label(sound.kinds, sound.attributes) for sound in sounds])
        return logits, labels

    def loss(model: Any, draw: Draw) -> Tensor:
        logits, labels = error(model, [library.draw_caption(draw.numpy) for _ in range(_T5_BATCH)])
        return nn.functional.binary_cross_entropy_with_logits(logits, labels)

    generator = np.random.default_rng(4)
    unseen = [library.draw_caption(generator, held_out=True) for _ in range(400)]

    def held_out(model: Any) -> float:
        logits, labels = error(model, unseen)
        return float(((logits > 0) != (labels > 0.5)).any(1).float().mean())

    torch.manual_seed(0)
    return train("t5", LabelReader(len(tokenizer)), loss, held_out, plan, folder).t5


def _label(kinds: Sequence[str], attributes: Sequence[str]) -> list[float]:
    background = kinds[1] if len(kinds) > 1 else None
    return [
        *(float(kind == kinds[0]) for kind in KINDS),
        *(float(kind == background) for kind in KINDS),
        *(float(attribute in attributes) for attribute in _ATTRIBUTES),
    ]


def _first_clap_clip(corpus: Corpus) -> int:
    return max(0, corpus.size - _CLAP_CLIPS)


def clap_features(corpus: Corpus, folder: Path) -> np.ndarray:
    """The extractor's log-mels, float16 [clips, frames, bins], of the corpus's last clips, those held out included."""
    path = folder / "clap_features.npy"
    if not path.exists():
        extractor = ClapFeatureExtractor(**component_config("base", "feature_extractor"))
        first = _first_clap_clip(corpus)
        rows = np.empty((corpus.size - first, 1001, 64), np.float16)
        for row in range(len(rows)):
            clip = soxr.resample(corpus.waveforms[first + row].astype(np.float32), SAMPLING_RATE, 48_000)
            rows[row] = extractor(clip, sampling_rate=48_000, return_tensors="np").input_features[0, 0]
        np.save(path.with_suffix(".new.npy"), rows)
        path.with_suffix(".new.npy").replace(path)
    return np.load(path, mmap_mode="r")


def train_clap(corpus: Corpus, folder: Path, plan: Plan = CLAP_PLAN) -> Any:
    """Computes the contrastive loss; pairs with equal labels count as positives."""
    tokenizer, _ = tokenizers(folder)
    features = clap_features(corpus, folder)
    first = _first_clap_clip(corpus)
    trained = corpus.trained - first
    labels = [(tuple(label["kinds"]), tuple(sorted(label["attributes"]))) for label in corpus.labels[first:]]

    def logits(model: Any, rows: Any) -> tuple[Tensor, Tensor]:
        texts = [corpus.captions[first + int(row)] for row in rows]
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        output = model(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            input_features=tensor(features, rows).unsqueeze(1),
        )
        same = torch.tensor([[float(labels[i] == labels[j]) for j in rows] for i in rows])
        return output.logits_per_text, same

    def loss(model: Any, draw: Draw) -> Tensor:
        similarities, same = logits(model, draw.numpy.integers(trained, size=_CLAP_BATCH))
        right = same / same.sum(1, keepdim=True)
        by_text = nn.functional.cross_entropy(similarities, right)
        by_audio = nn.functional.cross_entropy(similarities.T, right.T / right.T.sum(1, keepdim=True))
        return (by_text + by_audio) / 2

    def held_out(model: Any) -> float:
        """Returns how often the nearest of 48 clips does not have the caption's label."""
        similarities, same = logits(model, range(trained, trained + 48))
        return 1 - float(same[range(48), similarities.argmax(1)].mean())

    torch.manual_seed(0)
    return train("clap", parts.clap(), loss, held_out, plan, folder)


class Reader(nn.Module):
    """Projection and GPT-2: eight vectors from the encoders' states, by the steps of the pipeline."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = parts.projection_model()
        self.gpt2 = parts.language_model()
        # The embeddings of words are not used: vectors go in and come out.
        self.gpt2.transformer.wte.requires_grad_(False)

    def forward(self, clap: Tensor, states: Tensor, mask: Tensor) -> Tensor:
        """float32 [prompts, 8, width] of `clap` [prompts, 1, width], `states` [prompts, tokens, width] and `mask`."""
        ones = clap.new_ones(clap.shape[:2], dtype=torch.long)
        projected = self.projection(
            hidden_states=clap, hidden_states_1=states, attention_mask=ones, attention_mask_1=mask
        )
        embeds, attention = projected.hidden_states, projected.attention_mask
        for _ in range(NEW_TOKENS):
            output = self.gpt2.transformer(inputs_embeds=embeds, attention_mask=attention).last_hidden_state
            embeds = torch.cat([embeds, output[:, -1:]], dim=1)
            attention = torch.cat([attention, attention.new_ones(len(attention), 1)], dim=1)
        return embeds[:, -NEW_TOKENS:]


def train_language_model(corpus: Corpus, clap: Any, t5: Any, folder: Path, plan: Plan = LANGUAGE_PLAN) -> Any:
    """Each of the eight vectors begins with the mean mel spectrum of its eighth of the clip: the language of audio."""
    tokenizer, tokenizer_2 = tokenizers(folder)

    def vectors(model: Any, captions: Sequence[str]) -> Tensor:
        with torch.no_grad():
            # Padded as by the pipeline; the shorter captions of a batch learn to live with padding.
            tokens = tokenizer(list(captions), padding=True, return_tensors="pt")
            texts = clap.get_text_features(**tokens)
            texts = getattr(texts, "pooler_output", texts)
            tokens = tokenizer_2(list(captions), padding=True, return_tensors="pt")
            states = t5(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        predicted: Tensor = model(texts.unsqueeze(1), states, tokens.attention_mask)
        return predicted

    def targets(rows: Any) -> Tensor:
        mels = tensor(corpus.mels, rows)
        return mels.unflatten(1, (NEW_TOKENS, -1)).mean(2)

    def error(model: Any, rows: Any, empty: np.ndarray) -> Tensor:
        captions = ["" if none else corpus.captions[int(row)] for row, none in zip(rows, empty, strict=True)]
        wanted = targets(rows)
        return nn.functional.mse_loss(vectors(model, captions)[..., : wanted.shape[-1]], wanted)

    def loss(model: Any, draw: Draw) -> Tensor:
        rows = draw.numpy.integers(corpus.trained, size=_LANGUAGE_BATCH)
        return error(model, rows, draw.numpy.random(_LANGUAGE_BATCH) < _EMPTY)

    def held_out(model: Any) -> float:
        rows = range(corpus.trained, corpus.trained + 100)
        return float(error(model, rows, np.zeros(100, bool)))

    torch.manual_seed(0)
    return train("language_model", Reader(), loss, held_out, plan, folder)
