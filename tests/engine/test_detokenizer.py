"""Streaming text: whole characters, nothing past a stop string, and the same text in the end."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from tvm_flashinfer.engine.detokenizer import StopStrings, StreamingDetokenizer

TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=30)


def byte_level() -> Tokenizer:
    """A token for every byte, as GPT-2's alphabet writes them."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Words with a leading-space mark, and bytes for everything else, as Llama 2 has them."""
    words = ["▁", "▁once", "▁upon", "a", "b"]
    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {w: 256 + i for i, w in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = StreamingDetokenizer(tokenizer.decode)
    return [*(stream.push(i) for i in ids), stream.finish()]


@settings(deadline=None)
@given(TEXTS)
def test_byte_level_text_arrives_in_whole_characters(text):
    tokenizer = byte_level()
    ids = tokenizer.encode(text).ids
    got = pieces(tokenizer, ids)
    assert "".join(got) == text
    assert len(ids) == len(text.encode())
    # Each character is given out with its last byte.
    ends = [piece for piece in got[:-1] if piece]
    assert "�" in text or ends == list(text)


@settings(deadline=None)
@given(st.lists(st.integers(0, 255), max_size=30))
def test_any_bytes_end_as_the_decoder_has_them(ids):
    tokenizer = byte_level()
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@settings(deadline=None)
@given(st.lists(st.one_of(st.sampled_from([256, 257, 258, 259, 260]), TEXTS), max_size=8))
def test_byte_fallback_keeps_spaces_and_characters(parts):
    tokenizer = byte_fallback()
    ids: list[int] = []
    for part in parts:
        ids += [part] if isinstance(part, int) else list(part.encode())
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def cut(texts: list[str], stops: list[str]) -> tuple[str, bool]:
    stop = StopStrings(stops)
    shown = "".join(stop.push(text) for text in texts)
    return shown + ("" if stop.found else stop.finish()), stop.found


def test_stop_strings_across_pieces():
    assert cut(["Hello wor", "ld, STO", "P and on"], ["STOP"]) == ("Hello world, ", True)
    assert cut(["STO", "RY"], ["STOP"]) == ("STORY", False)
    assert cut(["aab", "aac"], ["aac", "b"]) == ("aa", True)


def test_what_cannot_begin_a_stop_string_is_shown_at_once():
    stop = StopStrings(["\n\nUser:"])
    assert stop.push("Yes.\n") == "Yes."
    assert stop.push("\nUse") == ""
    assert stop.push("less") == "\n\nUseless"


@settings(deadline=None)
@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_where_find_does(text, stops):
    hits = [at for stop in stops if (at := text.find(stop)) >= 0]
    want = text[: min(hits)] if hits else text
    shown, found = cut(list(text), stops)
    assert found == bool(hits)
    # Letter by letter the first stop string to be complete counts, which may begin later.
    assert shown == want or (found and any(text.startswith(shown + stop) for stop in stops))
