"""Perplexity and zero-shot accuracy: against plain definitions, and against lm-evaluation-harness itself."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import arb_hf
from arb_hf.evaluate import evaluation_windows, multiple_choice, perplexity
from arb_hf.text import tokens as text_tokens
from helpers.byte_model import byte_tokenizer, byte_tokens, save_byte_model
from helpers.process import fresh_process

ITEMS = [
    {"query": "Question: What is wet?\nAnswer:", "choices": ["water", "a stone", "fire"], "gold": 0},
    {"query": "Question: Where is the sky? ", "choices": ["above", "below the river"], "gold": 0},
    {"query": "The fox jumps over", "choices": ["the dog", "nothing at all, ever"], "gold": 1},
    {"query": "", "choices": ["a", "The quick brown fox"], "gold": 1},
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Folder of a packed model with a byte-level tokenizer."""
    folder = save_byte_model(tmp_path_factory.mktemp("evaluate") / "dense")
    config = arb_hf.ArbConfig(dataset=byte_tokens(), block_size=32, refinement="paper", iterations=2)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    arb_hf.save_pretrained(model, byte_tokenizer(), folder.parent / "packed")
    return folder.parent / "packed"


@pytest.fixture(scope="module")
def model(packed):
    return arb_hf.from_pretrained(packed)


@pytest.mark.parametrize(
    "size", [{"sequence_length": 0}, {"sequence_length": -5}, {"max_windows": 0}, {"max_windows": -1}]
)
def test_sizes_of_nothing_are_refused(size):
    with pytest.raises(ValueError, match=next(iter(size))):
        evaluation_windows(torch.arange(100), **({"sequence_length": 10} | size))


def test_perplexity_is_that_of_the_models_own_loss(model):
    windows = byte_tokens(5, 24, seed=3)
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in windows]
    expected = math.exp(sum(losses) / len(losses))
    assert perplexity(model, windows) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, windows.flatten(), sequence_length=24, batch_size=2) == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_a_uniform_model_is_the_vocabulary(model):
    head = model.lm_head.weight.data.clone()
    model.lm_head.weight.data.zero_()
    try:
        assert perplexity(model, byte_tokens(2, 16)) == pytest.approx(257, rel=1e-5)
    finally:
        model.lm_head.weight.data.copy_(head)


def test_windows_do_not_overlap_and_the_rest_is_dropped():
    windows = evaluation_windows(torch.arange(25), sequence_length=8)
    assert windows.tolist() == [list(range(start, start + 8)) for start in (0, 8, 16)]
    assert len(evaluation_windows(torch.arange(25), sequence_length=8, max_windows=2)) == 2


def test_raw_text_is_joined_as_the_data_set_is(tmp_path):
    (tmp_path / "wiki.raw").write_text(" \n = A = \n \n b \n")
    windows = evaluation_windows(byte_tokenizer(), tmp_path / "wiki.raw", sequence_length=2)
    text = byte_tokenizer().decode(windows.flatten())
    assert "\n\n".join(["", " = A = \n", "", " b \n"]).startswith(text)
    assert len(text) >= 18


def test_training_mode_and_long_logits_are_left_alone(model, monkeypatch):
    windows = byte_tokens(2, 24)
    whole = perplexity(model, windows)
    monkeypatch.setattr("arb_hf.evaluate.LOSS_ROWS", 5)
    model.train()
    assert perplexity(model, windows) == pytest.approx(whole, rel=1e-6)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (torch.arange(7), {"sequence_length": 8}, "7 tokens, fewer than one window"),
        (torch.zeros(2, 1, dtype=torch.int64), {}, "length >= 2"),
        (torch.zeros(2, 8), {}, "integers"),
        (torch.full((1, 8), 257), {}, "token 257 is outside the model's vocabulary of 257"),
        (torch.full((1, 8), -1), {}, "token -1"),
        (torch.ones(1, 300, dtype=torch.int64), {}, "longer than the model takes"),
    ],
)
def test_unusable_tokens_are_refused(model, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model, tokens, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluation_windows(None, ["text"]), "of type NoneType: pass a tokenizer, or token ids as one tensor"),
        (lambda: evaluation_windows({"input_ids": [1]}, ["text"]), "of type dict: .*'input_ids'"),
        (lambda: evaluation_windows(byte_tokenizer(), [torch.arange(9)]), "row 0 of the text holds token ids"),
        (lambda: evaluation_windows(byte_tokenizer(), ["  "]), "the text is empty"),
        (lambda: perplexity(None, torch.ones(1, 8), batch_size=0), "batch_size=0"),
        (lambda: multiple_choice(None, None, ITEMS, batch_size=0), "batch_size=0"),
        (lambda: multiple_choice(None, None, ITEMS, max_items=-1), "max_items=-1"),
        (lambda: multiple_choice(None, None, "nowhere.jsonl"), "the file of items nowhere.jsonl does not exist"),
        (lambda: multiple_choice(None, None, {"test": ITEMS}), "the items are a mapping with 'test'"),
        (lambda: multiple_choice(None, None, [{"query": "q", "choices": "ab", "gold": 0}]), "item 0 is not"),
    ],
)
def test_wrong_arguments_are_refused_before_the_model_is_used(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_arguments_without_effect_are_told_of():
    with pytest.warns(UserWarning, match="text has no effect: tokens are given"):
        evaluation_windows(torch.arange(20), ["text"], sequence_length=5)
    with pytest.warns(UserWarning, match="sequence_length=5 has no effect: the windows given have 10 tokens"):
        evaluation_windows(torch.arange(20).reshape(2, 10), sequence_length=5)


def test_only_the_text_that_the_windows_need_is_read():
    def rows():
        for number in itertools.count():
            assert number < 10_000, "the stream is read for ever"
            yield f"row {number} " * 50

    windows = evaluation_windows(byte_tokenizer(), rows(), 16, max_windows=3)
    assert byte_tokenizer().decode(windows.flatten()) == ("row 0 " * 50)[:48]


def test_long_texts_are_read_in_sections(monkeypatch):
    """Cut between words, where a byte-level tokenizer puts the same tokens as for one string."""
    text = " ".join(f"word{number}" for number in range(2000))
    expected = evaluation_windows(byte_tokenizer(), [text], 32)
    monkeypatch.setattr(text_tokens, "SMALL", 500)
    monkeypatch.setattr(text_tokens, "SECTION", 300)
    assert torch.equal(evaluation_windows(byte_tokenizer(), [text], 32), expected)
    assert torch.equal(evaluation_windows(byte_tokenizer(), [text], 32, max_windows=5), expected[:5])
    monkeypatch.setattr(text_tokens, "ENDLESS", 1000)
    with pytest.raises(ValueError, match="has not ended after 1,000 characters: pass max_windows"):
        evaluation_windows(byte_tokenizer(), iter([text]), 32)


def test_no_more_items_are_read_than_are_wanted(model):
    def items():
        yield ITEMS[0]
        pytest.fail("a second item was read")

    assert multiple_choice(model, byte_tokenizer(), items(), max_items=1).items == 1


def test_a_broken_model_has_no_perplexity(packed):
    broken = arb_hf.from_pretrained(packed)
    broken.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        perplexity(broken, byte_tokens(1, 8))


def test_accuracy_from_single_log_likelihoods(model):
    """Every choice by itself, without padding or batches."""
    tokenizer = byte_tokenizer()

    def score(query, choice):
        query = query or "<s>"  # a start, where there is nothing to go on from
        context, whole = tokenizer(query.rstrip()).input_ids, tokenizer(f"{query} {choice}").input_ids
        with torch.no_grad():
            losses = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(losses[i - 1, whole[i]].item() for i in range(len(context), len(whole)))

    hits, normed = [], []
    for item in ITEMS:
        scores = [score(item["query"], choice) for choice in item["choices"]]
        hits.append(scores.index(max(scores)) == item["gold"])
        means = [value / len(choice) for value, choice in zip(scores, item["choices"], strict=True)]
        normed.append(means.index(max(means)) == item["gold"])
    result = multiple_choice(model, tokenizer, ITEMS, batch_size=3)
    assert (result.items, result.acc, result.acc_norm) == (4, sum(hits) / 4, sum(normed) / 4)
    assert multiple_choice(model, tokenizer, ITEMS, batch_size=1).to_dict() == result.to_dict()


@pytest.mark.parametrize(
    "items",
    [
        [],
        [{"query": "q", "choices": ["a"], "gold": 1}],
        [{"query": "q", "choices": [], "gold": 0}],
        [{"query": "q", "choices": ["a", ""], "gold": 0}],
        [{"choices": ["a"], "gold": 0}],
        ["text"],
    ],
)
def test_malformed_items_are_refused(model, items):
    with pytest.raises(ValueError, match="item"):
        multiple_choice(model, byte_tokenizer(), items)


def test_a_file_that_is_not_json_lines_is_refused(model, tmp_path):
    (tmp_path / "items.jsonl").write_text("query\n")
    with pytest.raises(ValueError, match="JSON lines"):
        multiple_choice(model, byte_tokenizer(), tmp_path / "items.jsonl")


TASK = """
task: local_items
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def test_lm_evaluation_harness_gives_the_same_numbers(model, packed, tmp_path):
    """Its own command line with ``--model hf``, through ``arb-hf lm-eval``, on a task file and without a network."""
    pytest.importorskip("lm_eval")
    items = [item for item in ITEMS if item["query"]]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "local_items.yaml").write_text(TASK.format(file=tmp_path / "items.jsonl"))
    command = [
        "lm-eval", "--model", "hf", "--model_args", f"pretrained={packed},dtype=float32", "--tasks", "local_items",
        "--include_path", str(tmp_path), "--device", "cpu", "--output_path", str(tmp_path / "out"), "--log_samples",
    ]  # fmt: skip
    done = fresh_process(
        f"import sys; from arb_hf.cli.parser import main; sys.exit(main({command!r}))",
        HF_HOME=str(tmp_path / "home"),
        HF_DATASETS_OFFLINE="1",
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("out/**/results*.json")
    theirs = json.loads(path.read_text())["results"]["local_items"]
    ours = multiple_choice(model, byte_tokenizer(), items)
    assert theirs["acc,none"] == ours.acc
    assert theirs["acc_norm,none"] == ours.acc_norm
    assert theirs["acc_stderr,none"] == pytest.approx(ours.acc_stderr)
