"""The model card of a classifier, and its way to the Hub."""

from .card import CardError, write_card
from .profile import layer_profile
from .push import PushError, push_to_hub

__all__ = ["CardError", "PushError", "layer_profile", "push_to_hub", "write_card"]
