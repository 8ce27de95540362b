from .cli import app

app(prog_name="spin-hf")
