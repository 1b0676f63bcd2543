"""Training a model further with the words of new captions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from training_run import make_settings, write_clips

from higen.families.higen import spec
from higen.train.networks import build
from higen.train.trainer import train
from higen.train.words import copy_words, words_of

TABLE = "embeddings.token_embedding.weight"
CAPTIONS = ("A blue whale, sleeping", "a green submarine")


def test_words_as_they_are_split() -> None:
    assert words_of(CAPTIONS) == [",", "a", "blue", "green", "sleeping", "submarine", "whale"]


def test_known_words_keep_their_rows(tmp_path: Path, tiny_model: Path) -> None:
    clips = write_clips(tmp_path / "clips", CAPTIONS)
    changes = {"model__tokenizer": "captions", "optimiser__train_text": True, "data__images": 0, "run__steps": 1}
    settings = make_settings(tmp_path, tiny_model, clips, **changes)
    networks = build(settings, CAPTIONS)
    theirs, before = load_file(tiny_model / spec.TEXT_ENCODER), Tokenizer.from_file(str(tiny_model / spec.TOKENIZER))
    vocabulary, table = networks.tokenizer.tokenizer.get_vocab(), networks.text.get_parameter(TABLE)
    assert len(table) == len(vocabulary) == 4 + 7
    for token, place in vocabulary.items():
        known = before.token_to_id(token)
        rows = table[place] == theirs[TABLE]
        assert (known is not None and bool(rows[known].all())) == (token not in ("sleeping", "submarine"))
    others = {name: tensor for name, tensor in networks.text.named_parameters() if name != TABLE}
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in others.items())
    for name, tensor in load_file(tiny_model / spec.UNET).items():
        assert torch.equal(networks.denoiser.get_parameter(name), tensor)
    said: list[str] = []
    made = train(settings, say=said.append)
    assert any("the 7 words of the captions: the model knew 5 of them, 2 are new" in line for line in said)
    assert Tokenizer.from_file(str(made.path / spec.TOKENIZER)).get_vocab() == vocabulary
    assert spec.config(made.manifest).text.clip["vocab_size"] == 11


@pytest.mark.parametrize("end", ["", "</w>"])
def test_words_of_a_vocabulary_of_pieces(end: str) -> None:
    """In CLIP's vocabulary "whale</w>" is the word, and "whale" is the beginning of another word."""
    given = torch.arange(8.0).reshape(4, 2)
    theirs = {"whale": 0, f"whale{end}": 1, f"green{end}": 2} if end else {"whale": 1, "green": 2}
    table = torch.full((4, 2), -1.0)
    assert copy_words(table, {"whale": 3, "green": 0, "submarine": 1}, given, theirs) == {"whale", "green"}
    assert table.tolist() == [[4.0, 5.0], [-1.0, -1.0], [-1.0, -1.0], [2.0, 3.0]]
