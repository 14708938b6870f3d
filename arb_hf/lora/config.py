"""`PackedLoraConfig`: PEFT's options of LoRA, with the targets of one packed model spelled out."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from peft import LoraConfig

DENSE_WEIGHTS = "needs dense weights, which binary layers do not have"
# What binary layers do, and what says nothing of them. An option that PEFT adds one day is refused until it is here.
SUPPORTED = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "lora_bias",
    "target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern",
    "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "fan_in_fan_out", "inference_mode",
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "stacks", "base",
}  # fmt: skip
REASONS = {
    "use_dora": f"DoRA {DENSE_WEIGHTS}",
    "use_qalora": f"QALoRA {DENSE_WEIGHTS}",
    "loftq_config": f"LoftQ {DENSE_WEIGHTS}",
    "corda_config": f"CorDA {DENSE_WEIGHTS}",
    "kasa_config": f"KaSA {DENSE_WEIGHTS}",
    "lora_ga_config": f"LoRA-GA {DENSE_WEIGHTS}",
    "layer_replication": "would repeat layers that a packed checkpoint holds once",
    "bias": "would change the packed model beside the adapter; lora_bias=True trains a bias of the adapter's own",
}
INITIALIZATIONS = (True, False, "gaussian")


@dataclass
class PackedLoraConfig(LoraConfig):
    """A ``peft.LoraConfig`` for one packed model; :func:`arb_hf.lora.lora_config` makes it.

    Saved, it names what the original dense model has in these places: the 3-D parameters of stacked experts.

    Args:
        stacks: rank and alpha by the name of each stack of experts that gets adapters, as the dense model's parameter
            is called. The modules that hold them are among ``target_modules``.
        base: ``r`` and ``lora_alpha`` that ``stacks`` were made for.
    """

    stacks: dict[str, tuple[int, float]] = field(default_factory=dict)
    base: tuple[int, float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stacks and self.base != (self.r, self.lora_alpha):  # PEFT copies a config to combine adapters
            raise ValueError(
                f"the ranks of stacked experts were chosen for r={self.base and self.base[0]} and "
                f"lora_alpha={self.base and self.base[1]}, not for {self.r} and {self.lora_alpha}. Adapters of stacked "
                "experts are combined with combination_type='linear' if their lora_alpha equals r; otherwise activate "
                "several: model.base_model.set_adapter([...])"
            )

    def to_dict(self) -> dict[str, Any]:
        """The options as saved: a plain ``LoraConfig``'s for the dense model."""
        options = super().to_dict()
        stacks, _ = options.pop("stacks"), options.pop("base")
        holders = {name.rpartition(".")[0] for name in stacks}
        options["target_modules"] = sorted(
            each
            for each in self.target_modules or ()
            if not any(holder == each or holder.endswith(f".{each}") for holder in holders)
        )
        options["target_parameters"] = sorted({*(self.target_parameters or ()), *stacks}) or None
        for option, at, default in (("rank_pattern", 0, self.r), ("alpha_pattern", 1, self.lora_alpha)):
            other = {pattern_of(name): each[at] for name, each in stacks.items() if each[at] != default}
            options[option] = options[option] | other
        return options


def pattern_of(name: str) -> str:
    """The key of ``rank_pattern`` that means the one module or parameter of this name."""
    return name.replace(".", r"\.")


def check_options(config: LoraConfig) -> None:
    """Refuse what binary layers cannot do.

    Raises:
        ValueError: naming the option and the reason.
    """
    how = config.init_lora_weights
    if how not in INITIALIZATIONS:
        raise ValueError(
            f"init_lora_weights={how!r} is not possible on binary layers: it {DENSE_WEIGHTS}; leave it out, or take "
            "'gaussian'"
        )
    plain = LoraConfig()
    for each in fields(config):
        value = getattr(config, each.name)
        if each.name not in SUPPORTED and value != getattr(plain, each.name):
            reason = REASONS.get(each.name, "arb_hf has plain LoRA only")
            raise ValueError(f"{each.name}={value!r} is not possible on binary layers: {reason}. Leave it out")
