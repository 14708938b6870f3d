"""What a run did: one record per binarized matrix, the totals, and how to write them down."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .binarize import SolveRecord
from .coverage import Coverage
from .errors import ArbFormatError
from .format.headers import span
from .names import is_hub_id

# Plots have no background of their own: text and frames are legible on a light page and on a dark one.
INK = "#737b84"
COLOURS = "cividis"  # the same order of lightness to every eye


@dataclass(frozen=True)
class MatrixRecord:
    """One binarized matrix: its full name, decoder layer, kind (:func:`arb_hf.names.kind_of`), shape and result.

    ``tokens``: calibration tokens that reached it. ``borrowed``: share of its Hessian that stands for tokens of the
    layer's other experts, because too few reached this one. ``groups``, ``salient_groups``: of its form.
    ``importance``: in a run with ``bits``, what a unit of its relative output error costs the model (:mod:`arb_hf.calibrate.sensitivity`).
    """

    name: str
    layer: int
    kind: str
    out_features: int
    in_features: int
    bits: int
    solve: SolveRecord
    tokens: int = 0
    borrowed: float = 0.0
    groups: int | None = None
    salient_groups: int | None = None
    importance: float | None = None

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    def row(self) -> dict[str, Any]:
        """Return the record flat, as a line of the CSV."""
        flat = dataclasses.asdict(self)
        return flat | flat.pop("solve")


@dataclass(frozen=True)
class TuneRecord:
    """One tuned decoder layer.

    ``before``, ``after``: its loss on held-out calibration sequences, see ``calibrate.tune.token_errors``, with the
    weights as stored. ``steps``: number of gradient steps. ``seconds``: time taken.
    """

    layer: int
    before: float
    after: float
    steps: int
    seconds: float


@dataclass(frozen=True)
class DistillRecord:
    """What distilling the predictions did.

    ``before``, ``after``: mean Kullback-Leibler divergence from the original's predictions on held-out calibration
    sequences, in nats per token, with the scales as stored. ``steps``: number of gradient steps. ``seconds``: time taken.
    """

    before: float
    after: float
    steps: int
    seconds: float


@dataclass(frozen=True)
class Measurement:
    """One quality figure of the packed model.

    Attributes:
        metric: ``"perplexity"``, ``"acc"`` or ``"acc_norm"``.
        data: name of the data set or file it was measured on.
        protocol: how, in words: ``"40 windows of 512 tokens, float32"``.
        value: figure of the packed model.
        baseline: figure of the original in full precision by the same protocol, or None.
    """

    metric: str
    data: str
    protocol: str
    value: float
    baseline: float | None = None


@dataclass
class ArbReport:
    """The record of a run, on ``model.arb_report``; kept beside a saved model as ``arb_report.json``.

    Attributes:
        config: the options used (``ArbConfig.to_dict()``).
        model: name or path of the original model.
        samples, tokens: number of calibration sequences, and of their tokens without padding.
        matrices: a record per binarized matrix, as stored.
        tuned: a record per tuned decoder layer.
        distilled: the record of the last stage, where there was one; errors in ``matrices`` are from before it.
        coverage: what was binarized and what was kept, and why.
        stages: seconds spent per stage of the run.
        versions: versions of the packages used.
        measurements: quality figures, added by :meth:`add`.
        scales_trained: whether the scales were trained afterwards; ``matrices`` and ``tuned`` describe the state before.
    """

    config: dict[str, Any]
    model: str
    samples: int
    tokens: int
    matrices: list[MatrixRecord] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    versions: dict[str, str] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    coverage: Coverage | None = None
    tuned: list[TuneRecord] = field(default_factory=list)
    distilled: DistillRecord | None = None
    scales_trained: bool = False

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ArbReport:
        """Inverse of :meth:`to_dict`; entries that a newer version added are left out.

        Raises:
            ArbFormatError: a part is missing or of another type.
        """
        try:
            return cls(
                config=dict(data["config"]),
                model=str(data["model"]),
                samples=int(data["samples"]),
                tokens=int(data["tokens"]),
                matrices=[_matrix(row) for row in data["matrices"]],
                stages=defaultdict(float, data["stages"]),
                versions=dict(data["versions"]),
                measurements=[_known(Measurement, each) for each in data.get("measurements", [])],
                coverage=Coverage.from_dict(data["coverage"]) if data.get("coverage") else None,
                tuned=[_known(TuneRecord, each) for each in data.get("tuned", [])],
                distilled=_known(DistillRecord, data["distilled"]) if data.get("distilled") else None,
                scales_trained=bool(data.get("scales_trained")),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ArbFormatError(f"not a report of an arb_hf run: {type(error).__name__}: {error}") from error

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> ArbReport:
        """Read what :meth:`to_json` wrote.

        Raises:
            ArbFormatError: the file is not such a report.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ArbFormatError(f"{path}: not JSON ({error})") from error
        return cls.from_dict(data)

    def add(self, measurement: Measurement) -> None:
        """Add a quality figure, replacing an earlier one of the same metric, data and protocol."""
        key = (measurement.metric, measurement.data, measurement.protocol)
        self.measurements = [each for each in self.measurements if (each.metric, each.data, each.protocol) != key]
        self.measurements.append(measurement)

    @property
    def bits_per_weight(self) -> float:
        """All stored bits of the binarized matrices over the weights they replace."""
        return _bits_per_weight(self.matrices)

    @property
    def output_error(self) -> float:
        """Mean relative output error of the matrices that have one."""
        return _mean_error(self.matrices)

    @property
    def tuned_layers(self) -> list[TuneRecord]:
        """Records of the decoder layers that took steps: with too little data a layer has a record without steps."""
        return [each for each in self.tuned if each.steps]

    @property
    def held_out_loss(self) -> tuple[float, float] | None:
        """Mean loss of the tuned decoder layers on held-out calibration text, before and after; None without any."""
        count = len(self.tuned_layers)
        if not count:
            return None
        return sum(each.before for each in self.tuned_layers) / count, sum(
            each.after for each in self.tuned_layers
        ) / count

    @property
    def starved(self) -> list[MatrixRecord]:
        """Matrices of experts that too few calibration tokens reached: they borrowed from the others' tokens."""
        return [each for each in self.matrices if each.borrowed > 0]

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
            "measurements": [dataclasses.asdict(each) for each in self.measurements],
            "coverage": None if self.coverage is None else self.coverage.to_dict(),
            "starved": len(self.starved),
            "tuned": [dataclasses.asdict(each) for each in self.tuned],
            "distilled": None if self.distilled is None else dataclasses.asdict(self.distilled),
            "scales_trained": self.scales_trained,
            "matrices": [each.row() for each in self.matrices],
        }

    def published(self, config: Mapping[str, Any]) -> ArbReport:
        """The report to store with the model: the options as ``config`` has them, without paths of the maker's computer."""
        return dataclasses.replace(
            self,
            config={key: value for key, value in config.items() if key != "modules"},
            model=self.model if is_hub_id(self.model) else os.path.basename(os.path.normpath(self.model)),
        )

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
        """Output error by decoder layer, a row per kind of matrix, to an image file; bits per weight too, if they differ.

        Raises:
            ImportError: matplotlib is not installed.
        """
        kinds = self.by_kind()
        maps = [
            ("relative output error" + (", before scales were trained" if self.scales_trained else ""), _mean_error)
        ]
        if any(span([_bits_per_weight([each]) for each in records]) for records in kinds.values()):
            maps.append(("bits per weight", _bits_per_weight))
        figure = _figure(height=1 + (0.6 + 0.3 * len(kinds)) * len(maps))
        figure.suptitle(f"{self.model}: {self.config['method']}, {self.bits_per_weight:.2f} bits per weight", color=INK)
        for axes, (title, value) in zip(figure.subplots(len(maps), 1, squeeze=False)[:, 0], maps, strict=True):
            _draw_map(figure, axes, kinds, value)
            axes.set_title(title, fontsize="medium", loc="left", color=INK)
        axes.set_xlabel("decoder layer", color=INK)
        figure.savefig(path, dpi=150, transparent=True)

    def by_kind(self) -> dict[str, list[MatrixRecord]]:
        """The records by kind of matrix (``self_attn.q_proj``, ...), in order of first appearance."""
        kinds: dict[str, list[MatrixRecord]] = {}
        for record in self.matrices:
            kinds.setdefault(record.kind, []).append(record)
        return kinds

    def errors_by_kind(self) -> dict[str, float]:
        """Mean relative output error by kind of matrix; 0 for a kind that has none."""
        return {kind: _mean_error(records) for kind, records in self.by_kind().items()}

    def table(self) -> str:
        """A table by kind of matrix: count, shape, mean output error, bits per weight and, where they differ, their span."""
        lines = [f"{'kind':<28}{'count':>6}{'shape':>16}{'output error':>14}{'bits/weight':>13}"]
        for kind, records in self.by_kind().items():
            errors = [each.solve.output_error for each in records if each.solve.output_error is not None]
            error = f"{sum(errors) / len(errors):.4f}" if errors else "-"
            shape = f"{records[0].out_features} x {records[0].in_features}"
            bits = _bits_per_weight(records)
            differ = span([_bits_per_weight([each]) for each in records])
            lines.append(f"{kind:<28}{len(records):>6}{shape:>16}{error:>14}{bits:>13.3f}{differ}")
        lines.append(
            f"{'all':<28}{len(self.matrices):>6}{'':>16}{self.output_error:>14.4f}{self.bits_per_weight:>13.3f}"
        )
        if self.held_out_loss:
            before, after = self.held_out_loss
            lines.append(f"tuned: {len(self.tuned_layers)} decoder layers, held-out loss {before:.4f} -> {after:.4f}")
        if self.distilled:
            before, after = self.distilled.before, self.distilled.after
            lines.append(
                f"distilled: divergence of held-out predictions {before:.4f} -> {after:.4f}, errors above from before"
            )
        if self.scales_trained:
            lines.append("scales trained afterwards: the errors above are from before")
        return "\n".join(lines)


def plot_comparison(reports: Mapping[str, ArbReport], path: str | os.PathLike) -> None:
    """Mean output error by decoder layer and by kind of matrix, a colour per run, to an image file.

    Args:
        reports: reports of the runs, by the names in the legend.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure()
    layers, kinds = figure.subplots(2, 1)
    names = list(dict.fromkeys(kind for report in reports.values() for kind in report.by_kind()))
    width = 0.8 / len(reports)
    for index, (label, report) in enumerate(reports.items()):
        by_layer = _by_layer(report.matrices)
        text = f"{label}: {report.config['method']}, {report.bits_per_weight:.2f} bits per weight"
        layers.plot(list(by_layer), [_mean_error(each) for each in by_layer.values()], marker=".", label=text)
        by_kind = report.by_kind()
        kinds.bar(
            [position + index * width for position in range(len(names))],
            [_mean_error(by_kind.get(name, [])) for name in names],
            width,
        )
    layers.set(xlabel="decoder layer", ylabel="mean relative output error")
    layers.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1))
    kinds.set(ylabel="mean relative output error")
    kinds.set_xticks([position + 0.4 - width / 2 for position in range(len(names))], names, fontsize="small")
    for axes in (layers, kinds):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def _draw_map(figure: Any, axes: Any, kinds: dict[str, list[MatrixRecord]], value: Callable[..., float]) -> None:
    """A row per kind of matrix, a column per decoder layer; at the right of each row its mean error and its bits."""
    last = max(record.layer for records in kinds.values() for record in records)
    grid = [[math.nan] * (last + 1) for _ in kinds]
    for row, records in zip(grid, kinds.values(), strict=True):
        for layer, each in _by_layer(records).items():
            row[layer] = value(each)
    image = axes.imshow(grid, aspect="auto", cmap=COLOURS, interpolation="none")
    bar = figure.colorbar(image, ax=axes, pad=0.17, aspect=12)
    axes.set_yticks(range(len(kinds)), kinds)
    for place, records in enumerate(kinds.values()):
        text = f"{_mean_error(records):.4f}, {_bits_per_weight(records):.2f} bits"
        axes.annotate(text, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize="small", color=INK)
    for part in (axes, bar.ax):
        part.tick_params(colors=INK, length=0, labelsize="small")
    for frame in (*axes.spines.values(), bar.outline):
        frame.set_visible(False)


def _figure(height: float = 6) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'arb_hf[plot]'") from error
    return Figure(figsize=(9, height), layout="constrained")


def _by_layer(records: Sequence[MatrixRecord]) -> dict[int, list[MatrixRecord]]:
    layers: dict[int, list[MatrixRecord]] = defaultdict(list)
    for record in records:
        layers[record.layer].append(record)
    return layers


def _bits_per_weight(records: Sequence[MatrixRecord]) -> float:
    return sum(each.bits for each in records) / max(sum(each.weights for each in records), 1)


def _mean_error(records: Sequence[MatrixRecord]) -> float:
    errors = [each.solve.output_error for each in records if each.solve.output_error is not None]
    return sum(errors) / len(errors) if errors else 0.0


def _known(record: Any, entries: dict[str, Any]) -> Any:
    """Make a dataclass from those entries that are its fields."""
    return record(**{each.name: entries[each.name] for each in dataclasses.fields(record) if each.name in entries})


def _matrix(row: dict[str, Any]) -> MatrixRecord:
    return _known(MatrixRecord, row | {"solve": _known(SolveRecord, row)})


def _written(text: str, path: str | os.PathLike | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text
