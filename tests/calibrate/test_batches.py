"""Calibration data in every form users have it, and what each wrong form is told."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from arb_hf import ArbCalibrationError, ArbConfig
from arb_hf.calibrate.batches import load_batches
from helpers.models import VOCABULARY, token_samples, word_tokenizer, words


def load(dataset, *, max_length=256, **options):
    options = {"num_samples": 4, "sequence_length": 16} | options
    return load_batches(ArbConfig(dataset=dataset, **options), word_tokenizer, VOCABULARY, max_length)


def ids_of(batches) -> torch.Tensor:
    return torch.cat([batch.input_ids for batch in batches])


@pytest.fixture
def files(tmp_path):
    rows = [{"text": words(40)}, {"text": words(60)}]
    (tmp_path / "t.txt").write_text("\n\n".join(row["text"] for row in rows))
    (tmp_path / "t.raw").write_text("\n".join([words(40), "", words(60), ""]))
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    Dataset.from_list(rows).to_parquet(str(tmp_path / "t.parquet"))
    return tmp_path


@pytest.mark.parametrize("name", ["t.txt", "t.raw", "t.jsonl", "t.parquet"])
def test_files_give_the_same_windows_as_a_list(files, name):
    batches = load(str(files / name))
    assert torch.equal(ids_of(batches), ids_of(load([words(40), words(60)])))
    assert all(batch.input_ids.shape == (1, 16) for batch in batches)
    assert torch.equal(ids_of(batches), ids_of(load(files / name)))


def test_windows_are_drawn_with_a_local_generator():
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    ids = torch.tensor(word_tokenizer()(words(300), add_special_tokens=False)["input_ids"])
    starts = torch.randint(0, len(ids) - 16, (4,), generator=torch.Generator().manual_seed(7))
    expected = torch.stack([ids[start : start + 16] for start in starts.tolist()])
    assert torch.equal(ids_of(load([words(300)], seed=7)), expected)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_data_sets_of_text_tokens_and_chats():
    text = Dataset.from_dict({"text": [words(100)]})
    assert torch.equal(ids_of(load(text)), ids_of(load([words(100)])))
    samples = token_samples(5, 12)
    tokens = Dataset.from_dict({"input_ids": [sample.tolist() for sample in samples]})
    assert torch.equal(ids_of(load(tokens, sequence_length=12)), torch.stack(samples[:4]))


def test_chat_messages_go_through_the_template():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} w9 {% endfor %}"
    chats = [[{"role": "user", "content": words(30)}, {"role": "assistant", "content": words(40)}]]
    config = ArbConfig(num_samples=2, sequence_length=16)
    config.dataset = chats
    expected = load([words(30) + " w9 " + words(40) + " w9 "], num_samples=2)
    assert torch.equal(ids_of(load_batches(config, lambda: tokenizer, VOCABULARY, None)), ids_of(expected))
    config.dataset = [{"messages": chats[0]}]
    assert torch.equal(ids_of(load_batches(config, lambda: tokenizer, VOCABULARY, None)), ids_of(expected))
    with pytest.raises(ArbCalibrationError, match="no chat template"):
        load(chats)


def test_several_splits_are_refused():
    with pytest.raises(ArbCalibrationError, match=r"a mapping with 'train', 'test': pass one part of it"):
        load({"train": [words(40)], "test": [words(40)]})


def test_tokens_are_taken_as_they_are():
    samples = token_samples(6, 20)
    assert torch.equal(ids_of(load(samples, sequence_length=20)), torch.stack(samples[:4]))
    assert torch.equal(ids_of(load(torch.stack(samples), sequence_length=20)), torch.stack(samples[:4]))
    assert len(load(samples[:2], sequence_length=20)) == 2
    batches = load(samples, sequence_length=20, batch_size=3)
    assert [batch.input_ids.shape[0] for batch in batches] == [3, 1]


SAMPLES = torch.stack(token_samples(4, 20))


@pytest.mark.parametrize(
    "form",
    [
        lambda ids: {"input_ids": ids},
        lambda ids: BatchEncoding({"input_ids": ids.tolist()}),
        lambda ids: ids.tolist(),
        lambda ids: ids.numpy().astype(np.uint16),
        lambda ids: list(ids.numpy()),
        lambda ids: (row for row in ids.tolist()),
        lambda ids: IterableDataset.from_generator(lambda: iter([{"input_ids": row} for row in ids.tolist()])),
        lambda ids: DataLoader([{"input_ids": row} for row in ids], batch_size=2),
        lambda ids: Dataset.from_dict({"input_ids": ids.tolist(), "text": ["w1"] * len(ids)}),
    ],
)
def test_token_ids_in_every_form(form):
    assert torch.equal(ids_of(load(form(SAMPLES), sequence_length=20)), SAMPLES)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_token_ids_in_files(tmp_path, suffix):
    rows = Dataset.from_dict({"input_ids": SAMPLES.tolist()})
    path = str(tmp_path / f"ids.{suffix}")
    rows.to_json(path) if suffix == "jsonl" else rows.to_parquet(path)
    assert torch.equal(ids_of(load(path, sequence_length=20)), SAMPLES)


def test_sequences_of_a_batch_may_differ_in_length():
    batches = load({"input_ids": [[1, 2, 3], [4, 5]], "attention_mask": [[0, 1, 1], [1, 1]]}, sequence_length=2048)
    assert [batch.input_ids.tolist() for batch in batches] == [[[1, 2, 3]], [[4, 5]]]
    assert [batch.tokens for batch in batches] == [2, 2]


def test_no_more_token_rows_are_read_than_samples_are_wanted():
    def rows():
        yield from SAMPLES
        pytest.fail("a fifth row was read")

    assert torch.equal(ids_of(load(rows(), sequence_length=20)), SAMPLES)


@pytest.mark.parametrize("options", [{"sequence_length": 16}, {"sequence_length": 20, "tokenizer": word_tokenizer()}])
def test_options_for_text_have_no_effect_on_token_ids(options):
    with pytest.warns(UserWarning, match="has no effect: dataset holds token ids") as told:
        load(SAMPLES, **options)
    assert len(told) == 1


def test_rows_without_text_are_left_out():
    rows = [{"text": words(40)}, {"text": None}, {"text": words(60)}, {"messages": None}]
    assert torch.equal(ids_of(load(rows)), ids_of(load([words(40), None, words(60)])))
    assert torch.equal(ids_of(load(rows)), ids_of(load([words(40), words(60)])))


def test_marks_of_byte_order_and_capitals_are_no_text(tmp_path):
    (tmp_path / "T.TXT").write_text(words(100), encoding="utf-8-sig")
    (tmp_path / "T.JSONL").write_text(json.dumps({"text": words(100)}), encoding="utf-8-sig")
    for name in ("T.TXT", "T.JSONL"):
        assert torch.equal(ids_of(load(tmp_path / name)), ids_of(load([words(100)])))


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("latin-1", "byte 0xe9: invalid continuation byte.*iconv -f LATIN1"),
        ("utf-16", "byte 0xff.*iconv -f UTF-16"),
        ("utf-16-le", "zero bytes, like UTF-16"),
    ],
)
@pytest.mark.parametrize("name", ["t.txt", "t.raw"])
def test_other_encodings_are_told_of_file_and_cure(tmp_path, name, encoding, message):
    (tmp_path / name).write_bytes(("é" * (encoding == "latin-1") + words(100)).encode(encoding))
    with pytest.raises(ArbCalibrationError, match=rf"{name} is not UTF-8 text \(.*{message}"):
        load(tmp_path / name)


def test_rows_of_files_are_named_by_line(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "w1"}\n\n{"body": "w2"}\n')
    with pytest.raises(ArbCalibrationError, match=r"x\.jsonl, line 3 of the text has the columns \['body'\]; it needs"):
        load(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "w1"}\n{"text": "\xe9"}\n')
    with pytest.raises(ArbCalibrationError, match=r"x\.jsonl is not UTF-8 text"):
        load(tmp_path / "x.jsonl")
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(ArbCalibrationError, match=r"x\.parquet is not a readable parquet file"):
        load(tmp_path / "x.parquet")
    with pytest.raises(ArbCalibrationError, match="is a folder: pass a file in it"):
        load(tmp_path)


def test_masks_mark_padding():
    ids = torch.stack(token_samples(2, 10))
    mask = torch.tensor([[1] * 10, [1] * 6 + [0] * 4])
    (batch,) = load([{"input_ids": ids, "attention_mask": mask}], sequence_length=10, batch_size=2)
    assert torch.equal(batch.attention_mask, mask)
    assert batch.tokens == 16
    (plain,) = load([{"input_ids": ids}], sequence_length=10, batch_size=2)
    assert plain.attention_mask is None


FEW = r"has 10 tokens, fewer than one sequence of sequence_length=16; pass more text or lower sequence_l"


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (None, "there is no text: pass a name"),
        ([words(40)], r"has 40 tokens, but num_samples=4 x sequence_length=16 asks for 64; .*num_samples=2 would fit"),
        ([words(10)], FEW),
        (["  "], "the text is empty"),
        ([], "the text is empty"),
        ("nothing.txt", "the text file nothing.txt does not exist"),
        ("imagenet", "the text 'imagenet' is not known; pass 'c4', 'wikitext2', 'ptb'"),
        ([{"body": "x"}], r"has the columns \['body'\]"),
        ([3, 4], "of type int: neither a string"),
        ([words(40), 3], "row 1 of the text is of type int"),
        ([b"w1"], "row 0 of the text is of type bytes.*decode it"),
        ([{"text": 3}], "row 0 of the text: its column 'text' is of type int, it must be a string"),
        ([{"text": ["w1", "w2"]}], "'text' is of type list.*if this is a DataLoader"),
        ([{"role": "user", "content": "w1"}], "row 0 of the text is a single chat message: pass a list of chats"),
        ([(torch.tensor([[1, 2]]), torch.tensor([[1, 2]]))], "of type tuple.*pass the token tensors themselves"),
        ([words(40), [1, 2]], "row 1 of the text holds token ids"),
        ([[1, 2], words(40)], "row 1 holds no token ids, and the rows before it do"),
        ([{"input_ids": None}], "row 0: its input_ids are None, no token ids"),
        ([{"input_ids": [torch.arange(2), torch.arange(2)]}], "row 0: its input_ids are .*pass lists or tensors of"),
        ({"text": [words(40)]}, r"a mapping with 'text': pass one part of it, as in data\['text'\]"),
        (pd.DataFrame({"text": [words(40)]}), r"a pandas DataFrame: pass datasets\.Dataset\.from_pandas\(data\)"),
        (pd.Series([words(40)]), "a pandas Series"),
        (7, "the data are of type int: pass a name"),
        (iter([]), "the stream gave no rows: an iterator gives them only once"),
        ("w1 " * 100, r"the text 'w1 .*\.\.\.' is not known; .*a text itself goes into a list"),
        ([torch.tensor([1, 500])], r"sample 0 has token 500, the model's vocabulary has 128"),
        ([torch.tensor([-1, 5])], r"sample 0 has token -1"),
        ([torch.tensor([0.5, 1.0])], "must be integer vectors"),
        ([torch.zeros(300, dtype=torch.long)], "sample 0 has 300 tokens, the model takes 256"),
        ([{"input_ids": [1, 2], "attention_mask": [0, 0]}], "padding only"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], r"attention_mask has shape \[1\]"),
    ],
)
def test_bad_data_is_refused(dataset, message):
    with pytest.raises(ArbCalibrationError, match=message):
        load(dataset)


def test_too_long_windows_are_refused_before_any_text_is_read():
    with pytest.raises(ArbCalibrationError, match="sequence_length=300 is longer than the model takes"):
        load("nothing.txt", sequence_length=300)


def test_broken_jsonl_names_the_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "w1"}\n{"text": \n')
    with pytest.raises(ArbCalibrationError, match=r"x\.jsonl, line 2: not JSON"):
        load(str(path))


@pytest.mark.parametrize("name", ["c4", "wikitext2", "ptb"])
def test_named_data_offline_says_what_to_pass_instead(name):
    with pytest.raises(
        ArbCalibrationError, match=f"the data set '{name}' .* could not be loaded .*Offline, pass a file instead"
    ):
        load(name)
