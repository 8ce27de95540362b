"""``python -m spin_hf`` is ``spin-hf``."""

from .cli import app

app(prog_name="spin-hf")
