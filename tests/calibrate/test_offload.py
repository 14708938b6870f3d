"""Models that are mapped, offloaded to disk or spread over a map give the same bits as those in memory."""

import functools
import importlib.metadata
import os
import shutil

import psutil
import pytest
import torch
import transformers

import arb_hf
from arb_hf import ArbCalibrationError
from arb_hf.calibrate import matrices, plan, spool
from arb_hf.calibrate import model as model_module
from arb_hf.calibrate.capture import CapturedBatch
from arb_hf.calibrate.offload import Placement
from helpers import tiny
from helpers.models import token_samples

# transformers says so whenever an offloaded model is saved.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
IDS = token_samples(1, 12, seed=5)[0][None]
LAYERS_ON_DISK = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}


@pytest.fixture(scope="module")
def expected(dense, tmp_path_factory):
    """The in-memory run: what it saves, and its logits."""
    model = tiny.binarize(dense)
    return tiny.saved(model, tmp_path_factory.mktemp("in-memory")), model(IDS).logits


@pytest.mark.parametrize(
    "device_map",
    [
        LAYERS_ON_DISK | {"lm_head": "cpu"},
        LAYERS_ON_DISK | {"model.embed_tokens": "disk", "lm_head": "disk"},
        {"model": "disk", "lm_head": "cpu"},
    ],
    ids=["layers", "embedding and head too", "all but the head"],
)
def test_disk_offload_gives_the_same_bits_saved_and_reloaded(dense, expected, tmp_path, device_map):
    model = tiny.binarize(dense, {"device_map": device_map, "offload_folder": tmp_path / "offload"})
    assert model.hf_device_map == device_map
    assert all(tensor.device.type == "meta" for tensor in model.model.layers[0].mlp.up_proj.parameters())
    assert torch.equal(model(IDS).logits, expected[1])
    tiny.assert_equal(tiny.saved(model, tmp_path / "saved"), expected[0])
    reloaded = arb_hf.from_pretrained(tmp_path / "saved")
    assert torch.equal(reloaded(IDS).logits, expected[1])
    offloaded = arb_hf.from_pretrained(
        tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / "again", offload_buffers=True
    )
    assert torch.equal(offloaded(IDS).logits, expected[1])


def test_packed_files_on_disk_go_with_the_model(dense, tmp_path):
    folder = tmp_path / "offload"
    loading = {"device_map": LAYERS_ON_DISK | {"lm_head": "cpu"}, "offload_folder": folder}
    model = tiny.binarize(dense, loading)
    assert any(each.name.startswith("packed-") for each in folder.iterdir())
    other = tiny.binarize(dense, loading)  # the same folder serves two models
    assert torch.equal(model(IDS).logits, other(IDS).logits)
    del model, other
    import gc

    gc.collect()
    assert not any(each.name.startswith("packed-") for each in folder.iterdir())


def test_tied_embeddings_on_disk_stay_tied(tmp_path):
    pytest.importorskip("accelerate", minversion="1.15")  # older ones are refused
    tiny.save_model(tmp_path / "tied", tie_word_embeddings=True)
    plain = tiny.binarize(tmp_path / "tied")
    device_map = LAYERS_ON_DISK | {"model.embed_tokens": "disk", "lm_head": "disk"}
    model = tiny.binarize(tmp_path / "tied", {"device_map": device_map, "offload_folder": tmp_path / "offload"})
    # Before the first forward pass: accelerate's hooks untie the placeholders then, of full-precision models too.
    tiny.assert_equal(tiny.saved(model, tmp_path / "a"), tiny.saved(plain, tmp_path / "b"))
    assert torch.equal(model(IDS).logits, plain(IDS).logits)


@pytest.mark.parametrize("loading", [{"device_map": "auto"}, {"device_map": {"": "cpu"}}, {"device_map": "cpu"}])
def test_maps_without_disk_give_the_same_bits(dense, expected, tmp_path, loading):
    model = tiny.binarize(dense, loading)
    tiny.assert_equal(tiny.saved(model, tmp_path), expected[0])


def test_automatic_map_is_sized_for_the_packed_layers(dense, expected):
    """Memory for half of the full-precision model holds the packed model but for a little on disk, or all of it."""
    full = sum(tensor.nbytes for tensor in tiny.llama(tiny.LAYERS, hidden_size=64).bfloat16().parameters())
    packed = sum(tensor.nbytes for tensor in expected[0].values())
    assert packed < 0.7 * full
    model = tiny.binarize(dense, {"device_map": "auto", "max_memory": {"cpu": int(packed * 1.5)}})
    assert set(getattr(model, "hf_device_map", {"": "cpu"}).values()) == {"cpu"}
    small = {"device_map": "auto", "max_memory": {"cpu": int(packed * 0.7)}}
    if transformers.__version__.startswith("5.0."):  # which loads nothing of a model that is all on the disk
        with pytest.raises(ArbCalibrationError, match="was not loaded: max_memory is too small"):
            tiny.binarize(dense, small)
        return
    model = tiny.binarize(dense, small)
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(model(IDS).logits, expected[1])


def test_full_precision_weights_stay_mapped_until_their_turn(dense, monkeypatch):
    """While a layer is at work the later ones are views of the checkpoint and the earlier ones packed."""
    files = {os.path.realpath(path) for path in dense.glob("*.safetensors")}
    seen = []

    def look(this, index, binarize_layer=model_module.binarize_layer):
        mapped = []
        maps = {each.path: each for each in psutil.Process().memory_maps() if each.path in files}
        assert maps
        with open("/proc/self/maps") as lines:
            ranges = [_range(line) for line in lines if line.split()[-1] in files]
        for layer in this.layers[index:]:
            mapped += [any(a <= each.data_ptr() < b for a, b in ranges) for each in layer.parameters()]
        seen.append(all(mapped))
        done = binarize_layer(this, index)
        assert not any(isinstance(module, torch.nn.Linear) for module in this.layers[index].modules())
        return done

    monkeypatch.setattr(model_module, "binarize_layer", look)
    tiny.binarize(dense)
    assert seen == [True] * tiny.LAYERS


def _range(line: str) -> tuple[int, int]:
    start, end = line.split()[0].split("-")
    return int(start, 16), int(end, 16)


def test_spooled_activations_give_the_same_bits_and_leave_nothing(dense, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "memory_budget", lambda processes: 0)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "spool"))
    (tmp_path / "spool").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    kept = []

    def keep(self, call, original=spool.Spool.keep):
        kept.append(original(self, call))
        return kept[-1]

    monkeypatch.setattr(spool.Spool, "keep", keep)
    model = tiny.binarize(dense)
    (place,) = {call.hidden.untyped_storage().data_ptr() for call in kept}  # one file holds them all
    with open("/proc/self/maps") as maps:
        (line,) = (line for line in maps if _range(line)[0] <= place < _range(line)[1])
    assert "activations-" in line
    assert "(deleted)" in line
    assert list((tmp_path / "spool").iterdir()) == []
    tiny.assert_equal(tiny.saved(model, tmp_path / "saved"), expected[0])


def test_one_hessian_at_a_time_gives_the_same_bits(dense, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(matrices, "hessian_budget", lambda device, processes: 1)
    tiny.assert_equal(tiny.saved(tiny.binarize(dense), tmp_path), expected[0])


def _arguments() -> dict:
    both = ((), {"cos": torch.ones(4), "sin": torch.zeros(4)})
    return {0: both, 1: both}


def test_equal_arguments_are_kept_once():
    keeper = spool.Spool(0, None)
    calls = [keeper.keep(CapturedBatch(torch.zeros(1, 4, 8), _arguments(), None)) for _ in range(5)]
    assert len({id(call.arguments[layer][1]["cos"]) for call in calls for layer in range(2)}) == 1
    assert len({id(call.arguments[0][1]["sin"]) for call in calls}) == 1
    different = keeper.keep(CapturedBatch(torch.zeros(1, 4, 8), {0: ((), {"cos": torch.full((4,), 2.0)})}, None))
    assert different.arguments[0][1]["cos"][0] == 2


@pytest.mark.parametrize("spooled", [False, True])
def test_a_disk_without_room_is_refused_before_the_first_pass(dense, tmp_path, monkeypatch, spooled):
    options = {"checkpoint_dir": tmp_path / "checkpoint"}
    if spooled:
        monkeypatch.setattr(plan, "memory_budget", lambda processes: 0)
        options = {}
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(model_module, "capture", lambda *_: pytest.fail("a forward pass was run"))
    with pytest.raises(ArbCalibrationError, match=r"has 0\.00 MB free, the run needs up to"):
        tiny.binarize(dense, **options)


def test_a_spool_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ArbCalibrationError, match="calibration activations take"):
        spool.Spool(1 << 60, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_plan_is_logged_and_bounds_what_is_packed(dense, expected, caplog):
    with caplog.at_level("INFO", logger="arb_hf"):
        model = tiny.binarize(dense)
    text = caplog.text
    assert "21 matrices" in text
    assert "minutes for the other layers" in text
    wanted = [each for each in model.arb_report.coverage.matrices if each.kept is None]
    made = plan.make_plan(model, wanted, [], tiny.config(), 1, False)
    assert sum(each.bits for each in model.arb_report.matrices) // 8 <= made.packed


@pytest.mark.parametrize(
    ("package", "version", "tables"), [("accelerate", "1.14.0", "model"), ("transformers", "5.17.0", "int8")]
)
def test_offloaded_ties_are_refused_where_a_release_mixes_them_up(monkeypatch, tmp_path, package, version, tables):
    tiny.save_model(tmp_path / "dense", tie_word_embeddings=True)
    model = tiny.binarize(tmp_path / "dense", embedding_dtype=tables)
    model.save_pretrained(tmp_path / "packed")
    installed = importlib.metadata.version
    monkeypatch.setattr("importlib.metadata.version", lambda name: version if name == package else installed(name))
    load = functools.partial(arb_hf.from_pretrained, tmp_path / "packed", offload_folder=tmp_path / "offload")
    load(device_map="cpu")
    with pytest.raises(ImportError, match=f"{package} {version} mixes up tensors .* pip install '{package}>="):
        load(device_map=LAYERS_ON_DISK | {"lm_head": "cpu"})


def test_maps_become_loading_maps_and_devices():
    assert Placement(None).loading_map() is None
    assert Placement({"": "cuda:1"}).loading_map() == {"": "cpu"}
    assert Placement({"a": 0, "b": "disk", "c": "cpu"}).loading_map() == {"a": "cpu", "b": "disk", "c": "cpu"}
    automatic = Placement("auto")
    assert automatic.loading_map() == "auto"
    assert list(automatic.note_memory({0: 10, "cpu": 20})) == ["cpu"]
    assert automatic.execution_device() == torch.device("cuda", 0)
    assert Placement("auto", {0: 0, "cpu": 20}).execution_device() == torch.device("cpu")
    assert Placement({"a": "cpu", "b": "disk", "c": torch.device("cuda", 1)}).execution_device() == torch.device(
        "cuda", 1
    )


@pytest.mark.usefixtures("exact_kernel")
def test_layers_on_disk_become_dense_and_stay_there(dense, tmp_path):
    model = tiny.binarize(dense)
    model.save_pretrained(tmp_path / "packed")
    device_map = LAYERS_ON_DISK | {"lm_head": "cpu"}
    offloaded = arb_hf.from_pretrained(tmp_path / "packed", device_map=device_map, offload_folder=tmp_path / "offload")
    assert arb_hf.dequantize(offloaded) is offloaded
    arb_hf.dequantize(model)
    assert all(tensor.is_meta for tensor in offloaded.model.layers.parameters())
    assert type(offloaded.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert torch.equal(offloaded(IDS).logits, model(IDS).logits)
    tiny.assert_equal(tiny.saved(offloaded, tmp_path / "one"), tiny.saved(model, tmp_path / "other"))


def test_layers_on_disk_are_not_saved_over_their_own_files(dense, tmp_path):
    tiny.binarize(dense).save_pretrained(tmp_path / "packed")
    device_map = LAYERS_ON_DISK | {"lm_head": "cpu"}
    model = arb_hf.from_pretrained(tmp_path / "packed", device_map=device_map, offload_folder=tmp_path / "offload")
    with pytest.raises(ValueError, match=r"on disk, in the files of .* itself: save it to another folder"):
        arb_hf.save_pretrained(model, None, tmp_path / "packed")
    arb_hf.save_pretrained(model, None, tmp_path / "other", max_shard_size="40KB")
    assert torch.equal(arb_hf.from_pretrained(tmp_path / "other")(IDS).logits, model(IDS).logits)


def test_layers_of_gpt2_load_to_disk(tmp_path):
    """Its attention initializes ``c_proj.weight``, which is packed here and stays on disk."""
    sizes = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "dense")
    model = tiny.binarize(tmp_path / "dense")
    model.save_pretrained(tmp_path / "packed")
    places = {"wte": "cpu", "wpe": "cpu", "drop": "cpu", "h": "disk", "ln_f": "cpu"}
    device_map = {f"transformer.{name}": place for name, place in places.items()} | {"lm_head": "cpu"}
    offloaded = arb_hf.from_pretrained(tmp_path / "packed", device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(offloaded(IDS).logits, model(IDS).logits)
