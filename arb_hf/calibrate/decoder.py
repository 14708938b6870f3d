"""Finding a model's decoder layers and their weight matrices, without a file per architecture."""

from __future__ import annotations

import difflib
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..architecture import field, input_embeddings
from ..auto import writes_text
from ..config import ArbConfig
from ..coverage import Coverage, Matrix
from ..errors import ArbCalibrationError
from ..format import WORD
from ..nn.experts import find_stacks
from ..overrides import covers, select

# Linears that must not be converted, by their path within a decoder layer.
KEPT_NAMES = (
    (r"dt_proj$", "its model multiplies by the weight itself"),  # Mamba, Jamba: dt_proj.weight @ time_step
    (r"weights_proj$", "its model reads the weight's type"),  # DeepSeek-V3.2: x.to(weights_proj.weight.dtype)
    # RWKV divides both in place when it first runs, so that float16 does not overflow.
    (r"(attention\.output|feed_forward\.value)$", "its model changes the weight when it runs"),
)
# Not in the list: out_proj of Mamba-2 and its hybrids. Only their fused training kernel reads its weight.
ROUTER = "router: small, and a wrong expert costs more than its weights would save"
ROUTER_CLASSES = re.compile(r"Router|Gating|TopKGate|MoEGate|MoeGate")
ROUTER_NAMES = re.compile(r"(router|gate|wg|shared_expert_gate|shared_gate)")
# Subclasses of nn.Linear with a forward of their own that is still x W^T + b.
PLAIN_LINEARS = ("FalconLinear",)  # a matmul and an addition instead of F.linear
# Fewer inputs than a packed word, or outputs than this, and the scales of columns or rows outweigh the bits saved.
FEWEST_OUTPUTS = 8


def find_decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the ``ModuleList`` of the decoder layers, and its name.

    The search starts next to the input embeddings, so that a vision tower's layers are not taken for those of the
    language model, or at the whole model where it does not say which these are. It takes the first list whose elements
    transformers must not split over devices or, failing that, the list that holds the most weights.

    Raises:
        ArbCalibrationError: the model is not a decoder-only language model, or has no such list.
    """
    _require_decoder(model)
    names = {module: name for name, module in model.named_modules()}
    embeddings = input_embeddings(model)
    path = [] if embeddings is None else names.get(embeddings, "").split(".")
    for depth in range(max(len(path) - 1, 0), -1, -1):
        prefix = ".".join(path[:depth])
        root = model.get_submodule(prefix)
        lists = [each for each in root.modules() if isinstance(each, nn.ModuleList) and len(each)]
        if lists:
            unsplit = {name for each in (model, root) for name in getattr(each, "_no_split_modules", None) or ()}
            whole = [each for each in lists if all(type(layer).__name__ in unsplit for layer in each)]
            layers = whole[0] if whole else max(lists, key=_weights)
            return names[layers], layers
    raise ArbCalibrationError(f"{type(model).__name__} has no list of decoder layers to binarize")


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _require_decoder(model: PreTrainedModel) -> None:
    model_class, advice = type(model).__name__, "arb_hf binarizes decoder-only (causal) language models"
    if getattr(model.config, "is_encoder_decoder", False):
        raise ArbCalibrationError(f"{model_class} is an encoder-decoder model; {advice}")
    flags = {getattr(module, "is_causal", None) for module in model.modules()} - {None}
    # A classifier, or a model without a head: of a decoder, if its config makes a language model and it attends as one.
    if not model.can_generate() and (flags == {False} or not writes_text(model.config.to_dict())):
        raise ArbCalibrationError(f"{model_class} does not generate text, and its backbone is no decoder's; {advice}")
    # GPT-NeoX's config says False too, but its attention is causal.
    causal = True in flags
    if field(model, "is_decoder", True) is False and not causal:
        raise ArbCalibrationError(f"{model_class} is an encoder (config.is_decoder is False); {advice}")
    if field(model, "add_cross_attention", False):
        raise ArbCalibrationError(f"{model_class} attends to an encoder (config.add_cross_attention); {advice}")


def survey(
    model: PreTrainedModel, prefix: str, layers: nn.ModuleList, config: ArbConfig, skip: Iterable[str]
) -> Coverage:
    """Say which matrices of the decoder layers are binarized, which are kept, and why; from names and shapes only.

    Args:
        prefix, layers: from :func:`find_decoder_layers`.
        skip: names of modules that stay in full precision.

    Raises:
        ArbCalibrationError: an override or a name to keep matches nothing in the model, or two overrides contradict
            each other.
    """
    skip, asked = tuple(skip), tuple(config.modules_to_not_convert or ())
    holders = Counter(id(each) for module in model.modules() for each in module.parameters(recurse=False))
    seen: set[nn.Module] = set()
    matrices = []
    for index, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if module in seen:
                continue  # several layers share it
            seen.add(module)
            why = _why_kept(name, module, layer, model)
            for matrix, shape, plain in _matrices(module):
                full = ".".join(part for part in (prefix, str(index), name, matrix) if part)
                pattern = config.keeps(full)
                reason: str | None
                if pattern is not None:
                    reason = f"overrides has {pattern!r}: None"
                elif is_skipped(full, skip):
                    reason = "in modules_to_not_convert" if is_skipped(full, asked) else "tied weight or head"
                elif why is not None:
                    reason = why
                elif not plain:
                    reason = f"used by {type(module).__name__} itself, not through a linear layer"
                elif any(holders[id(each)] > 1 for each in module.parameters(recurse=False)):
                    reason = "tied to another module's weight"
                else:
                    reason = _too_narrow(*shape)
                wish = pattern is not None or is_skipped(full, asked)
                matrices.append(Matrix(full, index, shape[0] * shape[1], reason, wish, shape[1]))
    _require_used(config, model, matrices)
    return Coverage(tuple(matrices), model.num_parameters() - sum(each.weights for each in matrices))


def _matrices(module: nn.Module) -> Iterator[tuple[str, tuple[int, int], bool]]:
    """The weight matrices a module itself holds: name below it, ``(out, in)``, whether each acts as a plain linear."""
    stacks = find_stacks(module)
    stacked = {part for name in stacks.names for part in (name, f"{name}_bias")} if stacks else set()
    if stacks:
        for number in range(stacks.count):
            yield from ((f"{number}.{name}", stacks.shape(name), True) for name in stacks.names)
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.numel() == parameter.shape[-1:].numel() or name in stacked or name.endswith("bias"):
            continue  # a vector, of any shape
        shape = (parameter.numel() // parameter.shape[-1], parameter.shape[-1])
        if name == "weight" and is_plain_linear(module):
            yield "", shape[::-1] if isinstance(module, Conv1D) else shape, True
        else:
            yield name, shape, False


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes ``x W^T + b`` and nothing else: routers and others subclass ``nn.Linear`` too."""
    if type(module) is Conv1D:
        return True
    own = type(module).forward is not nn.Linear.forward
    return isinstance(module, nn.Linear) and (not own or type(module).__name__ in PLAIN_LINEARS)


def _why_kept(name: str, module: nn.Module, layer: nn.Module, model: PreTrainedModel) -> str | None:
    """The rule that keeps a module of a decoder layer in full precision, or None."""
    parts = name.split(".") if name else []
    for depth in range(len(parts) + 1):
        above = layer.get_submodule(".".join(parts[:depth]))
        if ROUTER_CLASSES.search(type(above).__name__):
            return ROUTER
        if depth < len(parts) and ROUTER_NAMES.fullmatch(parts[depth]):
            beside = [child for child, _ in above.named_children()]
            if any("expert" in child for child in beside):
                return ROUTER
    if isinstance(module, nn.Embedding):
        return "embedding: rows are looked up, not multiplied"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    for pattern, reason in KEPT_NAMES:
        if re.search(rf"(^|\.){pattern}", name):
            return reason
    precise = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))
    if any(f".{each}." in f".{name}.weight." for each in precise):
        return "transformers keeps it in float32"
    return None


def _too_narrow(out_features: int, in_features: int) -> str | None:
    if in_features < WORD or out_features < FEWEST_OUTPUTS:
        return f"too narrow ({out_features} x {in_features}): its scales would take more than its bits would save"
    return None


def _require_used(config: ArbConfig, model: PreTrainedModel, matrices: list[Matrix]) -> None:
    """Refuse names that match nothing, and warn of overrides that decide nothing."""
    modules = [name for name, _ in model.named_modules() if name]
    names = dict.fromkeys([*modules, *(each.name for each in matrices)])
    for kept in config.modules_to_not_convert or ():
        if not any(is_skipped(name, (kept,)) for name in names):
            raise ArbCalibrationError(f"modules_to_not_convert has {kept!r}: no module{_meant(kept, names)}")
    for pattern, options in (config.overrides or {}).items():
        covered = [each for each in matrices if covers(pattern, each.name)]
        if not covered:
            if options is None and any(covers(pattern, name) for name in modules):
                continue  # kept anyway
            example = matrices[0].name if matrices else "there are none"
            raise ArbCalibrationError(
                f"overrides[{pattern!r}] covers no weight matrix of the decoder layers; their names are like {example}"
            )
        decided = [each for each in covered if select(config.overrides or {}, each.name) == pattern]
        if not decided:
            why = "more specific patterns decide for all that it covers"
        elif options is not None and all(each.kept is not None for each in decided):
            why = f"what it covers is kept in full precision ({decided[0].name}: {decided[0].kept})"
        else:
            continue
        warnings.warn(f"ArbConfig: overrides[{pattern!r}] has no effect: {why}", stacklevel=2)


def _meant(name: str, names: Iterable[str]) -> str:
    """The rest of an error about a name that matches nothing: where patterns go, or what may have been meant."""
    if any(sign in name for sign in "*?[\\^$"):
        return " has this name, and names are no patterns: those go in overrides={pattern: None}"
    ends = {".".join(parts[at:]) for parts in (each.split(".") for each in names) for at in range(len(parts))}
    near = difflib.get_close_matches(name, sorted(end for end in ends if end.count(".") == name.count(".")), 1)
    return " has this name, or one that ends in it" + (
        f"; did you mean {near[0]!r}?" if near else "; see model.named_modules()"
    )


def is_skipped(name: str, skip: Iterable[str]) -> bool:
    """Whether a skip list names a module: by its full name, one of its parents', or the end of its name."""
    return any(
        name == each or name.startswith(each + ".") or name.endswith("." + each) or f".{each}." in name for each in skip
    )
