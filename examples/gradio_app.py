"""A page to try a classifier on; the same as ``spin-hf app FOLDER``, as a file that a Hugging Face Space can run.

    pip install "spin_hf[app]"
    python examples/quick_start.py
    python examples/gradio_app.py outputs/minilm-messages

On a Space this file is ``app.py``, ``requirements.txt`` says ``spin_hf[app]``, and the variable ``SPIN_CLASSIFIER``
names the classifier on the Hub. The folder may hold any classifier. For the sliders over depth and eta it needs exits:
``spin_calibrate(..., exits=True)``.
"""

from __future__ import annotations

import argparse
import os

from spin_hf.explain.app import make_app

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classifier", nargs="?", default=os.environ.get("SPIN_CLASSIFIER"), help="folder or Hub id")
    parser.add_argument("--port", type=int)
    options = parser.parse_args()
    if options.classifier is None:
        parser.error("name a classifier, or set SPIN_CLASSIFIER")
    make_app(options.classifier).launch(server_port=options.port)
