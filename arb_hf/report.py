"""What a run did: one record per binarized matrix, the totals, and how to write them down."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .binarize import SolveRecord


@dataclass(frozen=True)
class MatrixRecord:
    """One binarized matrix: its full name, decoder layer, kind (the name within the layer), shape and result."""

    name: str
    layer: int
    kind: str
    out_features: int
    in_features: int
    bits: int
    solve: SolveRecord

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    def row(self) -> dict[str, Any]:
        """Flat form, a line of the CSV."""
        flat = dataclasses.asdict(self)
        return flat | flat.pop("solve")


@dataclass
class ArbReport:
    """The record of a run, on ``model.arb_report``.

    Attributes:
        config: the options used (``ArbConfig.to_dict()``).
        model: name or path of the original model.
        samples, tokens: calibration sequences and their tokens, padding apart.
        matrices: a record per binarized matrix.
        stages: seconds spent per stage of the run.
        versions: of the packages that took part.
    """

    config: dict[str, Any]
    model: str
    samples: int
    tokens: int
    matrices: list[MatrixRecord] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """All stored bits of the binarized matrices over the weights they replace."""
        return sum(each.bits for each in self.matrices) / max(sum(each.weights for each in self.matrices), 1)

    @property
    def output_error(self) -> float:
        """Mean relative output error of the matrices that have one."""
        errors = [each.solve.output_error for each in self.matrices if each.solve.output_error is not None]
        return sum(errors) / len(errors) if errors else 0.0

    @property
    def seconds(self) -> float:
        return sum(self.stages.values())

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "config": self.config,
            "samples": self.samples,
            "tokens": self.tokens,
            "bits_per_weight": self.bits_per_weight,
            "output_error": self.output_error,
            "seconds": self.seconds,
            "stages": dict(self.stages),
            "versions": self.versions,
            "matrices": [each.row() for each in self.matrices],
        }

    def to_json(self, path: str | os.PathLike | None = None) -> str:
        """The whole record as JSON; also written to ``path`` if given."""
        return _written(json.dumps(self.to_dict(), indent=2) + "\n", path)

    def to_csv(self, path: str | os.PathLike | None = None) -> str:
        """A line per matrix; also written to ``path`` if given."""
        buffer = io.StringIO()
        names = [f.name for f in dataclasses.fields(MatrixRecord) if f.name != "solve"]
        names += [f.name for f in dataclasses.fields(SolveRecord)]
        writer = csv.DictWriter(buffer, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(each.row() for each in self.matrices)
        return _written(buffer.getvalue(), path)

    def plot(self, path: str | os.PathLike) -> None:
        """Output error and bits per weight by decoder layer, a line per kind of matrix, to an image file.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("report.plot() needs matplotlib: pip install 'arb_hf[plot]'") from error
        figure = Figure(figsize=(9, 6), layout="constrained")
        errors, bits = figure.subplots(2, 1, sharex=True)
        for kind, records in self.by_kind().items():
            layers = [each.layer for each in records]
            errors.plot(layers, [each.solve.output_error or 0.0 for each in records], marker=".", label=kind)
            bits.plot(layers, [each.solve.bits_per_weight for each in records], marker=".", label=kind)
        errors.set(
            ylabel="relative output error",
            title=f"{self.model}: {self.config['method']}, {self.bits_per_weight:.2f} bits per weight",
        )
        errors.legend(fontsize="small", ncols=2)
        bits.set(xlabel="decoder layer", ylabel="bits per weight")
        for axes in (errors, bits):
            axes.grid(alpha=0.3)
        figure.savefig(path, dpi=150)

    def by_kind(self) -> dict[str, list[MatrixRecord]]:
        """The records by kind of matrix (``self_attn.q_proj``, ...), in order of first appearance."""
        kinds: dict[str, list[MatrixRecord]] = {}
        for record in self.matrices:
            kinds.setdefault(record.kind, []).append(record)
        return kinds

    def table(self) -> str:
        """A table by kind of matrix: count, shape, mean output error, bits per weight."""
        lines = [f"{'kind':<28}{'count':>6}{'shape':>16}{'output error':>14}{'bits/weight':>13}"]
        for kind, records in self.by_kind().items():
            errors = [each.solve.output_error for each in records if each.solve.output_error is not None]
            error = f"{sum(errors) / len(errors):.4f}" if errors else "-"
            shape = f"{records[0].out_features} x {records[0].in_features}"
            bits = sum(each.bits for each in records) / sum(each.weights for each in records)
            lines.append(f"{kind:<28}{len(records):>6}{shape:>16}{error:>14}{bits:>13.3f}")
        lines.append(
            f"{'all':<28}{len(self.matrices):>6}{'':>16}{self.output_error:>14.4f}{self.bits_per_weight:>13.3f}"
        )
        return "\n".join(lines)


def _written(text: str, path: str | os.PathLike | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text
