"""`arb_hf.plan`: what a run with some options would give."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from ..architecture import field, longest_sequence
from ..binarize.counts import salient_columns
from ..bits import bits_per_weight
from ..calibrate.batches import require_length
from ..calibrate.choices import TOLERANCE
from ..calibrate.decoder import find_decoder_layers
from ..calibrate.offload import Placement
from ..calibrate.plan import Plan, make_plan, tunable_layers
from ..calibrate.tables import survey_model
from ..config import ArbConfig
from ..coverage import Coverage, Matrix
from ..names import kind_of
from ..sizes import BINARY, bits_within, packed_files, saved_tensors
from ..skeleton import skeleton_like
from ..text import is_text_by_name
from .duration import estimate, measure
from .skeleton import skeleton_of

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
# What configs call the number of experts that a token is routed to.
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
UNKNOWN_SHARE = 0.25  # share of the experts that a token is taken to reach where the config does not say


@dataclass(frozen=True)
class ModelPlan:
    """What a run would give.

    Attributes:
        model: name or path of the original; ``class_name`` and ``dtype``: of what is loaded.
        coverage: what is binarized and what is kept, and why.
        bits_per_weight: true bits per binarized weight, every stored bit counted.
        bounds: the fewest and the most bits that it can be; both the same where it is exact.
        original: bytes of the original's tensors.
        files: bytes of the weight files by name; ``parts``: by what they hold, headers among it.
        needs: memory and disk of the run.
        seconds: an estimate of its time by stage, without loading and reading the text.
    """

    model: str
    class_name: str
    dtype: str
    coverage: Coverage
    bits_per_weight: float
    bounds: tuple[float, float]
    original: int
    files: dict[str, int]
    parts: dict[str, int]
    needs: Plan
    seconds: dict[str, float]

    @property
    def bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(self.files.values())

    @property
    def exact(self) -> bool:
        """Whether sizes are exact, to the byte: those of ``refinement="paper"`` depend on the weights."""
        return self.bounds[0] == self.bounds[1]

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        plain = {name: value for name, value in vars(self).items() if name not in ("coverage", "needs")}
        return {
            **plain,
            "bounds": list(self.bounds),
            "bytes": self.bytes,
            "exact": self.exact,
            "total_seconds": sum(self.seconds.values()),
            "needs": asdict(self.needs),
            "coverage": self.coverage.to_dict(),
        }

    def __str__(self) -> str:
        all_files = "all" if self.exact else "all, about"
        lines = [f"{self.model}: {self.class_name} in {self.dtype}", "", self.coverage.table(), ""]
        lines += [f"{'weight files':<44}{'MB':>12}"]
        for part, size in self.parts.items():
            if size:
                bits = f"  {self._bits()}" if part == BINARY else ""
                lines.append(f"{part:<44}{size / 1e6:>12,.2f}{bits}")
        count = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        lines.append(f"{all_files:<44}{self.bytes / 1e6:>12,.2f}  {count}; the original {self.original / 1e6:,.2f}")
        lines += ["", f"needs: {self.needs}", f"time: {self._time()}"]
        return "\n".join(lines)

    def _bits(self) -> str:
        if self.exact:
            return f"{self.bits_per_weight:.3f} bits per weight"
        low, high = self.bounds
        return f"about {self.bits_per_weight:.2f} bits per weight ({low:.2f} to {high:.2f}, as the weights decide)"

    def _time(self) -> str:
        parts = ", ".join(f"{stage} {_duration(seconds)}" for stage, seconds in self.seconds.items())
        return f"about {_duration(sum(self.seconds.values()))} ({parts}); it may be half or twice that"


def plan(
    model: PreTrainedModel | str | os.PathLike,
    config: ArbConfig | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    max_shard_size: int | str = "50GB",
    trust_remote_code: bool = False,
) -> ModelPlan:
    """What binarizing a model with these options would give, without calibrating and without its weights.

    Of a folder or a Hub repository only ``config.json`` is read. Calibration data are taken to be ``num_samples``
    windows of ``sequence_length`` tokens; a run on several processes shares them.

    Args:
        model: folder or Hub name of the original, or the loaded model.
        config: the options of the run.
        dtype, device_map, trust_remote_code: as for ``from_pretrained``; not for a loaded model.
        max_shard_size: as for ``save_pretrained``.

    Raises:
        ArbCalibrationError: the model cannot be binarized with these options, for the reasons a run would give.
        ValueError: the model is quantized already, or has code of its own that is not trusted.
        OSError: there is no such model, or no access to it.
    """
    config = ArbConfig() if config is None else config
    empty = skeleton_like(model) if isinstance(model, PreTrainedModel) else skeleton_of(model, dtype, trust_remote_code)
    prefix, layers = find_decoder_layers(empty)
    skip = HfQuantizer.get_modules_to_not_convert(empty, config.modules_to_not_convert, add_default_skips=True)
    if config.max_size is not None:
        config = copy.deepcopy(config)
        config.bits, config.max_size = bits_within(empty, config, sorted(skip)), None
    coverage = survey_model(empty, prefix, layers, config, skip)
    coverage.require(config.minimum_coverage)
    if is_text_by_name(
        config.dataset
    ):  # token ids are taken as they are, and only a run opens a file that may hold them
        require_length(config, longest_sequence(empty))
    wanted = coverage.to_binarize()
    batches = _batches(config)
    tuned, _ = tunable_layers(layers, wanted, config, len(batches))
    needs = make_plan(empty, wanted, batches, config, 1, bool(tuned))
    speed = measure(_device(device_map), empty.dtype)
    seconds = estimate(coverage.matrices, tuned, batches, config, _active(empty, coverage), speed)
    original = sum(tensor.nbytes for tensor in saved_tensors(empty).values())
    files = packed_files(empty, config, coverage, prefix, max_shard_size)
    return ModelPlan(
        model=empty.name_or_path or type(empty).__name__,
        class_name=type(empty).__name__,
        dtype=str(empty.dtype).removeprefix("torch."),
        coverage=coverage,
        bits_per_weight=bits_per_weight(empty),
        bounds=_bounds(wanted, config),
        original=original,
        files=files.sizes,
        parts=files.parts,
        needs=needs,
        seconds=seconds,
    )


def _bounds(wanted: list[Matrix], config: ArbConfig) -> tuple[float, float]:
    """The fewest and the most bits per weight that come out, whatever the weights and the calibration data."""
    if config.bits is not None:
        return config.bits * (1 - TOLERANCE), config.bits * (1 + TOLERANCE)
    low = high = 0
    for each in wanted:
        n, m = each.shape
        options = config.options(each.name)
        columns = salient_columns(n, m, options)
        low += options.form(n, m, columns.fewest).bits()
        high += options.form(n, m, columns.most).bits()
    weights = sum(each.weights for each in wanted)
    return low / weights, high / weights


def _batches(config: ArbConfig) -> list[int]:
    """Tokens of each calibration batch."""
    whole, rest = divmod(config.num_samples, config.batch_size)
    sizes = [config.batch_size] * whole + [rest] * bool(rest)
    return [size * config.sequence_length for size in sizes]


def _active(model: PreTrainedModel, coverage: Coverage) -> float:
    """Share of a layer's experts that a token is routed to."""
    experts = [each for each in coverage.matrices if "*" in kind_of(each.name)]
    if not experts:
        return 1.0
    kind, layer = kind_of(experts[0].name), experts[0].layer
    count = sum(each.layer == layer and kind_of(each.name) == kind for each in experts)
    chosen = next((value for name in CHOSEN if isinstance(value := field(model, name), int)), None)
    return UNKNOWN_SHARE if chosen is None else min(chosen / count, 1.0)


def _device(device_map: Any) -> torch.device:
    """Where decoder layers are worked on."""
    if isinstance(device_map, dict):
        return Placement(device_map).execution_device()
    if device_map in STRATEGIES:
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    return Placement({"": "cpu" if device_map is None else device_map}).execution_device()


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(math.ceil(seconds), 1)} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
