"""The true bits of a model: one number, or a table."""

from __future__ import annotations

from torch import nn

from .format.headers import span
from .names import kind_of
from .nn import binary_modules, int8_tables


def bits_per_weight(model: nn.Module) -> float:
    """True bits per binarized weight: every stored bit of the binary layers, bias apart, over the weights they replace.

    Raises:
        ValueError: the model has no binary layers.
    """
    forms = [module.form for module in binary_modules(model).values()]
    if not forms:
        raise ValueError("this model has no binary layers")
    return sum(form.bits() for form in forms) / sum(form.out_features * form.in_features for form in forms)


def summary(model: nn.Module) -> str:
    """A table of the binary layers by kind, of int8 embeddings and heads, and of what was kept: weights, bits, bytes.

    Printed by ``print(arb_hf.summary(model))``.
    """
    binary = binary_modules(model)
    rows: dict[str, list[int]] = {}
    spans: dict[str, list[float]] = {}
    for name, module in binary.items():
        spans.setdefault(kind_of(name), []).append(module.form.bits_per_weight())
        row = rows.setdefault(kind_of(name), [0, 0, 0])
        row[0] += 1
        row[1] += module.form.out_features * module.form.in_features
        row[2] += module.form.bits()
    inside = {
        id(parameter) for module in binary.values() for name, parameter in module.named_parameters() if name != "bias"
    }
    tables = {id(module.weight): module for module in int8_tables(model).values()}  # tied: one
    inside |= {id(module.packed[name]) for module in tables.values() for name in module.packed}
    kept = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    total, total_bits = sum(row[1] for row in rows.values()), sum(row[2] for row in rows.values())
    kept_weights = sum(parameter.numel() for parameter in kept)
    kept_bits = sum(parameter.numel() * parameter.element_size() * 8 for parameter in kept)
    lines = [f"{'kind':<28}{'layers':>8}{'weights':>14}{'bits/weight':>13}{'MB':>10}"]
    lines += [_line(kind, count, weights, bits) + span(spans[kind]) for kind, (count, weights, bits) in rows.items()]
    lines.append(_line("all binary layers", len(binary), total, total_bits))
    if tables:
        forms = [module.form for module in tables.values()]
        weights, bits = sum(form.rows * form.width for form in forms), sum(form.bits() for form in forms)
        lines.append(_line("int8 embeddings and heads", len(forms), weights, bits))
        total, total_bits = total + weights, total_bits + bits
    lines.append(
        _line("kept (norms, biases...)" if tables else "kept (embeddings, norms...)", "", kept_weights, kept_bits)
    )
    lines.append(_line("whole model", "", total + kept_weights, total_bits + kept_bits))
    return "\n".join(lines)


def _line(kind: str, count: int | str, weights: int, bits: int) -> str:
    return f"{kind:<28}{count:>8}{weights:>14,}{bits / max(weights, 1):>13.3f}{bits / 8e6:>10.2f}"
