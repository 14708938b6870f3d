"""What a hostile checkpoint may hold, item by item: each is one ArbFormatError that names file, tensor and reason."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import arb_hf
from arb_hf import ArbFormatError
from arb_hf.checks import read_entries
from arb_hf.cli.parser import main
from arb_hf.config import ArbConfig
from arb_hf.errors import ArbFormatError as SameError
from arb_hf.format.headers import inspect_folder, require_inside, shard_names
from arb_hf.kernels import cpu
from arb_hf.nn import binary_modules
from helpers.process import DATA, ROOT

GOLDEN = DATA / "golden"
RC, RC_BF16, RC_INT8, ARB_INT8 = "arb-rc-two-float16", "arb-rc-two-bfloat16", "arb-rc-two-int8", "arb-two-int8"
Q = "model.layers.0.self_attn.q_proj"
WEIGHT, ROWS, EMBEDDING, NORM = f"{Q}.weight", f"{Q}.row_parameters", "model.embed_tokens.weight", "model.norm.weight"
NAN, INF = float("nan"), float("inf")
INDEX = "model.safetensors.index.json"
Change = Callable[[dict], object]


@pytest.fixture
def model(tmp_path):
    """Copies a golden model to damage."""

    def copy(name: str = RC) -> Path:
        shutil.copytree(GOLDEN / name, tmp_path / "model")
        return tmp_path / "model"

    return copy


def change_tensors(folder: Path, change: Change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(path: Path, change: Change) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def change_header(path: Path, change: Change) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def refused(folder: Path, message: str, everywhere: bool = True) -> None:
    """By the checked loading, and by ``AutoModelForCausalLM`` too; with one line."""
    loaders = [arb_hf.from_pretrained, AutoModelForCausalLM.from_pretrained]
    for load in loaders if everywhere else loaders[:1]:
        with pytest.raises(ArbFormatError, match=message) as caught:
            load(folder)
        assert "\n" not in str(caught.value)


def inspected(folder: Path, capsys: pytest.CaptureFixture) -> str:
    """What ``arb-hf inspect`` says; its errors are one line and exit code 1."""
    code = main(["inspect", str(folder)])
    said = capsys.readouterr()
    if code == 0:
        return said.out
    assert code == 1 and said.err.count("\n") == 1 and said.err.startswith("arb-hf: error: ")
    return said.err


BITMAP, NOT_FINITE = "salient_columns", "holds NaN or infinite values"
VALUES = {  # golden model, part of q_proj, change, message
    "NaN": (RC, "row_parameters", lambda t: t[0, 0].fill_(NAN), NOT_FINITE),
    "infinite": (RC, "column_scales", lambda t: t[0, :1].fill_(INF), "holds NaN or infinite"),
    "NaN of salient columns": (RC_BF16, "salient_column_scales", lambda t: t[1].fill_(NAN), NOT_FINITE),
    "infinite step": (ARB_INT8, "row_absmax", lambda t: t[1].fill_(-INF), NOT_FINITE),
    "negative step": (ARB_INT8, "row_absmax", lambda t: t[1, :1].fill_(-1), "holds negative values"),
    "negative zero": ("arb-x-two-bfloat16", "row_parameters", lambda t: t[0, 1, ::3].fill_(-0.0), r"holds -0.0; zeros"),
    "negative zero column": (RC, "column_scales", lambda t: t[1, :1].fill_(-0.0), "holds -0.0; zeros"),
    "negative zero step": (ARB_INT8, "row_absmax", lambda t: t[1, :1].fill_(-0.0), "holds -0.0"),
    "code of a row": (ARB_INT8, "row_parameters", lambda t: t[0, 0, :1].fill_(-128), "holds the code -128"),
    "code of a column": (RC_INT8, "column_scales", lambda t: t[0, :1].fill_(-128), "holds the code -128"),
    "too many salient": (RC, BITMAP, lambda t: t.fill_(255), r"marks 40 columns, the config says \d+ of 36"),
    "too few salient": (RC, BITMAP, lambda t: t.fill_(0), r"marks 0 columns, the config says"),
    "salient past the last": (RC, BITMAP, lambda t: (t[:4].fill_(0), t[4:].fill_(240)), r"marks \d+ columns"),
    "bits past the last": (RC, "weight", lambda t: t[-1].fill_(-1), "has bits set past its 36 columns"),
    "group bits past the last": (RC, "salient_groups", lambda t: t[-1].fill_(-1), "has bits set past"),
    "second bits past the last": ("arb-rc-one-float16", "second_plane", lambda t: t[-1].fill_(-1), "has bits set past"),
}


@pytest.mark.parametrize("name", VALUES)
def test_values(model, name):
    golden, part, change, message = VALUES[name]
    folder = model(golden)
    change_tensors(folder, lambda tensors: change(tensors[f"{Q}.{part}"]))
    refused(folder, rf"^model\.safetensors: {Q.replace('.', '[.]')}\.{part} {message}")


TABLE, TABLE_SCALES = "model.embed_tokens.weight", "model.embed_tokens.row_absmax"
TABLE_VALUES = {  # tensor, change, message
    "code": (TABLE, lambda t: t[3, :1].fill_(-128), "holds the code -128"),
    "NaN": (TABLE_SCALES, lambda t: t[:1].fill_(NAN), NOT_FINITE),
    "infinite": (TABLE_SCALES, lambda t: t[5:6].fill_(INF), NOT_FINITE),
    "negative": (TABLE_SCALES, lambda t: t[5:6].fill_(-1), "holds negative values"),
    "negative zero": (TABLE_SCALES, lambda t: t[5:6].fill_(-0.0), "holds -0.0; zeros"),
}


@pytest.mark.parametrize("name", TABLE_VALUES)
@pytest.mark.parametrize("golden", ["int8-tied", "int8-untied"])
def test_values_of_int8_tables(model, golden, name):
    tensor, change, message = TABLE_VALUES[name]
    folder = model(golden)
    change_tensors(folder, lambda tensors: change(tensors[tensor]))
    refused(folder, rf"^model\.safetensors: {tensor.replace('.', '[.]')} {message}")


TABLE_TENSORS = {  # golden model, change of the tensors, message
    "shape": ("int8-tied", lambda t: t.update({TABLE: t[TABLE][:, :-1].contiguous()}), rf"tensor {TABLE} is I8"),
    "rows": ("int8-tied", lambda t: t.update({TABLE_SCALES: t[TABLE_SCALES][:-1].clone()}), rf"{TABLE_SCALES} is F16"),
    "dense": ("int8-tied", lambda t: t.update({TABLE: t[TABLE].bfloat16()}), "is BF16 .*, expected I8"),
    "other scales": ("int8-untied", lambda t: t.update({TABLE_SCALES: t[TABLE_SCALES].float()}), "expected F16"),
    "missing codes": ("int8-tied", lambda t: t.pop(TABLE), f"tensor {TABLE} is missing"),
    "missing scales": ("int8-untied", lambda t: t.pop("lm_head.row_absmax"), "lm_head.row_absmax is missing"),
    "surplus": ("int8-tied", lambda t: t.update({"model.embed_tokens.x": t[TABLE].clone()}), "surplus tensor"),
    "tied twice": ("int8-tied", lambda t: t.update({"lm_head.weight": t[TABLE].clone()}), "surplus .* ties it to"),
    "tied scales": ("int8-tied", lambda t: t.update({"lm_head.row_absmax": t[TABLE_SCALES] * 2}), "surplus .* ties it"),
    "bias": ("int8-head-bias", lambda t: t["lm_head.bias"].fill_(INF), "lm_head.bias holds NaN or infinite"),
}


@pytest.mark.parametrize("name", TABLE_TENSORS)
def test_tensors_of_int8_tables(model, name):
    golden, change, message = TABLE_TENSORS[name]
    folder = model(golden)
    change_tensors(folder, change)
    refused(folder, rf"^model\.safetensors: .*{message}")


TABLE_NAMES = {  # golden model, quantization_config's embeddings or another option, message
    "no table": ("int8-tied", {"embeddings": ["model.norm"]}, "names 'model.norm': not the input embedding"),
    "no module": ("int8-tied", {"embeddings": ["x"]}, "names 'x': not the input embedding, and not the head"),
    "half of two": ("int8-tied", {"embeddings": ["lm_head"]}, "lacks model.embed_tokens, which is tied to it"),
    "other half": ("int8-tied", {"embeddings": ["model.embed_tokens"]}, "lacks lm_head, which is tied to it"),
    "twice": ("int8-tied", {"embeddings": ["lm_head", "lm_head"]}, "each name once"),
    "binary too": ("int8-tied", {"embeddings": [Q]}, "none that is in modules"),
    "no list": ("int8-tied", {"embeddings": "lm_head"}, "a list of module names"),
    "old version": ("int8-tied", {"format_version": 1}, "format_version 1 has no int8 embeddings"),
}


@pytest.mark.parametrize("name", TABLE_NAMES)
def test_names_of_int8_tables(model, name):
    golden, options, message = TABLE_NAMES[name]
    folder = model(golden)
    change_json(folder / "config.json", lambda tree: tree["quantization_config"].update(options))
    refused(folder, rf"^config\.json: .*{message}")


@pytest.mark.filterwarnings("ignore")
def test_int8_tables_that_the_config_denies(model):
    """Dense ones are then expected."""
    folder = model("int8-tied")
    change_json(folder / "config.json", lambda tree: tree["quantization_config"].update(embeddings=None))
    refused(folder, r"^model\.safetensors: tensor model\.embed_tokens\.weight is I8 .*, expected a floating type")


@pytest.mark.parametrize(("golden", "claim"), [("int8-tied", False), ("int8-untied", True)])
def test_a_tie_that_the_models_config_claims_otherwise(model, golden, claim):
    folder = model(golden)
    change_json(folder / "config.json", lambda tree: tree.update(tie_word_embeddings=claim))
    refused(folder, r"^model\.safetensors: .*(lm_head\.\w+ is missing|surplus tensor lm_head\.\w+)")


def test_inspect_counts_int8_tables(model, capsys):
    folder = model("int8-untied")
    assert "int8 embeddings and heads" in inspected(folder, capsys)
    summary = inspect_folder(folder)
    assert summary["int8"] == {"tensors": 4, "weights": 2 * 24 * 36, "bits": 2 * 24 * (36 * 8 + 16)}
    assert summary["missing"] == []
    change_json(folder / "config.json", lambda tree: tree["quantization_config"].update(embeddings=[3]))
    assert "embeddings is not a list of names" in inspected(folder, capsys)


def test_an_infinite_bias(model):
    folder = model("biases")
    change_tensors(folder, lambda tensors: tensors[f"{Q}.bias"].fill_(float("inf")))
    refused(folder, rf"^model\.safetensors: {Q}\.bias holds NaN or infinite values")


def without(name: str) -> Change:
    return lambda tensors: tensors.pop(name)


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def put(name: str, tensor: torch.Tensor) -> Change:
    return lambda tensors: tensors.update({name: tensor})


WIDE, INTEGERS = torch.ones(37), torch.ones(24, 36, dtype=torch.int32)
TENSORS = {  # change, message
    "missing": (without(f"{Q}.second_plane"), rf"^model\.safetensors: tensor {Q}\.second_plane is missing"),
    "missing norm": (without(NORM), r"^model\.safetensors: tensor model\.norm\.weight is missing"),
    "missing embedding": (without(EMBEDDING), r"tensor model\.embed_tokens\.weight is missing"),
    "shape": (changed(WEIGHT, lambda t: t[:-1].clone()), rf"{Q}\.weight is I32 \[1, 36\], expected I32 \[2, 36\]"),
    "type": (changed(WEIGHT, torch.Tensor.float), rf"{Q}\.weight is F32 .*expected I32"),
    "type of scales": (changed(ROWS, torch.Tensor.bfloat16), "is BF16 .*expected F16"),
    "flat": (changed(WEIGHT, torch.Tensor.flatten), r"is I32 \[72\], expected I32 \[2, 36\]"),
    "surplus part": (put(f"{Q}.extra", torch.ones(1)), rf"^model\.safetensors: surplus tensor {Q}\.extra"),
    "surplus bias": (put(f"{Q}.bias", torch.ones(36)), rf"surplus tensor {Q}\.bias"),
    "shape of a norm": (put(NORM, WIDE), r"model\.norm\.weight is F32 \[37\], expected a floating type \[36\]"),
    "type of an embedding": (put(EMBEDDING, INTEGERS), r"is I32 \[24, 36\], expected a floating"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(model, name):
    change, message = TENSORS[name]
    folder = model()
    change_tensors(folder, change)
    refused(folder, message)


def test_a_surplus_tensor_beside_the_layers(model):
    folder = model()
    change_tensors(folder, lambda tensors: tensors.update({"model.stray": torch.ones(1)}))
    refused(folder, "unexpected keys in the checkpoint: model.stray", everywhere=False)


FILES = {
    "empty": lambda data: b"",
    "no header": lambda data: data[:8],
    "half a header": lambda data: data[:100],
    "last byte": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "a byte more": lambda data: data + b"\0",
    "header of 2^60 bytes": lambda data: struct.pack("<Q", 2**60) + data[8:],
    "header that is a list": lambda data: struct.pack("<Q", 2) + b"[]",
    "header of nested lists": lambda data: struct.pack("<Q", 200_000) + b"[" * 200_000,
    "a pickle": lambda data: b"\x80\x04\x95" + data,
}


@pytest.mark.parametrize("name", FILES)
def test_files_cut_off_and_worse(model, name, capsys):
    folder = model()
    path = folder / "model.safetensors"
    path.write_bytes(FILES[name](path.read_bytes()))
    refused(folder, r"model\.safetensors: not a readable safetensors file", everywhere=False)
    said = inspected(folder, capsys)
    assert name == "a byte more" or "model.safetensors: not a safetensors file" in said or "cut off" in said


HEADERS = {
    "shape of 2^62": lambda entry: entry.update(shape=[2**62, 4]),
    "negative shape": lambda entry: entry.update(shape=[-2, -36]),
    "shape that is no list": lambda entry: entry.update(shape=72),
    "offset past the end": lambda entry: entry.update(data_offsets=[0, 2**40]),
    "offset before the start": lambda entry: entry.update(data_offsets=[-288, 0]),
    "offsets crossed": lambda entry: entry.update(data_offsets=[288, 0]),
    "size unlike the shape": lambda entry: entry.update(dtype="I64"),
    "no type": lambda entry: entry.pop("dtype"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(model, name, capsys):
    folder = model()
    change_header(folder / "model.safetensors", lambda header: HEADERS[name](header[f"{Q}.weight"]))
    refused(folder, r"model\.safetensors: not a readable safetensors file", everywhere=False)
    said = inspected(folder, capsys)
    assert "model.safetensors: not a safetensors file" in said or "model.safetensors: cut off" in said


OPTIONS = {  # option: hostile values
    "block_size": (0, -32, 33, 2**40, 2**70, 32.0, "32", None, [32], True),
    "method": ("arb-rcc", 1, None, ["arb-rc"], {}),
    "scale_dtype": ("float64", 16, None, ["float16"]),
    "group_bitmap": ("true", 1, None),
    "column_group_bitmap": (0, "no"),
    "format_version": (3, 10**30, 0, -1, "1", None, 1.0),
    "modules": (
        None, {}, [], "x", 5, [Q], {Q: None}, {Q: 3}, {Q: {}}, {Q: {"salient_columns": -1}},
        {"": {"salient_columns": 1}}, {Q: {"salient_columns": 1.0}}, {Q: {"salient_columns": 2**40}},
        {Q: {"salient_columns": 10**400}}, {Q: {"salient_columns": 37}}, {Q: {"salient_columns": 3, "block_size": 0}},
        {Q: {"salient_columns": 3, "block_size": 2**40}}, {Q: {"salient_columns": 3, "seed": 1}},
        {"model.layers.9.q": {"salient_columns": 1}}, {"model.norm": {"salient_columns": 1}},
        {Q + ".weight": {"salient_columns": 1}},
    ),
    "overrides": (3, [], {"": {}}, {"*": 3}, {"*": {"block_size": 2**40}}, {"*": {"modules": {}}}),
    "damping": (10**400, -1, "0", [0]),
    "iterations": (0, 2**40, "1"),
    "max_salient_columns": (0, 2**40, "1"),
    "seed": (-1, 2**70),
    "modules_to_not_convert": ("lm_head", [1], 7),
}  # fmt: skip


@pytest.mark.parametrize(
    ("option", "value"), [(option, value) for option, values in OPTIONS.items() for value in values]
)
def test_options_of_wrong_type_or_size(model, option, value):
    folder = model()
    change_json(folder / "config.json", lambda tree: tree["quantization_config"].update({option: value}))
    refused(folder, rf"^config\.json: .*{option.removesuffix('s') if option != 'modules' else ''}")


def test_other_options_than_the_tensors_were_made_with(model):
    others = {"method": "arb", "block_size": 64, "scale_dtype": "float32", "column_group_bitmap": False}
    for option, value in others.items():
        folder = model()
        change_json(folder / "config.json", lambda tree, o=option, v=value: tree["quantization_config"].update({o: v}))
        refused(folder, r"^model\.safetensors: (surplus )?tensor .*")
        shutil.rmtree(folder)


def test_the_message_of_a_future_version(model):
    folder = model()
    change_json(
        folder / "config.json", lambda tree: tree["quantization_config"].update(format_version=3, method="arb-9")
    )
    refused(
        folder,
        r"^config\.json: format_version 3 is newer than 2, the newest this arb_hf reads: pip install --upgrade arb_hf$",
    )


MODEL = {
    "num_hidden_layers": (10**9, -1, "1", None, 1.5, [1]),
    "hidden_size": (2**40, 0, -36, 35, "36", 2**70),
    "intermediate_size": (2**40, 0, 42),
    "vocab_size": (2**50, 0, 25, -24),
    "num_attention_heads": (2**40, 0, -1),
    "head_dim": (2**45, 0, 8),
    "model_type": ("nonsense", None, 3, "bert", "../x"),
    "architectures": (3, True, "LlamaForCausalLM", [3], [[]], {}, ["Nonsense"]),
    "rope_parameters": (
        {"rope_type": "nonsense"}, {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1e11}, 5,
    ),
    "hidden_act": ("nonsense", 3),
    "dtype": ("nonsense", 3),
    "auto_map": ({"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},),
    "transformers_weights": ("../x.safetensors", "/etc/hostname", 3),
    "quantization_config": (None, [], "arb_hf", {"quant_method": "gptq"}, {"quant_method": 3}, {}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("option", "value"), [(option, value) for option, values in MODEL.items() for value in values])
def test_the_models_own_config(model, option, value):
    """Sizes that would take the memory, code from elsewhere, nonsense: refused by the checked loading."""
    folder = model()
    change_json(folder / "config.json", lambda tree: tree.update({option: value}))
    said = ""
    try:
        loaded = arb_hf.from_pretrained(folder)
    except ArbFormatError as error:
        said = str(error)
    if said:
        assert ("config.json" in said or "model.safetensors" in said) and "\n" not in said
    else:  # of no consequence for what is loaded
        assert option in ("architectures", "head_dim", "auto_map", "rope_parameters", "num_attention_heads")
        assert loaded(torch.arange(4)[None]).logits.shape == (1, 4, 24)


def test_absurd_experts(model):
    folder = model("experts")
    change_json(folder / "config.json", lambda tree: tree.update(num_local_experts=10**9))
    refused(folder, r"config\.json: num_local_experts=1000000000, and the files hold \d+ tensors", everywhere=False)
    with pytest.raises(
        ArbFormatError, match=r"config\.json: .*experts has 1000000000 experts, the files hold \d+ tensors"
    ):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b"\xff", b'{"a":' * 100_000, b"9" * 5000, b'{"model_type": "llama"}']
)
def test_a_config_that_is_none(model, text, capsys):
    folder = model()
    (folder / "config.json").write_bytes(text)
    refused(folder, r"config\.json", everywhere=False)
    inspected(folder, capsys)


def test_no_config_and_no_weights(model):
    folder = model()
    (folder / "model.safetensors").unlink()
    refused(folder, r"model\.safetensors is missing", everywhere=False)
    (folder / "config.json").unlink()
    refused(folder, r"config\.json cannot be read", everywhere=False)


# Places ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parent", "absolute", "same folder", "inner folder", "number", "backslash"])
def test_an_index_that_points_outside(model, kind, capsys, tmp_path):
    folder = model("shards")
    shard = "model-00002-of-00004.safetensors"
    shutil.copy(folder / shard, tmp_path / "outside.safetensors")
    (folder / "inner").mkdir()
    shutil.copy(folder / shard, folder / "inner")
    place = {
        "parent": "../outside.safetensors",
        "absolute": str(tmp_path / "outside.safetensors"),
        "same folder": f"../model/{shard}",
        "inner folder": f"inner/{shard}",
        "number": 3,
        "backslash": "..\\outside.safetensors",
    }[kind]

    def change(tree: dict) -> None:
        tree["weight_map"] = {key: place if name == shard else name for key, name in tree["weight_map"].items()}

    change_json(folder / INDEX, change)
    refused(folder, INDEX.replace(".", r"\."), everywhere=False)
    assert INDEX in inspected(folder, capsys)
    if kind in ("parent", "absolute"):  # the index is transformers' to read here; its places are ours to check
        with pytest.raises(ArbFormatError, match="outside the model's folder"):
            AutoModelForCausalLM.from_pretrained(folder)


def test_a_link_that_points_outside(model, capsys, tmp_path):
    folder = model()
    shutil.move(folder / "model.safetensors", tmp_path / "outside.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    refused(folder, r"^model\.safetensors links to .*outside\.safetensors, outside the model's folder")
    assert "links to" in inspected(folder, capsys)


def test_links_within_a_folder_and_of_the_hubs_cache_are_followed(model, tmp_path):
    folder = model()
    (folder / "files").mkdir()
    shutil.move(folder / "model.safetensors", folder / "files" / "x.safetensors")
    (folder / "model.safetensors").symlink_to("files/x.safetensors")
    arb_hf.from_pretrained(folder)
    link = tmp_path / "link"
    link.symlink_to(folder)
    arb_hf.from_pretrained(link)
    snapshot = tmp_path / "models--me--x" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--me--x" / "blobs").mkdir()
    for file, source in (
        ("config.json", folder / "config.json"),
        ("model.safetensors", folder / "files" / "x.safetensors"),
    ):
        shutil.copy(source, tmp_path / "models--me--x" / "blobs" / file)
        (snapshot / file).symlink_to(f"../../blobs/{file}")
    arb_hf.from_pretrained(snapshot)
    require_inside(snapshot / "model.safetensors", snapshot)
    read_entries([snapshot / "model.safetensors"], "me/x")
    for elsewhere, name in ((snapshot, "you/x"), (snapshot / ".." / "..", "me/x"), (folder, "me/x")):
        with pytest.raises(ArbFormatError, match="outside the Hub's cache of"):
            read_entries([elsewhere / "model.safetensors"], name)


def test_a_tensor_in_two_files(model):
    folder = model("shards")
    one, other = sorted(folder.glob("*.safetensors"))[:2]
    tensors = load_file(one) | load_file(other)
    save_file(tensors, one, metadata={"format": "pt"})
    refused(folder, r"tensor .* is in model-00001-of-00004\.safetensors too")


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": None}}, {"weight_map": {"a": "x" * 999}}]
)
def test_indexes_that_are_none(index):
    with pytest.raises(ArbFormatError, match="index"):
        shard_names(index)


# arb-hf inspect -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [3, [], "x", {"modules": 3}, {"modules": ["a"]}])
def test_inspect_of_wrong_options(model, options, capsys):
    folder = model()
    change_json(folder / "config.json", lambda tree: tree.update(quantization_config=options))
    said = inspected(folder, capsys)
    assert "config.json" in said or "whole model" in said


def test_inspect_of_a_damaged_report(model, capsys):
    wrong = {"output_error": "x"}, {"measurements": 3}, {"measurements": [{}]}, {"seconds": [1]}, {"seconds": 10**400}
    for report in wrong:
        folder = model()
        (folder / "arb_report.json").write_text(json.dumps({"model": "x"} | report))
        assert "arb_report.json: not a report" in inspected(folder, capsys)
        shutil.rmtree(folder)


def test_inspect_prints_nothing_that_steers_a_terminal(model, capsys):
    folder = model()
    change_header(
        folder / "model.safetensors", lambda header: header.update({"\x1b[2Jx": header.pop("model.norm.weight")})
    )
    change_json(folder / "config.json", lambda tree: tree["quantization_config"].update(method="\x1b]0;x\x07"))
    assert main(["inspect", str(folder), "--tensors"]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_inspect_of_a_million_modules_answers_at_once(model):
    folder = model()
    modules = {f"model.layers.{i}.x": {"salient_columns": 0} for i in range(200_000)}
    change_json(folder / "config.json", lambda tree: tree["quantization_config"].update(modules=modules))
    assert len(inspect_folder(folder)["missing"]) == 200_000


def test_the_error_is_the_packages_own_even_where_torch_is_not_imported():
    assert SameError is ArbFormatError
    code = "from arb_hf_start import parser; import sys; e = sys.modules; parser(); sys.exit('torch' in e)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONPATH": f"{ROOT}:{ROOT}/arb_hf/entry_points"}, check=False
        ).returncode
        == 0
    )


def test_kernels_check_again(model):
    """Tensors changed after loading reach no C code unchecked."""
    module = binary_modules(arb_hf.from_pretrained(model()))[Q]
    tensors = dict(module.packed)
    for part, tensor in tensors.items():
        for wrong in (tensor[:-1].clone(), tensor[None], tensor.double()):
            with pytest.raises(ArbFormatError, match=part):
                cpu.linear(torch.ones(1, 36), tensors | {part: wrong}, module.form)


def test_the_config_is_checked_where_it_is_made():
    with pytest.raises(ArbFormatError, match=r"^config\.json: quantization_config: ArbConfig: block_size=0"):
        ArbConfig.from_dict({"block_size": 0})
    with pytest.warns(UserWarning, match="does not know self"):
        ArbConfig.from_dict({"self": 0})
    with pytest.raises(ArbFormatError, match="quantization_config"):
        ArbConfig.from_dict({"kwargs": 0})
