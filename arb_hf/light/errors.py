"""The error that also commands without torch raise; :mod:`arb_hf.errors` has it with the others."""


class ArbFormatError(ValueError):
    """A packed checkpoint is damaged, inconsistent with its config, or of a format this version does not read."""
