"""Which matrices of a model are binarized, which are kept, and why: stated before calibration."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

from .errors import ArbCalibrationError
from .names import kind_of


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of a decoder layer.

    ``name``: of its module (of an expert: as it will be called). ``layer``: which decoder layer. ``kept``: why it stays
    in full precision, None if it is binarized. ``asked``: it is kept because the config says so. ``in_features``: its
    inputs.
    """

    name: str
    layer: int
    weights: int
    kept: str | None = None
    asked: bool = False
    in_features: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        return self.weights // max(self.in_features, 1), self.in_features


@dataclass(frozen=True)
class Table:
    """The input embedding or the head.

    ``kept``: why it keeps the model's type, None if it is stored as int8. ``weights``: 0 for one that is tied to another,
    which counts them.
    """

    name: str
    weights: int
    kept: str | None = None


@dataclass(frozen=True)
class Coverage:
    """All weight matrices of the decoder layers, and the number of weights outside them (embeddings, heads, norms).

    ``tables``: the embedding and the head.
    """

    matrices: tuple[Matrix, ...]
    outside: int
    tables: tuple[Table, ...] = ()

    @property
    def weights(self) -> int:
        """Matrix weights in the decoder layers."""
        return sum(each.weights for each in self.matrices)

    @property
    def binarized(self) -> int:
        """Matrix weights in the decoder layers that are binarized."""
        return sum(each.weights for each in self.matrices if each.kept is None)

    @property
    def share(self) -> float:
        """Binarized weights over matrix weights of the decoder layers."""
        return self.binarized / max(self.weights, 1)

    def to_binarize(self) -> list[Matrix]:
        """The matrices that are binarized."""
        return [each for each in self.matrices if each.kept is None]

    def keeping(self, names: Collection[str], reason: str) -> Coverage:
        """Return the same coverage with some of the binarized matrices kept after all."""
        changed = set(names)
        matrices = (
            replace(each, kept=reason) if each.kept is None and each.name in changed else each for each in self.matrices
        )
        return replace(self, matrices=tuple(matrices))

    def require(self, minimum: float) -> None:
        """Stop a run that would leave too much of the decoder layers in full precision without being asked to.

        Raises:
            ArbCalibrationError: nothing can be binarized, or less than ``minimum`` of what was not asked to be kept.
        """
        if not self.binarized:
            raise ArbCalibrationError(f"no weight matrix of the decoder layers can be binarized\n{self.table()}")
        considered = self.weights - sum(each.weights for each in self.matrices if each.asked)
        if self.binarized < minimum * considered:
            raise ArbCalibrationError(
                f"only {self.binarized / considered:.1%} of the decoder layers' matrix weights can be binarized, "
                f"minimum_coverage is {minimum:.0%}; lower it to go on\n{self.table()}"
            )

    def groups(self) -> list[tuple[str, str | None, int, int]]:
        """Kind, reason, count and weights of matrices that are alike, in order of first appearance."""
        found: dict[tuple[str, str | None], list[int]] = {}
        for each in self.matrices:
            group = found.setdefault((kind_of(each.name), each.kept), [0, 0])
            group[0] += 1
            group[1] += each.weights
        return [(kind, kept, count, weights) for (kind, kept), (count, weights) in found.items()]

    def table(self) -> str:
        """A line per kind of matrix with its share of the decoder layers' matrix weights, and its fate."""
        width = max([28, *(len(kind_of(each.name)) for each in self.matrices)]) + 2
        lines = [f"{'kind':<{width}}{'count':>8}{'weights':>16}{'share':>8}  what becomes of it"]
        for kind, kept, count, weights in self.groups():
            fate = "binarized" if kept is None else f"kept: {kept}"
            lines.append(f"{kind:<{width}}{count:>8}{weights:>16,}{weights / max(self.weights, 1):>8.1%}  {fate}")
        lines.append(f"{'binarized':<{width}}{'':>8}{self.binarized:>16,}{self.share:>8.1%}")
        for each in self.tables:
            fate = "int8, with a scale for each row" if each.kept is None else f"kept: {each.kept}"
            lines.append(f"{each.name:<{width}}{'':>8}{each.weights:>16,}{'':>8}  {fate}")
        rest = self.outside - sum(each.weights for each in self.tables)
        others = "others outside the layers" if self.tables else "outside the decoder layers"
        lines.append(f"{others:<{width}}{'':>8}{rest:>16,}{'':>8}  kept")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the totals and every matrix, ready for JSON."""
        return {
            "share": self.share,
            "weights": self.weights,
            "binarized": self.binarized,
            "outside": self.outside,
            "tables": [asdict(each) for each in self.tables],
            "matrices": [asdict(each) for each in self.matrices],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Coverage:
        """Inverse of :meth:`to_dict`."""
        tables = tuple(Table(**each) for each in data.get("tables", ()))
        return cls(tuple(Matrix(**each) for each in data["matrices"]), int(data["outside"]), tables)
