"""Pictures of text on its way to another model: which characters a token stands for, what is struck through, what is hollow."""

import pandas as pd
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distillkit.io.packaged import ASSETS
from pictures import transfers
from pictures.transfers import Piece

TEXT = "Returns the eigenvalues café of a Hermitian matrix."


@pytest.fixture(scope="module", params=["tiny-opt", "tiny-llama"])
def tokenizer(request):
    return AutoTokenizer.from_pretrained(ASSETS / request.param)


def test_pieces_are_the_characters_of_the_tokens(tokenizer):
    pieces = transfers.pieces(tokenizer, TEXT)
    assert "".join(TEXT[piece.start : piece.end] for piece in pieces) == TEXT.replace(" ", "")
    assert all(piece.read for piece in pieces)
    assert len(pieces) > len(TEXT.split())


def test_tokens_behind_the_limit_are_not_read(tokenizer):
    every, some = transfers.pieces(tokenizer, TEXT), transfers.pieces(tokenizer, TEXT, 4)
    assert [piece[:2] for piece in some] == [piece[:2] for piece in every]
    assert [piece.read for piece in some] == [True] * 4 + [False] * (len(every) - 4)


def test_an_unknown_token_is_not_read():
    vocabulary = Tokenizer(models.WordPiece({"[UNK]": 0, "ab": 1, "##c": 2}, unk_token="[UNK]"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="[UNK]")
    assert transfers.pieces(tokenizer, "abc xyz") == [Piece(0, 2, True), Piece(2, 3, True), Piece(4, 7, False)]


def test_chips_stand_over_their_characters_and_unread_ones_are_struck_through():
    text = "pay $5 now " * 12
    words = [Piece(start, start + 2, start < 100) for start in range(0, 132, 11)]
    other = [Piece(start, start + 3, True) for start in range(0, 132, 11)]
    figure = transfers.chips(text, {"one": words, "other": other}, "Cut")
    (axes,) = figure.axes
    assert len(axes.patches) == len(words) + len(other)
    assert len([line for line in axes.lines if line.get_label() == "_struck"]) == sum(not word.read for word in words)
    drawn = [label.get_text() for label in axes.texts]
    assert drawn.count("pa") == 12 == drawn.count("pay") and drawn.count("one") == 3  # three lines of text
    fills = {patch.get_facecolor()[:3] for patch in axes.patches}
    assert len(fills) == 2  # cut differently, and not read


def test_a_text_without_spaces_is_broken_all_the_same():
    figure = transfers.chips("a" * 150, {"one": [Piece(0, 1, True), Piece(149, 150, True)]}, "Long")
    assert len(figure.axes[0].patches) == 2


def test_slopes_join_what_was_measured():
    rows = [("random", "home", 0, 0.4), ("random", "home", 1, 0.6), ("random", "away", 0, 0.3), ("swaps", "away", 0, 0.5)]
    scores = pd.DataFrame(rows, columns=["method", "target", "set_seed", "accuracy"])
    figure = transfers.slopes({"Where": scores}, 0.25, {"home": 0.8, "elsewhere": 0.9})
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    aside = transfers.STEP / 2
    assert lines["real, random"].get_xydata().tolist() == [[0 - aside, 0.5], [1 - aside, 0.3]]
    assert lines["swaps"].get_xydata().tolist() == [[1 + aside, 0.5]]
    hollow = [line for line in axes.lines if line.get_label() == "_one set"]
    assert [line.get_xydata().tolist() for line in hollow] == [[[1 - aside, 0.3]], [[1 + aside, 0.5]]]
    assert {line.get_markerfacecolor() for line in hollow} == {"white"} != {lines["swaps"].get_markerfacecolor()}
    assert [text.get_text() for text in axes.get_xticklabels()] == ["home", "away"]
    assert [text.get_text() for text in axes.texts] == ["real, random", "swaps", "all data", "guessing"]
    low, high = (text.get_position()[1] for text in axes.texts[:2])
    assert high - low > 0.04  # names of equal scores do not cover each other
