"""The model card of a classifier, and its way to the Hub."""

from .card import CardError, write_card
from .push import PushError, push_to_hub

__all__ = ["CardError", "PushError", "push_to_hub", "write_card"]
