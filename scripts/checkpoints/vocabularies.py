"""Small tokenizers of the kinds that AudioLDM 2 uses: two trained on a few sentences, and one of letters."""

import json
from collections import Counter
from collections.abc import Sequence
from math import log
from pathlib import Path
from string import ascii_lowercase, digits
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from transformers import RobertaTokenizer, T5Tokenizer

SENTENCES: Final = (
    "The sound of a hammer hitting a wooden surface.",
    "Techno music with a strong, upbeat tempo and high melodic riffs",
    "A dog barks twice while rain falls on a tin roof",
    "Birds sing in the forest and a river flows in the distance",
    "Low quality, average quality, noise, distortion",
    "A female reporter is speaking in a quiet room",
    "Waves crash on the shore and seagulls call",
    "An orchestra plays a slow, sad melody with violins and a cello",
    "A car engine starts, idles and drives away on gravel",
    "Church bells ring while a crowd applauds",
    "Soft piano over vinyl crackle, lo-fi hip hop beat",
    "Thunder rolls far away, then wind and heavy rain",
)
_PRINTABLE_ASCII: Final = tuple(map(chr, range(33, 127)))


def roberta_tokenizer(sentences: Sequence[str] = SENTENCES, vocabulary: int = 600) -> "RobertaTokenizer":
    """Byte-level BPE of `sentences` with RoBERTa's special ids (<s> 0, <pad> 1, </s> 2, <unk> 3).

    The `model_max_length` is 512.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import RobertaTokenizer

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(sentences, trainer)
    merges: list[Any] = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    return RobertaTokenizer(vocab=trained.get_vocab(), merges=merges, model_max_length=512)


def t5_tokenizer(sentences: Sequence[str] = SENTENCES) -> "T5Tokenizer":
    """Unigram pieces with T5's special ids (<pad> 0, </s> 1, <unk> 2) and a `model_max_length` of 128.

    The pieces are the words of the sentences and all printable ASCII characters, by their frequency: the library's
    own trainer drops rare characters.
    """
    from transformers import T5Tokenizer

    words = Counter("▁" + word for sentence in sentences for word in sentence.split())
    characters = Counter(character for word in words.elements() for character in word)
    pieces = words + characters + Counter(("▁", *_PRINTABLE_ASCII))
    total = pieces.total()
    # A character alone must lose against the word it is part of.
    scores = sorted((piece, log(count / total) - 4 * (len(piece) == 1)) for piece, count in pieces.items())
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*special, *scores], extra_ids=0, model_max_length=128)


def save_vits_tokenizer(folder: Path, length: int) -> None:
    """Writes a tokenizer of letters with AudioLDM 2's ids (<pad> 0, the end 182) and a `model_max_length` of `length`.

    That of a real checkpoint has phonemes, for which it needs espeak.
    """
    from transformers import VitsTokenizer

    phonemes = map(chr, range(0x250, 0x250 + 143))
    tokens = ["<pad>", "<unk>", " ", *ascii_lowercase, *digits, *phonemes, "<end>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({token: index for index, token in enumerate(tokens)}), encoding="utf-8")
    tokenizer = VitsTokenizer(vocabulary, add_blank=False, phonemize=False, model_max_length=length)
    tokenizer.save_pretrained(folder)
