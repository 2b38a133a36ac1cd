"""Text: every kind of corpus is read, and packing leaves nothing out."""

import json
from pathlib import Path
from unittest import mock

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import errors
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import EOT, make_stories, make_tokenizer, write_jsonl

from vsae_jax.activations import text
from vsae_jax.system.errors import UserError

BOS = 0


class Spelled:
    """A tokenizer whose ids are the letters' code points."""

    def __call__(self, batch, **options):
        return {"input_ids": [[ord(letter) for letter in text] for text in batch]}


def pack(documents, *, length=4, bos="keep", tokenizer=None) -> list[list[int]]:
    packed = text.contexts(
        documents, tokenizer or Spelled(), context_length=length, bos_id=BOS, bos=bos
    )
    return [context.tolist() for context in packed]


def read(path: Path, **options) -> list[str]:
    return list(text.documents(str(path), **options))


def test_jsonl_is_one_object_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": "one"}, {"text": ""}, {"text": None}, {"text": "zwei\n\nDrei ü"}]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    assert read(path) == ["one", "zwei\n\nDrei ü"]


def test_a_lone_surrogate_in_json_is_replaced_and_tokenised(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n')
    assert read(path) == ["a?b"]
    assert pack(read(path), length=2, bos="none", tokenizer=make_tokenizer())


def test_another_column_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"story": "one", "text": "two"}\n')
    assert read(path, text_column="story") == ["one"]


def test_txt_with_borders_keeps_blank_lines_inside_a_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(f"one\n\nstill one\n{EOT}\ntwo {EOT} in a line\n{EOT}\n{EOT}\n")
    assert read(path) == ["one\n\nstill one", f"two {EOT} in a line"]


def test_txt_without_borders_is_split_at_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\none\nstill one\n\n \n\ntwo\n")
    assert read(path) == ["one\nstill one", "two"]


def test_txt_with_windows_line_ends_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n<|endoftext|>\r\ntwo\r\n\r\nstill two\r\n")
    assert read(path) == ["one", "two\n\nstill two"]


def test_parquet_is_one_row_a_document(tmp_path):
    path = tmp_path / "a.parquet"
    rows = {"text": ["one", None, "two"], "label": [0, 1, 2]}
    pyarrow.parquet.write_table(pyarrow.table(rows), path)
    assert read(path) == ["one", "two"]
    with pytest.raises(UserError, match="no --text_column=story; there is: label, te"):
        read(path, text_column="story")


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b'["one"]\n', "line 1 is not a JSON object"),
        ("a.jsonl", b'{"story": "one", "b": 1}\n', "there is: b, story"),
        ("a.jsonl", b'{"text": ["one"]}\n', "line 1: 'text' is of type list"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b"\n \n<|endoftext|>\n", "holds no text"),
        ("a.txt", b"one\n\xff\n", "not UTF-8"),
        ("a.parquet", b"PAR1 no", "not a parquet file"),
        ("a.csv", b"one", "is not a .jsonl, .txt or .parquet file"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as refused:
        read(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["gone.jsonl", "./gone", "/gone/x.csv", "~/gone.txt"])
def test_a_file_that_is_not_there_is_refused_before_anything_is_read(name):
    with pytest.raises(UserError, match="no such file|is not a .jsonl"):
        text.documents(name)


def test_a_folder_is_no_corpus(tmp_path):
    with pytest.raises(UserError, match="is not a .jsonl, .txt or .parquet file"):
        text.documents(str(tmp_path))


@pytest.fixture
def hub(monkeypatch):
    """A hub with one data set of one split."""

    def load(name, *, split, streaming):
        assert name == "me/stories" and streaming
        if split != "train":
            raise ValueError(f"Bad split: {split}. Available splits: ['train']")
        return iter([{"text": "one"}, {"text": "two"}])

    monkeypatch.setattr(huggingface_hub, "dataset_info", lambda name, timeout: None)
    monkeypatch.setattr(datasets, "load_dataset", load)


def test_a_hub_data_set_is_streamed(hub):
    assert list(text.documents("me/stories")) == ["one", "two"]


def test_what_is_wrong_with_a_hub_data_set_is_said(hub):
    with pytest.raises(UserError, match="--split=test.*Available splits"):
        text.documents("me/stories", split="test")
    with pytest.raises(UserError, match="me/stories, row 0: no --text_column=story"):
        list(text.documents("me/stories", text_column="story"))


@pytest.mark.parametrize(
    "error, said",
    [
        (
            errors.HfHubHTTPError.__bases__[0]("Name or service not known"),
            "cannot be reached",
        ),
        (ConnectionError("offline mode is enabled"), "cannot be reached"),
        (errors.HFValidationError("not a name"), "nor a data set that the hub"),
        (
            errors.RepositoryNotFoundError("404", response=mock.MagicMock()),
            "nor a data set that the hub",
        ),
    ],
)
def test_a_hub_out_of_reach_names_both_ways_on(monkeypatch, error, said):
    def fail(name, timeout):
        raise error

    monkeypatch.setattr(huggingface_hub, "dataset_info", fail)
    with pytest.raises(UserError, match=f"{said}.*jsonl.*vsae_jax.demo") as refused:
        text.documents("me/stories")
    assert "\n" not in str(refused.value)


def test_a_stream_that_breaks_off_says_how_to_go_on(hub, monkeypatch):
    def rows():
        yield {"text": "one"}
        raise ConnectionError("reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: rows())
    documents = text.documents("me/stories")
    assert next(documents) == "one"
    with pytest.raises(UserError, match="broke off.*reset by peer.*goes on"):
        next(documents)


def ids(word: str) -> list[int]:
    return [ord(letter) for letter in word]


def test_packing_by_hand():
    """A context starts with BOS, a cut document goes on after it, and a document at
    the start of a context has no second one before it."""
    assert pack(["abcd", "e", "fgh", "ij"]) == [
        [BOS, *ids("abc")],
        [BOS, *ids("d"), BOS, *ids("e")],
        [BOS, *ids("fgh")],
    ]
    assert pack(["abcd", "e", "fgh", "ij"], bos="none") == [
        ids("abcd"),
        [*ids("e"), BOS, *ids("fg")],
        [*ids("h"), BOS, *ids("ij")],
    ]
    assert pack(["abc", "defg"], bos="drop") == pack(["abc", "defg"], bos="keep")


@given(
    documents=st.lists(st.text("abcdefgh", min_size=1, max_size=12), min_size=1),
    length=st.integers(2, 9),
    bos=st.sampled_from(["keep", "drop", "none"]),
)
@settings(deadline=None, max_examples=200)
def test_packing_loses_adds_and_moves_nothing(documents, length, bos):
    """The contexts' letters are the documents', in order, but for an unfinished end;
    every document but those at a context's start is preceded by one separator."""
    start = 0 if bos == "none" else 1
    letters = [i for document in documents for i in ids(document)]
    try:
        packed = pack(documents, length=length, bos=bos)
    except UserError:
        assert len(letters) < length - start
        return
    assert all(len(c) == length for c in packed)
    assert all(c[:start] == [BOS] * start for c in packed)
    kept = [i for c in packed for i in c[start:] if i != BOS]
    assert kept == letters[: len(kept)]
    assert len(letters) - len(kept) < length - start
    borders = set(np.cumsum([len(document) for document in documents[:-1]]).tolist())
    seen, separated = 0, set()
    for context in packed:
        for place, i in enumerate(context[start:]):
            if i == BOS:
                separated.add(seen)
                assert place > 0
            elif place == 0:
                separated.add(seen) if seen in borders else None
            seen += i != BOS
    assert separated - {seen} == {b for b in borders if b < seen}


def test_contexts_are_int32_arrays_of_the_asked_length():
    first = next(
        text.contexts(
            make_stories(20),
            make_tokenizer(),
            context_length=16,
            bos_id=BOS,
            bos="keep",
        )
    )
    assert first.dtype == np.int32 and first.shape == (16,)


def test_the_real_tokenizers_text_comes_back_from_the_contexts():
    tokenizer, stories = make_tokenizer(), make_stories(700)
    packed = pack(stories, length=32, tokenizer=tokenizer)
    back = tokenizer.decode([i for c in packed for i in c[1:] if i != BOS])
    assert "".join(stories).startswith(back) and len(back) > 10_000


def test_text_that_spells_a_special_token_stays_text():
    tokenizer = make_tokenizer()
    packed = pack([f"a{EOT}b" * 5], length=30, bos="none", tokenizer=tokenizer)
    assert BOS not in packed[0]
    assert tokenizer.decode(packed[0]).startswith(f"a{EOT}b")


@pytest.mark.parametrize("bos, room", [("keep", 9), ("none", 10)])
def test_a_corpus_shorter_than_a_context_is_refused_with_both_numbers(bos, room):
    assert len(pack(["a" * room], length=10, bos=bos)) == 1
    said = f"too short: {room - 1} tokens.*--context_length=10 needs {room}"
    with pytest.raises(UserError, match=said):
        pack(["a" * (room - 1)], length=10, bos=bos)


def test_no_room_beside_bos_is_refused():
    with pytest.raises(UserError, match="--context_length=1 leaves no room"):
        pack(["abc"], length=1)


def test_most_tokens_bounds_the_tokens_of_a_file(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["ab", "c", "üö"])
    most = text.most_tokens(str(path))
    stream = [i for context in pack(read(path), length=1, bos="none") for i in context]
    assert len(stream) <= most <= path.stat().st_size + 1
    assert text.most_tokens("roneneldan/TinyStories") is None
