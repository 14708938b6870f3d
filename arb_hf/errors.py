"""What users catch.

Errors of format and calibration are ``ValueError``s, so that code unaware of this package still sees an ordinary error.
"""


class ArbFormatError(ValueError):
    """A packed checkpoint is damaged, inconsistent with its config, or of a format this version does not read."""


class ArbCalibrationError(ValueError):
    """A model cannot be binarized: unusable text, non-finite weights or activations, no decoder layers."""


class ArbUploadError(RuntimeError):
    """A push to the Hub failed. What was to be pushed is whole on disk, and the message says how to go on."""
