"""What a name says: the kind of a matrix, and whether a model is meant on the Hub. Standard library only."""

from __future__ import annotations

import os
import re

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def kind_of(name: str) -> str:
    """The kind of a matrix: its name within the decoder layer, with a star for an expert's number.

    ``model.layers.3.mlp.experts.7.down_proj`` is a ``mlp.experts.*.down_proj``.
    """
    inside = re.split(r"(?:^|\.)\d+\.", name, maxsplit=1)[-1]
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", inside)


def is_hub_id(name: str) -> bool:
    """Whether ``name`` reads as ``owner/name`` on the Hub and is no folder here."""
    return HUB_ID.fullmatch(name) is not None and not os.path.isdir(name)
