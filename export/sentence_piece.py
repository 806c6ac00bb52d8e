"""A SentencePiece model as a `tokenizer.json`, where that can be exact."""

from typing import Any

import tokenizers
from keras_hub.tokenizers import SentencePieceTokenizer
from tokenizers import AddedToken
from tokenizers import Regex
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers

SPACE = "▁"
# Ends the name of a piece that matches no text. It is no letter: Unicode keeps
# it for the inside of programs.
UNSEEN = "\ufdd0"


def convert_sentence_piece(
    layer: SentencePieceTokenizer,
) -> tokenizers.Tokenizer | None:
    """`layer` as a tokenizer file, or `None` where its algorithm has none.

    Unigram and byte-pair models convert; word and character models do not.
    User-defined symbols and some normalization tables behave differently in
    the two libraries, so only a comparison on text decides.
    """
    if layer.add_bos or layer.add_eos:
        return None
    proto = _parse(layer.proto)
    model = _model(proto, layer)
    if model is None:
        return None
    result = tokenizers.Tokenizer(model)
    result.add_tokens(_user_defined(proto))
    result.normalizer = normalizers.Sequence(_steps(proto.normalizer_spec))
    result.decoder = decoders.Metaspace(replacement=SPACE)
    return result


def piece_ids(layer: SentencePieceTokenizer) -> dict[str, int]:
    """How keras-hub's ids follow from those of the model file.

    An id is the file's plus `id_offset`, except that the file's `unknown_in`
    becomes `unknown_id`: XLM-RoBERTa counts from a padding token of its own.
    """
    proto = _parse(layer.proto)
    pieces = [piece.piece for piece in proto.pieces]
    last = len(pieces) - 1
    return {
        "id_offset": int(layer.token_to_id(pieces[last])) - last,
        "unknown_in": proto.trainer_spec.unk_id,
        "unknown_id": int(layer.token_to_id(proto.trainer_spec.unk_piece)),
    }


def _parse(serialized: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # Made at run time: no types.
    proto = messages.ModelProto()
    proto.ParseFromString(serialized)
    return proto


def _model(proto: Any, layer: SentencePieceTokenizer) -> models.Model | None:
    spec = proto.trainer_spec
    scores = _scores(proto, layer)
    unknown = scores.index((spec.unk_piece + UNSEEN, 0.0))
    if spec.model_type == spec.UNIGRAM:
        return models.Unigram(scores, unknown, byte_fallback=spec.byte_fallback)
    if spec.model_type == spec.BPE:
        return models.BPE(
            vocab={piece: id for id, (piece, _) in enumerate(scores)},
            merges=_merges(_merging(proto, scores)),
            unk_token=scores[unknown][0],
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    return None


def _scores(
    proto: Any, layer: SentencePieceTokenizer
) -> list[tuple[str, float]]:
    """Pieces with their scores, in the order of keras-hub's ids.

    A piece that must not match text, such as `<s>` or a mask that keras-hub
    adds, gets a name that no text contains.
    """
    kind = proto.SentencePiece
    matching = {
        piece.piece: piece.score
        for piece in proto.pieces
        if piece.type in (kind.NORMAL, kind.USER_DEFINED, kind.BYTE)
    }
    return [
        (piece, matching[piece]) if piece in matching else (piece + UNSEEN, 0.0)
        for piece in layer.get_vocabulary()
    ]


def _user_defined(proto: Any) -> list[AddedToken]:
    """Pieces that are cut out of a text before anything else.

    Those with a space mark stay pieces with the best of scores: a text has no
    such mark yet where it is cut.
    """
    kind = proto.SentencePiece
    return [
        AddedToken(piece.piece, normalized=False, special=False)
        for piece in proto.pieces
        if piece.type == kind.USER_DEFINED and SPACE not in piece.piece
    ]


def _merging(proto: Any, scores: list[tuple[str, float]]) -> dict[str, float]:
    """Pieces that are merged from others: no bytes, nothing cut out."""
    cut = {token.content for token in _user_defined(proto)}
    kind = proto.SentencePiece
    cut |= {p.piece for p in proto.pieces if p.type == kind.BYTE}
    return {piece: score for piece, score in scores if piece not in cut}


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece from two others, best piece first."""
    found = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                found.append((-score, left, right))
    return [(left, right) for _, left, right in sorted(found)]


def _steps(spec: Any) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        # The two libraries disagree on letters under two marks or more,
        # unless those are composed first.
        steps.append(normalizers.NFC())
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " ")]
        # Not `^ | $`, which some engines match at every line.
        ends = r"(?<![\s\S]) | (?![\s\S])"
        steps += [normalizers.Replace(Regex(ends), "")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return steps
