"""Windows of text of any size: drawn uniformly, read only where they lie, the same as ever where the text is small."""

import gzip
import itertools
import json

import pytest
import torch
from datasets import Dataset, IterableDataset

from arb_hf import ArbCalibrationError
from arb_hf.calibrate import windows
from arb_hf.calibrate.windows import draw_windows, reserve
from arb_hf.text import SMALL, open_text, tokenize, tokens
from helpers.byte_model import byte_tokenizer

WORDS = 4000  # numbered words of a long text, so that a window tells where it was cut


class Counting:
    """The byte tokenizer, which counts the characters it was given."""

    def __init__(self) -> None:
        self.tokenizer, self.characters = byte_tokenizer(), 0

    def __call__(self, text, **options):
        self.characters += len(text)
        return self.tokenizer(text, **options)


@pytest.fixture
def small(monkeypatch):
    """Texts of more than 512 characters are long, so that tests are quick."""
    for module in (windows, tokens):
        monkeypatch.setattr(module, "SMALL", 512)


def numbered(count: int = WORDS) -> list[str]:
    return [f"word{number:05d}" for number in range(count)]


def drawn(data, count=6, length=32, seed=0, tokenizer=None):
    return draw_windows(open_text(data), tokenizer or byte_tokenizer(), count, length, seed)


def decoded(rows) -> list[str]:
    return [byte_tokenizer().decode(row) for row in rows]


def sources(folder):
    """One text of one row each, in every form that can be read from its middle."""
    text = " ".join(numbered())
    lines = [" ".join(numbered()[at : at + 50]) for at in range(0, WORDS, 50)]
    (folder / "t.txt").write_text(text)
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (folder / "t.raw").write_text("\n".join(lines))
    return {
        "a text file": folder / "t.txt",
        "JSON lines": folder / "t.jsonl",
        "a raw file": folder / "t.raw",
        "a list": lines,
        "a data set": Dataset.from_dict({"text": lines}),
        "a long string": [text],
    }


FORMS = ["a text file", "JSON lines", "a raw file", "a list", "a data set", "a long string"]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("form", FORMS)
def test_windows_of_long_texts_are_parts_of_it_from_everywhere(tmp_path, form):
    data = sources(tmp_path)[form]
    tokenizer = Counting()
    found = decoded(drawn(data, count=200, tokenizer=tokenizer))
    whole = "".join(open_text(data).pieces())
    seam = whole + "\n\n" + whole[:100]
    assert all(window in seam for window in found)
    places = torch.tensor([seam.index(window) / len(whole) for window in found])
    quarters = torch.histc(places, 4, 0, 1)
    assert quarters.min() > 25  # 50 each are expected, with a deviation of 6
    assert tokenizer.characters < 200 * (32 + 2 * tokens.MARGIN) * 2 + 2000  # what the windows need, not 48,000
    assert torch.equal(drawn(data, seed=3), drawn(data, seed=3))
    assert not torch.equal(drawn(data, seed=3), drawn(data, seed=4))


@pytest.mark.usefixtures("small")
def test_long_rows_are_drawn_as_often_as_they_are_long():
    """Rows of a list are drawn by length: one that holds half of the text gives half of the windows."""
    data = ["a" * 50] * 400 + ["b" * 20_000]
    found = decoded(drawn(data, count=200, length=4))
    assert 70 < sum("b" in window for window in found) < 130


def test_small_texts_are_tokenized_as_one_string(tmp_path):
    """The windows of earlier versions: published figures rest on them."""
    text = " ".join(numbered())
    assert len(text) < SMALL
    ids = tokenize(text, byte_tokenizer())
    starts = torch.randint(0, len(ids) - 32, (6,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = torch.stack([ids[start : start + 32] for start in starts])
    (tmp_path / "t.txt").write_text(text)
    for data in (tmp_path / "t.txt", [text], Dataset.from_dict({"text": [text]}), iter([text])):
        assert torch.equal(drawn(data), expected)


@pytest.mark.parametrize("endless", [lambda rows: rows(), IterableDataset.from_generator])
def test_an_endless_stream_is_read_as_far_as_the_reserve(endless):
    read = []

    def rows():
        while True:
            read.append(1)
            yield {"text": f"row {len(read)} " * 100}

    tokenizer = Counting()
    found = drawn(endless(rows), count=4, tokenizer=tokenizer)
    assert found.shape == (4, 32)
    assert len(read) * 700 < 2 * reserve(4, 32)
    assert tokenizer.characters < 4 * 64 * 4 * 2


@pytest.mark.usefixtures("small")
def test_windows_of_a_stream_come_from_everywhere_in_what_was_read():
    found = decoded(drawn((word + " " for word in numbered()), count=100, length=24))
    places = [int(window[window.index("word") + 4 :][:5]) for window in found]
    assert min(places) < WORDS / 10 and max(places) > WORDS * 9 / 10


@pytest.mark.usefixtures("small")
def test_too_little_of_a_long_text_is_refused(tmp_path):
    (tmp_path / "t.txt").write_text("word " * 400)
    with pytest.raises(ArbCalibrationError, match="has at most 2000 tokens, but num_samples=100 x sequence_length=32"):
        drawn(tmp_path / "t.txt", count=100)
    (tmp_path / "t.txt").write_text("\u20ac" * 2000)  # 6000 bytes, and as many tokens
    assert drawn(tmp_path / "t.txt", count=100).shape == (100, 32)
    (tmp_path / "t.txt").write_text("qu" * 2000)  # 2000 tokens of two bytes
    with pytest.raises(ArbCalibrationError, match=r"has about 20\d\d tokens, but num_samples=100 x"):
        drawn(tmp_path / "t.txt", count=100)
    with pytest.raises(ArbCalibrationError, match="fewer than one sequence of sequence_length=2500"):
        drawn(tmp_path / "t.txt", count=1, length=2500)
    with pytest.raises(ArbCalibrationError, match="too much to draw from a stream"):
        drawn(itertools.repeat("word " * 200), count=10**9)


@pytest.mark.usefixtures("small")
def test_windows_of_other_alphabets_start_at_characters(tmp_path):
    text = "".join(chr(0x4E00 + number) for number in range(3000))
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    for row in drawn(tmp_path / "t.txt", count=50, length=31):
        assert byte_tokenizer().decode(row).strip("\ufffd") in text + "\n\n" + text


@pytest.mark.usefixtures("small")
def test_packed_files_are_streams(tmp_path):
    with gzip.open(tmp_path / "t.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": word}) + "\n" for word in numbered())
    with gzip.open(tmp_path / "t.txt.gz", "wt") as file:
        file.write(" ".join(numbered()))
    assert torch.equal(drawn(tmp_path / "t.jsonl.gz"), drawn(iter(numbered())))
    assert drawn(tmp_path / "t.txt.gz").shape == (6, 32)
    (tmp_path / "t.txt.gz").write_bytes((tmp_path / "t.txt.gz").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"t\.txt\.gz is not a whole gzip file"):
        drawn(tmp_path / "t.txt.gz")


def test_the_named_data_sets_that_figures_rest_on_are_read_whole(monkeypatch):
    """WikiText-2 and PTB keep their windows, however long; C4 is streamed and read as far as it is needed."""
    calls = []

    def load(path, subset=None, **options):
        calls.append(options)
        rows = Dataset.from_dict({"text": numbered(), "sentence": numbered()})
        return rows.to_iterable_dataset() if options.get("streaming") else rows

    monkeypatch.setattr("datasets.load_dataset", load)
    whole = "\n\n".join(numbered())
    expected = drawn([whole])
    for module in (windows, tokens):
        monkeypatch.setattr(module, "SMALL", 512)
    for name in ("wikitext2", "ptb"):
        assert torch.equal(drawn(name), expected)
    assert torch.equal(drawn("c4"), drawn(iter(numbered())))
    assert [options.get("streaming", False) for options in calls] == [False, False, True]
