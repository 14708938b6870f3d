"""What of a packed model gets adapters: the targets of a ``LoraConfig``, found before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from ..names import kind_of
from ..nn import BinaryExperts, BinaryLinear
from ..nn.int8 import CURE, Int8Embedding, Int8Table
from ..nn.scaled import ScaledLinear
from .config import PackedLoraConfig, check_options, pattern_of
from .layers import LAYERS, LoraBinaryStack

ALL = "all-linear"
# Names of an expert's matrices in checkpoints of transformers 4, whose adapters and recipes are still about.
FORMER = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (),
    "down_proj": (("w2",),),
}


@dataclass(frozen=True)
class Places:
    """Where adapters can go, by the names of the model without adapters.

    ``modules``: all modules outside of experts. ``binary``: those of them that are binary layers. ``experts``: modules
    of experts that are binary, by name.
    """

    modules: dict[str, nn.Module]
    binary: dict[str, nn.Module]
    experts: dict[str, BinaryExperts]

    @classmethod
    def of(cls, model: nn.Module) -> Places:
        """Those of a model, which may have adapters already."""
        modules: dict[str, nn.Module] = {}
        inner: list[str] = []
        for name, module in model.named_modules():
            if name.startswith(tuple(inner)) and not name.startswith(tuple(f"{each}base_layer" for each in inner)):
                continue  # the adapters themselves
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                inner.append(f"{name}.")
            modules[name.replace(".base_layer", "")] = module  # the innermost comes last
        experts = {name: each for name, each in modules.items() if isinstance(each, BinaryExperts)}
        experts = {
            name: each for name, each in experts.items() if any(isinstance(m, BinaryLinear) for m in each.modules())
        }
        inside = tuple(f"{name}." for name in experts)
        outside = {name: each for name, each in modules.items() if name and not name.startswith(inside)}
        binary: dict[str, nn.Module] = {
            name: each for name, each in outside.items() if isinstance(each, (BinaryLinear, ScaledLinear))
        }
        return cls(outside, binary, experts)

    def matrices(self) -> list[str]:
        """Names of all binary matrices, those of experts included."""
        inside = (
            f"{name}.{number}.{projection}"
            for name, each in self.experts.items()
            for number in range(each.stacks.count)
            for projection in each.stacks.names
        )
        return [*self.binary, *inside]


def resolve(model: nn.Module, given: LoraConfig) -> PackedLoraConfig:
    """The same options with every target of this model spelled out.

    Args:
        given: ``target_modules`` may be None or ``"all-linear"``, for all binary layers, or as for PEFT, with names of
            the packed model or of the original one.

    Raises:
        ValueError: the model has no binary layers, or some are offloaded; a name matches nothing, or single experts; an
            option has no place on binary layers.
    """
    places = Places.of(model)
    if not places.matrices():
        raise ValueError("this model has no binary layers to adapt")
    for name, module in [*places.binary.items(), *places.experts.items()]:
        if any(parameter.is_meta for parameter in module.parameters()):
            raise ValueError(f"{name} is offloaded, where adapters cannot follow it: load the model without offloading")
    check_options(given)
    _check_modules_to_save(given, places)
    _check_token_indices(given, places)
    wanted, everything = copy.copy(given), _everything(given)
    modules: Any = given.target_modules
    if everything:
        leaves = {name.rpartition(".")[2] for name in places.matrices()}
        modules = {each for each in leaves if _allowed(given, model, each)}
    wanted.target_modules = modules or []
    _check_names(wanted, model, places)
    linears = [*_linears(wanted, places, everything), *_by_weight(wanted, places.binary)]
    dense = _dense_parameters(wanted, model, places)
    aimed_at = [*linears, *(name.rpartition(".")[0] for name in dense)]
    table = next((name for name in aimed_at if isinstance(places.modules.get(name), Int8Table)), None)
    if table is not None:
        raise ValueError(f"{table} is stored as int8 and takes no adapters: leave it out; or {CURE}")
    stacks, growth = _stacks(wanted, places)
    if stacks and given.lora_bias:
        raise ValueError(f"lora_bias is not possible for stacked experts, {stacks[0]}: leave it out, or leave them out")
    if not linears and not stacks and not dense:
        raise ValueError(f"no module of this model is a target. {_called(places)}")
    ranks = _ranks(wanted, linears, stacks, growth)
    config = _spelled_out(given, linears, stacks, dense, ranks, _lost(linears, model))
    for name, module in model.named_modules():
        if isinstance(module, LoraBinaryStack) and not name.endswith(".base_layer"):
            module.require_same(name.replace(".base_layer", ""), config)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.quantization_config.know_adapters()
    return config


def _spelled_out(
    given: LoraConfig,
    linears: list[str],
    stacks: list[str],
    dense: list[str],
    ranks: dict[str, tuple[int, float]],
    lost: set[str],
) -> PackedLoraConfig:
    """The config of these targets. PEFT knows those that are ``lost`` as modules by their parameter."""
    options = {each.name: copy.copy(getattr(given, each.name)) for each in fields(LoraConfig) if each.init}
    options |= {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    holders = {name.rpartition(".")[0] for name in stacks}
    options |= {
        "target_modules": sorted({*linears, *holders} - lost),
        "target_parameters": sorted({*dense, *(f"{name}.weight" for name in lost)}) or None,
        "stacks": {name: ranks[name] for name in stacks},
        "base": (given.r, given.lora_alpha),
    }
    for option, at, default in (("rank_pattern", 0, given.r), ("alpha_pattern", 1, given.lora_alpha)):
        other = {name: ranks[name][at] for name in linears if ranks[name][at] != default}
        options[option] = {pattern_of(f"{name}.weight" if name in lost else name): each for name, each in other.items()}
    config = PackedLoraConfig(**options)
    config._register_custom_module(LAYERS)  # PEFT does not store this
    return config


def _everything(config: LoraConfig) -> bool:
    modules = config.target_modules
    return (modules is None and not config.target_parameters) or (isinstance(modules, str) and modules.lower() == ALL)


def _allowed(config: LoraConfig, model: nn.Module, name: str) -> bool:
    """Whether PEFT lets a module of this kind have LoRA in this model: not where Mamba reads its weights directly."""
    try:
        LoraModel._check_target_module_compatiblity(None, config, model, name)  # type: ignore[arg-type]
    except ValueError:
        return False
    return True


def _linears(wanted: LoraConfig, places: Places, binary_only: bool) -> list[str]:
    """Modules outside of experts that are targets."""
    candidates = places.binary if binary_only else places.modules
    return [name for name in candidates if name not in places.experts and check_target_module_exists(wanted, name)]


def _by_weight(wanted: LoraConfig, modules: dict[str, nn.Module]) -> list[str]:
    """Modules whose ``weight`` is among the targeted parameters."""
    return [name for name in modules if _names_parameter(wanted, f"{name}.weight")]


def _names_parameter(config: LoraConfig, name: str) -> bool:
    return any(_is_called(name, each) for each in config.target_parameters or ())


def _is_called(name: str, target: str) -> bool:
    """PEFT's rule for an element of a list of targets."""
    return name == target or name.endswith(f".{target}")


def _stacks(wanted: LoraConfig, places: Places) -> tuple[list[str], dict[str, int]]:
    """Stacks of experts that are targets; and by how much the rank grows where one stands for several former matrices."""
    found, growth = [], {}
    for holder, experts in places.experts.items():
        for projection in experts.stacks.names:
            name, count = f"{holder}.{projection}", experts.stacks.count
            singles = sum(bool(_hits(wanted, f"{holder}.{number}.{projection}")) for number in range(count))
            if singles == count or _hits(wanted, holder) or _hits(wanted, name) or _names_parameter(wanted, name):
                found.append(name)
                continue
            if singles:
                raise ValueError(
                    f"the targets are {projection} of {singles} of the {count} experts of {holder}; adapters are for "
                    f"all experts of a layer: name {name}"
                )
            for former in FORMER[projection]:
                matched = [each for each in former if _hits(wanted, f"{holder}.0.{each}")]
                if len(matched) == len(former):
                    found.append(name)
                    growth[name] = len(former)
                elif matched:
                    missing = " and ".join(sorted(set(former) - set(matched)))
                    raise ValueError(
                        f"{holder}: {matched[0]} of experts is one matrix with {missing}; name {projection} instead"
                    )
    return found, growth


def _hits(config: LoraConfig, name: str) -> bool:
    return bool(check_target_module_exists(config, name))


def _dense_parameters(wanted: LoraConfig, model: nn.Module, places: Places) -> list[str]:
    """Parameters that PEFT adapts itself: they are named, and are no part of binary layers."""
    packed = tuple(f"{name}." for name in [*places.binary, *places.experts])
    names = (name.replace(".base_layer", "") for name, _ in model.named_parameters())
    return [name for name in names if _names_parameter(wanted, name) and not name.startswith(packed)]


def _check_names(wanted: LoraConfig, model: nn.Module, places: Places) -> None:
    """Refuse names that match nothing, which PEFT leaves out without a word."""
    former = (
        f"{holder}.0.{each}"
        for holder, experts in places.experts.items()
        for projection in experts.stacks.names
        for names in FORMER[projection]
        for each in names
    )
    stacks = [f"{holder}.{each}" for holder, experts in places.experts.items() for each in experts.stacks.names]
    modules = [*places.modules, *places.matrices(), *stacks, *former]
    parameters = [*(name.replace(".base_layer", "") for name, _ in model.named_parameters()), *stacks]
    for option, what, known in (
        ("target_modules", "module", modules),
        ("exclude_modules", "module", modules),
        ("target_parameters", "parameter", parameters),
    ):
        given = getattr(wanted, option) or ()
        for target in () if isinstance(given, str) else sorted(given):
            if not any(_is_called(name, target) for name in known):
                raise ValueError(f"{option}: no {what} of this model is called {target}. {_called(places)}")


def _called(places: Places) -> str:
    return f"Its binary layers are {', '.join(sorted({kind_of(name) for name in places.matrices()}))}"


def _check_modules_to_save(config: LoraConfig, places: Places) -> None:
    for module in config.modules_to_save or ():
        packed = [name for name in places.matrices() if f".{module}." in f".{name}."]
        if packed:
            raise ValueError(
                f"modules_to_save: {module} would train a copy of {packed[0]}, which is packed and has no gradients; "
                "make it a target instead"
            )
        table = next((n for n, m in places.modules.items() if isinstance(m, Int8Table) and _is_called(n, module)), None)
        if table is not None:
            raise ValueError(
                f"modules_to_save: {module} would train a copy of {table}, which is stored as int8 and has no gradients: "
                f"{CURE}"
            )


def _check_token_indices(config: LoraConfig, places: Places) -> None:
    indices: Any = config.trainable_token_indices
    if not indices:
        return
    wanted = set(indices) if isinstance(indices, dict) else None  # of a list: the input embedding
    for name, module in places.modules.items():
        named = isinstance(module, Int8Embedding) if wanted is None else any(_is_called(name, each) for each in wanted)
        if named and isinstance(module, Int8Table):
            raise ValueError(
                f"trainable_token_indices would train rows of {name}, which is stored as int8 and has no gradients: {CURE}"
            )


def _ranks(
    wanted: LoraConfig, linears: list[str], stacks: list[str], growth: dict[str, int]
) -> dict[str, tuple[int, float]]:
    """Rank and alpha of every target.

    Raises:
        ValueError: a pattern of ranks or alphas is for none of them.
    """
    aliases = {name: [name, f"{name}.weight"] for name in linears}
    for name in stacks:
        holder, _, projection = name.rpartition(".")
        former = [each for names in FORMER[projection] for each in names]
        aliases[name] = [name, *(f"{holder}.0.{each}" for each in (projection, *former))]
    ranks: dict[str, tuple[int, float]] = {}
    used: set[tuple[str, str]] = set()
    for name, called in aliases.items():
        found = []
        for option, default in (("rank_pattern", wanted.r), ("alpha_pattern", wanted.lora_alpha)):
            patterns: Any = getattr(wanted, option) or {}
            keys = [key for key in (get_pattern_key(patterns, each) for each in called) if key in patterns]
            used |= {(option, key) for key in keys}
            found.append(patterns[keys[0]] if keys else default)
        rank, alpha = found
        ranks[name] = rank * growth.get(name, 1), alpha * growth.get(name, 1)
    for option in ("rank_pattern", "alpha_pattern"):
        unused = [key for key in getattr(wanted, option) or {} if (option, key) not in used]
        if unused:
            raise ValueError(f"{option}: {unused[0]} is the name of none of the targets")
    return ranks


def _lost(linears: Iterable[str], model: nn.Module) -> set[str]:
    """Modules that PEFT takes for former experts by their names, and would leave out."""
    kinds: dict[str, set[str]] = {}
    for name in linears:
        kinds.setdefault(name.rpartition(".")[2], set()).add(name)
    lost: set[str] = set()
    for leaf, names in kinds.items():
        probe = LoraConfig(target_modules=[leaf])
        try:
            convert_peft_config_for_transformers(probe, model, None)
        except ValueError:  # one of two that PEFT wants together
            lost |= names
        else:
            lost |= names if leaf not in (probe.target_modules or ()) else set()
    return lost
