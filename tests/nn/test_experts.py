"""Experts taken apart and put together; their Hessians; experts that no token reached; what is stored."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextConfig, Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import arb_hf
from arb_hf import ArbCalibrationError, ArbConfig
from arb_hf.calibrate import matrices
from arb_hf.calibrate.capture import CapturedBatch
from arb_hf.calibrate.hessians import InputGroup, Moment, accumulate
from arb_hf.nn import BinaryExperts, BinaryLinear, binary_modules
from arb_hf.nn.experts import find_stacks
from arb_hf.nn.swap import expose_linears
from helpers.models import VOCABULARY, token_samples

WIDTH, INNER, EXPERTS = 64, 40, 6
SIZES = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_local_experts": EXPERTS}


def filled(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 8
        parameter.requires_grad_(False)
    module.config._experts_implementation = "eager"
    return module


def stacked(kind: str) -> nn.Module:
    if kind == "mixtral":
        return filled(MixtralExperts(MixtralConfig(**SIZES)))
    if kind == "gpt_oss":
        return filled(GptOssExperts(GptOssConfig(**SIZES)))
    if kind == "llama4":
        module = Llama4TextExperts(Llama4TextConfig(**SIZES))
        module.config = Llama4TextConfig(**SIZES)
        return filled(module)
    nemotron = pytest.importorskip(
        "transformers.models.nemotron_h.modeling_nemotron_h", reason="from transformers 5.3 on"
    )
    options = {"n_routed_experts": EXPERTS, "moe_intermediate_size": INNER, "hidden_size": WIDTH}
    return filled(nemotron.NemotronHExperts(nemotron.NemotronHConfig(**options)))


def tokens(kind: str, count: int = 11) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, WIDTH, generator=generator)
    index = torch.rand(count, EXPERTS - 1, generator=generator).argsort()[:, :2]  # the last expert gets none
    weights = torch.rand(count, 2, generator=generator)
    if kind != "llama4":
        return x, index, weights
    scores = torch.zeros(count, EXPERTS).scatter(1, index, weights)
    return ((x[None] * scores.T[..., None]).reshape(-1, WIDTH),)


@pytest.mark.parametrize(
    ("kind", "up", "transposed", "batched", "shape"),
    [
        ("mixtral", "gate_up_proj", False, False, (2 * INNER, WIDTH)),
        ("gpt_oss", "gate_up_proj", True, False, (2 * INNER, WIDTH)),
        ("llama4", "gate_up_proj", True, True, (2 * INNER, WIDTH)),
        ("nemotron_h", "up_proj", False, False, (INNER, WIDTH)),
    ],
)
def test_stacks_are_found_by_their_structure(kind, up, transposed, batched, shape):
    stacks = find_stacks(stacked(kind))
    assert (stacks.up, stacks.count, stacks.transposed, stacks.batched) == (up, EXPERTS, transposed, batched)
    assert stacks.shape(up) == shape
    assert stacks.shape("down_proj") == (WIDTH, INNER)


def test_other_modules_are_not_taken_for_experts():
    assert find_stacks(JetMoeParallelExperts(4, 8, 8)) is None
    assert find_stacks(nn.Linear(4, 4)) is None
    odd = stacked("mixtral")
    odd.down_proj = nn.Parameter(torch.zeros(EXPERTS, WIDTH, INNER + 1))
    assert find_stacks(odd) is None


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4", "nemotron_h"])
def test_experts_one_by_one_give_what_the_stack_gives_and_go_back(kind):
    module, inputs = stacked(kind), tokens(kind)
    expected = module(*inputs)
    before = {name: each.clone() for name, each in module.named_parameters()}
    experts = BinaryExperts.unstack(module, find_stacks(module))
    torch.testing.assert_close(experts(*inputs), expected, rtol=1e-5, atol=1e-6)
    if kind != "llama4":  # as some models call it
        wide = experts(inputs[0].reshape(1, 11, WIDTH), *inputs[1:])
        assert torch.equal(wide[0], experts(*inputs))
    with torch.device("meta"):
        empty = stacked(kind) if kind == "llama4" else type(module)(module.config)
    back = experts.restack(empty)
    assert {name: each.shape for name, each in back.named_parameters()} == {k: v.shape for k, v in before.items()}
    assert all(torch.equal(each, before[name]) for name, each in back.named_parameters())


def test_a_token_sent_nowhere_gets_nothing():
    module, (x, index, weights) = stacked("mixtral"), tokens("mixtral")
    experts = BinaryExperts.unstack(module, find_stacks(module))
    index[3] = EXPERTS
    out = experts(x, index, weights)
    assert not out[3].any()
    assert out[4].any()


class Sevenfold(MixtralExperts):
    """Experts that do something of their own with the tokens."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return 7 * super().forward(hidden_states, top_k_index, top_k_weights)


def test_experts_that_do_something_else_are_refused():
    module = Sevenfold(MixtralConfig(**SIZES))
    model = nn.ModuleDict({"experts": filled(module)})
    with pytest.raises(ArbCalibrationError, match=r"experts: Sevenfold does more.*overrides=\{'\*experts': None\}"):
        expose_linears(model, ["experts.0.down_proj"], verify=True)


def mixtral(**options) -> nn.Module:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCABULARY}
    config = MixtralConfig(**(SIZES | sizes | {"max_position_embeddings": 128, "num_experts_per_tok": 2} | options))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


class Routed(nn.Module):
    """A layer of experts alone, that routes token t to experts t % 3 and 3 (of 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = stacked("mixtral")

    def forward(self, x):
        flat = x.reshape(-1, WIDTH)
        number = torch.arange(len(flat))
        index = torch.stack([number % 3, torch.full_like(number, 3)], 1)
        return self.experts(flat, index, torch.full((len(flat), 2), 0.5)).reshape(x.shape)


def routed_groups(mask=None, count: int = 2, length: int = 10) -> tuple[dict[str, InputGroup], torch.Tensor, nn.Module]:
    layer = Routed()
    names = [f"experts.{e}.{part}" for e in range(EXPERTS) for part in ("gate_up_proj", "down_proj")]
    linears = expose_linears(layer, names)
    hidden = torch.randn(count, length, WIDTH, generator=torch.Generator().manual_seed(2))
    groups = accumulate(layer, linears, [CapturedBatch(hidden, {0: ((), {})}, mask)], 0)
    return {group.names[0]: group for group in groups}, hidden, layer


def test_an_experts_hessian_is_that_of_the_tokens_routed_to_it():
    groups, hidden, layer = routed_groups(count=40)
    rows = hidden.reshape(-1, WIDTH)
    for expert, own in ((0, rows[0::3]), (2, rows[2::3]), (3, rows)):
        group = groups[f"experts.{expert}.gate_up_proj"]
        assert (group.tokens, group.borrowed) == (len(own), 0)
        torch.testing.assert_close(group.hessian(), 2 / 40 * own.T @ own, rtol=1e-4, atol=1e-3)
        module = layer.experts.experts()[expert]
        inner = module.gate(module.gate_up_proj(own))
        second = groups[f"experts.{expert}.down_proj"]
        torch.testing.assert_close(second.hessian(), 2 / 40 * inner.T @ inner, rtol=1e-4, atol=1e-3)


def test_starved_experts_borrow_what_is_missing_from_the_others():
    groups, hidden, layer = routed_groups()
    rows = hidden.reshape(-1, WIDTH)
    lent = torch.cat([rows, rows])  # every token reached one of 0-2, and 3
    average = lent.T @ lent / len(lent)
    own, group = rows[1::3], groups["experts.1.gate_up_proj"]
    assert (group.tokens, group.borrowed) == (len(own), (WIDTH - len(own)) / WIDTH)
    expected = own.T @ own + (WIDTH - len(own)) * average
    torch.testing.assert_close(group.hessian(), 2 / 2 * expected, rtol=1e-4, atol=1e-3)
    unseen, module = groups["experts.5.down_proj"], layer.experts.experts()[5]
    inner = module.gate(module.gate_up_proj(lent))
    assert (unseen.tokens, unseen.borrowed) == (0, 1)
    torch.testing.assert_close(unseen.hessian(), INNER * inner.T @ inner / len(lent), rtol=1e-4, atol=1e-3)


def test_padding_reaches_no_expert():
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[0, :4] = 0
    groups, hidden, _ = routed_groups(mask)
    rows = hidden.reshape(-1, WIDTH)[mask.reshape(-1).bool()]
    group = groups["experts.3.gate_up_proj"]
    assert group.tokens == len(rows) == 16
    torch.testing.assert_close(group.own.total.float().triu(), (rows.T @ rows).triu(), rtol=1e-4, atol=1e-3)


def test_no_tokens_at_all_is_data_free():
    group = InputGroup(["a"], 8, 1)
    assert group.hessian() is None
    group.lent = Moment(torch.eye(8) * 6, 3)
    assert torch.equal(group.hessian(), torch.eye(8) * 6 * 8 / 3 * 2)


def binarize(model, folder, samples, **options):
    model.save_pretrained(folder)
    config = ArbConfig(**({"dataset": samples, "refinement": "paper", "iterations": 2, "block_size": 64} | options))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def test_waves_change_nothing(tmp_path, monkeypatch):
    samples = token_samples(2, 24)
    whole = binarize(mixtral(), tmp_path, samples)
    monkeypatch.setattr(matrices, "hessian_budget", lambda device, processes: 8 * WIDTH**2 * 3)
    parts = binarize(mixtral(), tmp_path, samples)
    for (name, one), other in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Listed(nn.Module):
    """Experts as a list of modules, as models outside transformers still have them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(3))

    def forward(self, x):
        flat = x.reshape(-1, WIDTH)
        return torch.cat([self.experts[0](flat[::2]), self.experts[1](flat[1::2])]).reshape(x.shape)


def test_listed_experts_borrow_too():
    layer = Listed().requires_grad_(False)
    linears = {name: each for name, each in layer.named_modules() if isinstance(each, nn.Linear)}
    hidden = torch.randn(1, 300, WIDTH)
    groups = {
        each.names[0]: each for each in accumulate(layer, linears, [CapturedBatch(hidden, {0: ((), {})}, None)], 0)
    }
    assert {name: (each.tokens, each.borrowed) for name, each in groups.items()} == {
        f"experts.{number}.{part}": (150, 0) if number < 2 else (0, 1) for number in range(3) for part in ("up", "down")
    }
    rows = hidden[0]
    torch.testing.assert_close(
        groups["experts.2.up"].lent.total.float().triu(), (rows[:300].T @ rows).triu(), rtol=1e-4, atol=1e-3
    )


FAMILIES = {
    "mixtral": {},
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": INNER, "head_dim": 32},
    "gpt_oss": {"head_dim": 32},
    "deepseek_v3": {
        "n_routed_experts": EXPERTS, "moe_intermediate_size": INNER, "first_k_dense_replace": 0, "n_group": 1,
        "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
        "v_head_dim": 32, "head_dim": 16,
    },
    "llama4_text": {"intermediate_size_mlp": INNER, "head_dim": 32},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_that_saw_no_token_is_sound(family, tmp_path):
    from transformers import AutoConfig

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    top = {"num_experts_per_tok": 1 if family == "llama4_text" else 2, "max_position_embeddings": 128}
    config = AutoConfig.for_model(family, **(SIZES | sizes | top | FAMILIES[family]))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        dense = AutoModelForCausalLM.from_config(config).eval()
    model = binarize(dense, tmp_path, [torch.tensor([5, 9])], max_salient_columns=8)
    report = model.arb_report
    unseen = [each for each in report.matrices if "expert" in each.kind and each.tokens == 0]
    assert len(unseen) >= 2 * (EXPERTS - 4)
    assert len(report.starved) >= len(unseen)
    assert all(each.borrowed == 1 for each in unseen)
    assert report.to_dict()["starved"] == len(report.starved)
    assert report.coverage.share > 0.95
    linears = expose_linears(dense, [each.name for each in unseen])
    for record in unseen:
        weight, module = linears[record.name].weight, model.get_submodule(record.name)
        assert isinstance(module, BinaryLinear)
        values = module.binary_weight().dequantize()
        naive = weight.sign() * weight.abs().mean(1, keepdim=True)
        assert torch.isfinite(values).all()
        assert (values - weight).norm() < (naive - weight).norm()
        assert record.solve.output_error is not None
        assert not record.solve.data_free
    shares = sum(each.bits for each in unseen) / sum(each.weights for each in unseen)
    assert shares == pytest.approx(
        sum(model.get_submodule(e.name).form.bits() for e in unseen) / sum(e.weights for e in unseen)
    )


def test_what_is_on_disk_is_packed(tmp_path):
    from safetensors.torch import load_file

    model = binarize(mixtral(), tmp_path / "dense", token_samples(2, 24))
    model.save_pretrained(tmp_path / "packed")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    stored = sum(each.nbytes for name, each in tensors.items() if ".experts." in name) * 8
    records = [each for each in model.arb_report.matrices if ".experts." in each.name]
    assert len(records) == 2 * EXPERTS
    assert stored == sum(each.bits for each in records)
    loaded = arb_hf.from_pretrained(tmp_path / "packed")
    x = torch.arange(9)[None]
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert loaded.hf_quantizer.is_compileable is False


@pytest.mark.parametrize("family", ["mixtral", "gpt2"])
def test_dequantized_models_are_their_own_class_again(family, tmp_path):
    if family == "mixtral":
        dense = mixtral()
    else:
        from transformers import GPT2Config

        sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
        dense = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=VOCABULARY, **sizes)).eval()
    model = binarize(dense, tmp_path / "dense", token_samples(2, 24))
    weights = {name: module.binary_weight().dequantize() for name, module in binary_modules(model).items()}
    back = arb_hf.dequantize(model)
    back.save_pretrained(tmp_path / "back")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    assert {name: type(module) for name, module in again.named_modules()} == {
        name: type(module) for name, module in dense.named_modules()
    }
    x = torch.arange(9)[None]
    assert torch.equal(again(x).logits, back(x).logits)
    linears = expose_linears(again, weights)
    assert linears.keys() == weights.keys()
    assert all(torch.equal(linears[name].weight, weight) for name, weight in weights.items())
