"""The page of a classifier: type a text, see the answer, the words and layers that make it, and what less would say."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..loading import load_classifier
from .answers import Answer, Answerer
from .page import MissingExtraError, style

if TYPE_CHECKING:
    import gradio

_NO_EXITS = (
    "This classifier has one head. To see what it would say at another depth or eta, and the depths deciding one after "
    "another, calibrate it with exits: `spin-hf calibrate BACKBONE --train TRAIN --out FOLDER --exits`, or "
    "`spin_calibrate(..., exits=True)`."
)


def make_app(
    folder: str | Path, *, device: str | None = None, backbone: str | None = None, trust_remote_code: bool = False
) -> gradio.Blocks:
    """The page of a saved classifier, not yet served: ``make_app("my-classifier").launch()``.

    Args:
        folder: of the classifier, or its Hub id.
        device: cpu, cuda, mps; the best there is by default.
        backbone: of a head-only classifier, the backbone's folder or Hub id.
        trust_remote_code: run code from the backbone's repository.

    Raises:
        MissingExtraError: without gradio.
        UserError: for a classifier that can't be loaded.
    """
    _gradio()  # before the long work
    model, tokenizer = load_classifier(str(folder), device, trust_remote_code, backbone)
    return app_of(
        Answerer(model, tokenizer), title=Path(folder).resolve().name if Path(folder).is_dir() else str(folder)
    )


def app_of(answerer: Answerer, *, title: str) -> gradio.Blocks:
    """The page of a classifier at hand; see :func:`make_app`."""
    library = _gradio()
    css = style("words.css", "answer.css")
    model, names = answerer.model, answerer.names

    def telling(function: Callable[..., Any]) -> Callable[..., Any]:
        """What can't be read is told on the page, in the words of the error."""

        @functools.wraps(function)
        def wrapped(*given: Any) -> Any:
            try:
                return function(*given)
            except (ValueError, RuntimeError) as error:  # the library's errors are among these
                raise library.Error(f"This can't be read: {error}") from error

        return wrapped

    @telling
    def read(text: str, pair: str, min_confidence: float) -> list[Any]:
        if not text.strip():
            raise library.Error("Write something first.")
        given = None if answerer.regression else min_confidence
        answer = answerer.answer(text, pair, min_confidence=given)
        shown = [answer, answer.headline]
        if not answerer.regression:
            shown.append(library.update(value=answer.row["scores"], visible=True))
        label = library.update(value=answer.label)
        return [*shown, label, answer.words_html(answer.label), answer.layers_html(answer.label)]

    def look(answer: Answer | None, label: str) -> list[Any]:
        return ["", ""] if answer is None else [answer.words_html(label), answer.layers_html(label)]

    @telling
    def change(answer: Answer | None, depth: float, eta: float, label: str) -> str:
        if answer is None:
            return ""
        return answer.change_html(depth, eta, answerer.heat_at(answer, depth, eta, label))

    app: gradio.Blocks
    with _blocks(library)(title=f"{title}: a SPIN classifier", analytics_enabled=False) as app:
        facts = f"{model.config.num_features:,} neurons are read, in {model.spin.depth} blocks of the backbone."
        library.Markdown(f"# {_plain(title)}\n{facts}")
        answer = library.State(None)
        with library.Row():
            with library.Column():
                text = library.Textbox(label="Text", lines=3, elem_id="text")
                pair = library.Textbox(label="Second text", lines=3, visible=answerer.pairs, elem_id="pair")
                sure = library.Slider(
                    0, 1, value=0, step=0.01, label="Abstain below this confidence", visible=not answerer.regression
                )
                button = library.Button("Classify", variant="primary", elem_id="classify")
            with library.Column():
                outputs = [answer, library.Textbox(label="Answer", interactive=False, elem_id="answer")]
                if not answerer.regression:
                    scores = library.Label(
                        label="Probabilities", num_top_classes=8, show_heading=False, visible=False, elem_id="scores"
                    )
                    outputs.append(scores)
        library.Markdown("## Words for and against")
        label = library.Dropdown(names, value=names[0], label="Label", visible=len(names) > 1, elem_id="label")
        words = library.HTML(elem_id="words", css_template=css)
        library.Markdown("## Layer by layer")
        layers = library.HTML(elem_id="layers", css_template=css)
        library.Markdown("## With less")
        outputs += [label, words, layers]
        reading = library.on([button.click, text.submit], read, [text, pair, sure], outputs)
        label.input(look, [answer, label], [words, layers], show_progress="hidden")
        if not answerer.depths:
            library.Markdown(_NO_EXITS, elem_id="no-exits")
            return app
        with library.Row():
            depth = _slider(library, answerer.depths, step=1, label="Blocks", elem_id="depth")
            eta = _slider(library, answerer.etas, step=0.05, label="Eta", elem_id="eta")
        less = library.HTML(elem_id="less", css_template=css)
        reading.then(change, [answer, depth, eta, label], less)
        for moved in (depth.change, eta.change, label.input):
            moved(change, [answer, depth, eta, label], less, show_progress="hidden")
    return app


def _slider(library: Any, values: Sequence[float], *, step: float, **options: Any) -> Any:
    """From the least to the largest value, where it stands at first; out of sight if there is one only."""
    first, last = (values[0], values[-1]) if len(values) > 1 else (values[0] - step, values[0])
    return library.Slider(first, last, value=last, step=step, visible=len(values) > 1, **options)


def _blocks(library: Any) -> type[gradio.Blocks]:
    """Blocks in the colours of the words: blue, since orange means against; and with enough contrast to be read."""

    class Page(library.Blocks):
        def launch(self, *args: Any, **options: Any) -> Any:
            blue = {f"button_primary_background_fill{end}": "*primary_700" for end in ("", "_dark")}
            blue |= {f"button_primary_background_fill_hover{end}": "*primary_800" for end in ("", "_dark")}
            grey = {"body_text_color_subdued": "*neutral_600", "body_text_color_subdued_dark": "*neutral_300"}
            theme = library.themes.Default(primary_hue="blue", secondary_hue="blue").set(**blue, **grey)
            return super().launch(*args, **{"theme": theme, "footer_links": [], **options})

    return Page


def _gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # the page asks no one but this process
    try:
        import gradio
    except ImportError as error:
        raise MissingExtraError("The page needs gradio. Run: pip install 'spin_hf[app]'") from error
    return gradio


def _plain(text: str) -> str:
    """A name as Markdown that shows exactly this name."""
    return "".join("\\" + c if c in "\\`*_{}[]#|~$<>&!" else c for c in text)
