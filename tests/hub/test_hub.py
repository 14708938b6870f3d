"""Saving, the model card, and a Hub over real HTTP: push, load in a fresh process, and every way to fail."""

from __future__ import annotations

import dataclasses
import email.message
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import arb_hf
from arb_hf.hub.card import MARKER, model_card
from arb_hf.hub.save import write_card
from arb_hf.names import is_hub_id
from arb_hf.report import ArbReport, Measurement
from helpers.byte_model import byte_tokens, save_byte_model
from helpers.loopback_hub import CUT, READER, WRITER, Fault, LoopbackHub, check_metadata

BASE_CARD = "---\nlicense: apache-2.0\nlanguage: [en]\n---\n# The original\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model, binarized, with its tokenizer."""
    folder = save_byte_model(tmp_path_factory.mktemp("made") / "tiny")
    (folder / "README.md").write_text(BASE_CARD)
    config = arb_hf.ArbConfig(dataset=byte_tokens(), num_samples=4, block_size=32, refinement="paper", iterations=2)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    model.arb_report.add(Measurement("perplexity", "wikitext2", "3 windows of 32 tokens", 300.25, 250.5))
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def packed(made, tmp_path):
    folder = tmp_path / "tiny-arb"
    arb_hf.save_pretrained(*made, folder, base_model="me/tiny")
    return folder


def client(hub, home, code, token=WRITER):
    """Run code in a fresh process that knows only the loopback Hub."""
    done = subprocess.run(
        [sys.executable, "-c", "import torch; torch.set_num_threads(1)\n" + textwrap.dedent(code)],
        env=hub.environment(home, token),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


FAILURES = {  # repository -> token, what the Hub answers to which request, and what the message must say
    "wrong-token": ("hf_wrong", None, "refused the token (401)"),
    "no-token": (False, None, "refused the token (401)"),
    "read-token": (READER, None, "may not write to me/read-token (403)"),
    "retried": (WRITER, None, None),  # the first upload of a file, and the one that is cut
    "gone": (WRITER, ("commit/main", 404), "knows no me/gone (404)"),
    "raced": (WRITER, ("commit/main", 409), "(409)"),
    "broken": (WRITER, ("commit/main", 500), "the Hub failed (500)"),
    "cut": (WRITER, ("commit/main", CUT), "broke off"),
    "forbidden": (WRITER, ("preupload", 403), "may not write to me/forbidden (403)"),
}


@dataclasses.dataclass
class Published:
    """What one fresh process pushed, and what it said."""

    hub: LoopbackHub
    folder: Path
    told: dict[str, list[str | None]]
    output: subprocess.CompletedProcess


@pytest.fixture(scope="module")
def published(made, tmp_path_factory):
    """Every push of these tests, in one fresh process: each failure (and the same push again), then what must work."""
    tmp_path = tmp_path_factory.mktemp("published")
    folder, temporary = tmp_path / "tiny-arb", tmp_path / "temporary"
    temporary.mkdir()
    arb_hf.save_pretrained(*made, folder, base_model="me/tiny")
    tokens = {name: token for name, (token, _, _) in FAILURES.items()}
    with LoopbackHub() as hub:
        hub.faults = [Fault("PUT /lfs/", CUT)] + [
            Fault(f"me/{name}/{fault[0]}", fault[1]) for name, (_, fault, _) in FAILURES.items() if fault is not None
        ]
        output = client(
            hub,
            tmp_path / "home",
            f"""
            import json, os, tempfile
            import arb_hf
            from huggingface_hub import HfApi, ModelCard
            tempfile.tempdir, folder = {str(temporary)!r}, {str(folder)!r}
            told = {{}}
            for name, token in {tokens!r}.items():
                told[name] = []
                for attempt in range(2):
                    try:
                        arb_hf.push_folder(folder, "me/" + name, token=token)
                        told[name].append(None)
                    except arb_hf.ArbUploadError as error:
                        told[name].append(str(error))
            told["tiny-arb"] = [arb_hf.push_folder(folder, "me/tiny-arb").commit_url]
            from huggingface_hub import repocard
            if "https://huggingface.co" not in open(repocard.__file__).read():  # older ones always ask the real Hub
                ModelCard.load("me/tiny-arb").validate()
                try:
                    ModelCard("---\\nbase_model_relation: nonsense\\n---\\n").validate()
                    raise AssertionError("the validator accepts anything")
                except ValueError:
                    pass
            model = arb_hf.from_pretrained(folder)
            arb_hf.push_to_hub(model, None, "memory", private=True, commit_message="mine", revision="v1")
            assert not os.listdir(tempfile.tempdir)
            arb_hf.push_folder(folder, "me/memory", create_pr=True, commit_message="better")
            HfApi().upload_file(path_or_fileobj=b"# By a person", path_in_repo="README.md", repo_id="me/memory")
            arb_hf.push_folder(folder, "me/memory")
            arb_hf.push_to_hub(model, None, "me/shards", max_shard_size="40KB")
            HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id="me/shards")
            arb_hf.push_to_hub(model, None, "me/shards")
            print(json.dumps(told))
            """,
        )
        yield Published(hub, folder, json.loads(output.stdout.splitlines()[-1]), output)


def test_push_then_load_in_a_fresh_process(made, published, tmp_path):
    model, _ = made
    hub = published.hub
    assert published.told["tiny-arb"][0].startswith(f"{hub.url}/me/tiny-arb/commit/")
    repository = hub.repositories["me/tiny-arb"]
    assert set(repository.files("main")) >= {
        "model.safetensors", "config.json", "tokenizer.json", "README.md", "arb_report.json", "arb_report.png"
    }  # fmt: skip
    assert repository.messages == ["initial commit", "Upload a model packed by arb_hf"]
    client(
        hub,
        tmp_path / "home",
        f"""
        import arb_hf
        from transformers import AutoModelForCausalLM, AutoTokenizer
        model = AutoModelForCausalLM.from_pretrained("me/tiny-arb")
        checked = arb_hf.from_pretrained("me/tiny-arb")
        assert checked.arb_report.measurements[0].value == 300.25
        ids = AutoTokenizer.from_pretrained("me/tiny-arb")("binary", return_tensors="pt").input_ids
        from safetensors.torch import save_file
        with torch.no_grad():
            logits = model(ids).logits
            assert torch.equal(logits, checked(ids).logits)
        save_file({{"ids": ids, "logits": logits}}, {str(tmp_path / "logits")!r})
        """,
        token=None,
    )
    stored = load_file(tmp_path / "logits")
    with torch.no_grad():
        torch.testing.assert_close(model(stored["ids"]).logits, stored["logits"], rtol=0, atol=0)


def test_card_is_validated_by_the_hub(published):
    assert published.hub.requests.count("POST /api/validate-yaml") > 2


def test_push_of_a_model_in_memory(published):
    repository = published.hub.repositories["me/memory"]
    assert repository.private
    assert repository.messages[1] == "mine"
    assert "model.safetensors" in repository.files("v1")
    card = repository.files("v1")["README.md"].decode()
    assert 'from_pretrained("me/memory")' in card
    assert "300.25" in card  # the report came along from the folder that the model was loaded from


def test_a_push_in_other_shards_leaves_none_of_the_older(published):
    files = set(published.hub.repositories["me/shards"].files("main"))
    assert files >= {"model.safetensors", "config.json", "notes.txt"}
    assert not [name for name in files if "-of-" in name or "index" in name]


def test_pull_request(published):
    repository = published.hub.repositories["me/memory"]
    assert repository.pull_requests == 1
    assert "model.safetensors" in repository.files("refs/pr/1")


def test_readme_of_a_person_in_the_repository_is_kept(published):
    files = published.hub.repositories["me/memory"].files("main")
    assert files["README.md"] == b"# By a person"
    assert "model.safetensors" in files
    assert "README.md that arb_hf did not write" in published.output.stderr


@pytest.mark.parametrize("name", FAILURES)
def test_failed_push_says_why_and_how_to_go_on(published, name):
    hub, folder = published.hub, published.folder
    token, _, message = FAILURES[name]
    first, second = published.told[name]
    if message is None:  # a cut upload of one file is tried again, by huggingface_hub itself where it does (not by 1.3)
        assert first is None or "broke off" in first
        assert hub.faults[0].times == 0
    else:
        assert message in first
        assert f"Nothing is lost: the model is whole in {folder}, which stays" in first
        assert first.endswith(f"Go on with: arb-hf push {folder} me/{name}")
    if token == WRITER:
        assert second is None
        assert "model.safetensors" in hub.repositories[f"me/{name}"].files("main")


def test_failed_pushes_leave_the_folder_whole(published):
    arb_hf.from_pretrained(published.folder)


def test_push_in_memory_keeps_the_folder_on_failure(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def no_route(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("arb_hf.hub.publish.HfApi.create_repo", no_route)
    with pytest.raises(arb_hf.ArbUploadError, match=r"broke off \(ConnectionError: no route to host") as caught:
        arb_hf.push_to_hub(arb_hf.from_pretrained(packed), None, "me/tiny-arb")
    (kept,) = tmp_path.glob("arb_hf-push-*")
    assert str(kept) in str(caught.value)
    assert (kept / "model.safetensors").is_file()


def test_card_tells_what_the_files_hold(made, packed):
    model, _ = made
    assert check_metadata((packed / "README.md").read_text()) == []
    card = ModelCard.load(packed / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "me/tiny"
    assert data["base_model_relation"] == "quantized"
    assert data["license"] == "apache-2.0"  # inherited from the original's card
    assert data["language"] == ["en"]
    assert card.data.eval_results[0].metric_value == 300.25
    assert f"**{arb_hf.bits_per_weight(model):.3f}**" in card.text
    assert "| perplexity | wikitext2 | 3 windows of 32 tokens | 250.50 | 300.25 |" in card.text
    assert "import arb_hf" in card.text
    assert "{{" not in card.text.partition("## Citation")[0]
    assert "{%" not in card.text


@pytest.mark.parametrize("again", [False, True], ids=["first card", "card written again"])
def test_card_of_a_local_model_names_what_that_was_made_from(packed, tmp_path, again):
    (packed / "README.md").unlink()
    metadata = {"base_model": ["me/small", "../../etc", 7], "license": "mit", "language": ["de"]}
    for wanted in (metadata, None)[: 1 + again]:  # what an earlier card says is kept
        write_card(packed, metadata=wanted)
    text = (packed / "README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == ["me/small"]
    assert "base_model_relation" not in data, "it is not me/small that was made binary"
    assert (data["license"], data["language"]) == ("mit", ["de"])
    assert "tiny, made from [me/small](https://huggingface.co/me/small), made binary with" in text
    assert check_metadata(text) == []


def test_card_says_where_the_package_is(packed, monkeypatch):
    entries = email.message.Message()
    entries["Project-URL"] = "Documentation, https://example.org/docs"
    entries["Project-URL"] = "Repository, https://example.org/arb_hf"
    monkeypatch.setattr("importlib.metadata.metadata", lambda name: entries)
    text = str(model_card(packed))
    assert "made binary with [`arb_hf`](https://example.org/arb_hf)" in text
    assert "pip install arb_hf\npip install git+https://example.org/arb_hf " in text


def test_card_without_a_report_and_without_measurements(made, packed):
    (packed / "arb_report.json").unlink()
    (packed / "README.md").unlink()
    text = str(model_card(packed))
    assert "Not measured" in text
    assert "base_model" not in text
    assert check_metadata(text) == []
    assert f"**{arb_hf.bits_per_weight(made[0]):.3f}**" in text


def test_card_of_a_dense_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no model packed by arb_hf"):
        model_card(save_byte_model(tmp_path / "dense"))
    with pytest.raises(ValueError, match="no model packed"):
        arb_hf.push_folder(tmp_path / "dense", "me/dense")


def test_local_readme_of_a_person_is_kept(made, packed, caplog):
    readme = packed / "README.md"
    readme.write_text(readme.read_text().replace(MARKER, ""))
    edited = readme.read_text()
    arb_hf.save_pretrained(*made, packed)
    assert readme.read_text() == edited
    assert "kept as it is" in caplog.text


def test_nothing_of_the_makers_file_system_is_published(made, packed, tmp_path):
    for path in packed.iterdir():
        if path.suffix in (".json", ".md"):
            assert str(tmp_path.parent) not in path.read_text(), path.name
    assert json.loads((packed / "arb_report.json").read_text())["model"] == "tiny"


def test_report_round_trip(made, packed):
    report = made[0].arb_report
    again = ArbReport.from_json(packed / "arb_report.json")
    assert again.matrices == report.matrices
    assert again.measurements == report.measurements
    assert (
        ArbReport.from_dict(json.loads(report.to_json()) | {"new in a later version": 1}).to_dict() == report.to_dict()
    )


@pytest.mark.parametrize("text", ["", "[]", '{"model": 1}', '{"model": 1, "config": 3}'])
def test_damaged_report_is_refused(tmp_path, text):
    (tmp_path / "arb_report.json").write_text(text)
    with pytest.raises(arb_hf.ArbFormatError):
        arb_hf.load_report(tmp_path)


def test_a_measurement_replaces_its_earlier_self():
    report = ArbReport(config={}, model="m", samples=0, tokens=0)
    report.add(Measurement("perplexity", "a", "p", 1.0))
    report.add(Measurement("perplexity", "a", "p", 2.0))
    report.add(Measurement("perplexity", "b", "p", 3.0))
    assert [each.value for each in report.measurements] == [2.0, 3.0]


def test_save_pretrained_of_a_dense_model_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_byte_model(tmp_path / "dense"))
    with pytest.raises(ValueError, match="no binary layers"):
        arb_hf.save_pretrained(model, None, tmp_path / "out")


def test_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("me/model").mkdir(parents=True)
    assert is_hub_id("you/model-1.5B")
    assert not any(map(is_hub_id, ["me/model", "model", "/me/model", "./model", "a/b/c", ""]))
