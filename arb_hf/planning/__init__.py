"""What a run would give, without calibrating: ``skeleton`` makes the model without weights, ``plan`` says what becomes of it.

``files`` computes the sizes of its weight files, ``duration`` estimates the time. No weight is read or downloaded.
"""

from .plan import ModelPlan, plan

__all__ = ["ModelPlan", "plan"]
