"""Calibration data in every form users have it, and what each wrong form is told."""

import json

import pytest
import torch
from datasets import Dataset

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


def test_masks_mark_padding():
    ids = torch.stack(token_samples(2, 10))
    mask = torch.tensor([[1] * 10, [1] * 6 + [0] * 4])
    (batch,) = load([{"input_ids": ids, "attention_mask": mask}], sequence_length=10, batch_size=2)
    assert torch.equal(batch.attention_mask, mask)
    assert batch.tokens == 16
    (plain,) = load([{"input_ids": ids}], sequence_length=10, batch_size=2)
    assert plain.attention_mask is None


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (None, "there is no text: pass a name"),
        ([words(40)], r"has 40 tokens, but num_samples=4 x sequence_length=16 asks for 64; .*num_samples=2 would fit"),
        (
            [words(10)],
            r"has 10 tokens, fewer than one sequence of sequence_length=16; pass more text or lower sequence_l",
        ),
        (["  "], "the text is empty"),
        ([], "the text is empty"),
        ("nothing.txt", "the text file nothing.txt does not exist"),
        ("imagenet", "the text 'imagenet' is not known; pass 'c4', 'wikitext2', 'ptb'"),
        ([{"body": "x"}], r"has the columns \['body'\]"),
        ([3, 4], "of type int: neither a string"),
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
