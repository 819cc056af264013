"""Samples of data as a model will see them, for people: in the terminal and as a page."""

from megatron_sr1.show.page import page_of
from megatron_sr1.show.read import Found, read_samples
from megatron_sr1.show.seen import Look, Seen
from megatron_sr1.show.text import text_of

__all__ = ["Found", "Look", "Seen", "page_of", "read_samples", "text_of"]
