"""To the Hub and back: ``load`` checks what comes, ``publish`` writes what goes, ``card`` says what it is."""

from .load import from_pretrained, load_report
from .publish import push_folder, push_to_hub
from .save import save_pretrained

__all__ = ["from_pretrained", "load_report", "push_folder", "push_to_hub", "save_pretrained"]
