"""Mutated checkpoints and configs are refused with ArbFormatError, or load into legal tensors; ``make fuzz`` runs longer."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.damage import damage, inspection, outcome


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False))
def test_mutated_checkpoints_are_refused_or_legal(random):
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(temporary) / "model"
        done = damage(random, folder)
        for look in (outcome, inspection):
            try:
                look(folder)
            except Exception as error:
                raise AssertionError(f"{look.__name__} of {done}: {type(error).__name__}: {error}") from error
