"""``spin_calibrate``: extract, probe, select, fit the head."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from ..attention import ATTENTION
from ..depth import nearest_depth
from ..features import FeatureGroup
from ..modeling_spin import SpinForSequenceClassification
from ..modes import full_precision
from ..taps import Tap, model_device, tap_width
from .cache import key_of, known_batching, open_store
from .errors import CalibrationError, demand_between, demand_whole
from .exits import check_exits, fit_exits
from .extraction import Encoded, check_tokenizer, encode, extract, fingerprint, plan_batches
from .fingerprint import tokenizer_fingerprint
from .fits import Fits
from .folds import check_sample_weight, prepare
from .heads import HeadFitter
from .independence import find_batching
from .limits import check_fresh, depths_to_try, taps_to_read, token_limit
from .probes import Labelled, probe_bytes
from .progress import Clock, shown
from .ranks import Ranks, ending_together
from .recipe import Preset, Recipe
from .result import CalibrationResult
from .selection import PREFERENCES, Prefer
from .stages import conclude, probe_all, settle, try_heads
from .store import required_bytes
from .task import Metric, Task
from .token_states import Texts, learning_rows, states_bytes, states_place
from .token_weights import PARTS, can_weigh, learn_queries
from .windowing import check_window_options, make_windows


@ending_together
def spin_calibrate(
    model: SpinForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    train: Any,
    eval: Any = None,
    *,
    text_column: str | Sequence[str] | None = None,
    label_column: str | None = None,
    cv: int | None = None,
    validation_fraction: float | None = None,
    metric: str | Metric | None = None,
    class_weight: Literal["balanced"] | Mapping[Any, float] | None = None,
    sample_weight: Sequence[float] | None = None,
    multiclass: Literal["multinomial", "ovr"] = "multinomial",
    preset: Preset = "default",
    prefer: Prefer | None = None,
    kinds: Sequence[str] | None = None,
    poolings: Sequence[str] | None = None,
    Cs: int | Sequence[float] | None = None,
    etas: Sequence[float] | None = None,
    depths: Sequence[int] | None = None,
    max_features: int | None = None,
    max_depth: int | None = None,
    max_length: int | None = None,
    windows: bool = False,
    overlap: int | None = None,
    exits: bool = False,
    batch_tokens: int = 4096,
    tol: float = 1e-4,
    cache_dir: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    recalibrate: bool = False,
) -> CalibrationResult:
    """Make a classifier of a wrapped backbone. **Changes the model in place**: features, head, labels and depth.

    Every tap of the backbone is read once per text and pooled; each (tap, pooling) gets a path of sparse probes; the
    neurons that carry the label are selected; a linear head is fitted on each candidate set; the best by ``metric`` on
    the evaluation rows is written into the model, and the blocks above it are removed. The backbone's weights stay.
    On those rows a temperature is fitted too, if it helps: the result's ``confidence`` says how far to trust the model.

    Under ``accelerate launch`` every process makes this same call, the model on a device of its own
    (``model.to(accelerate.PartialState().device)``); they share the work, and all end with the model and the result
    that one process would have made. Autocast has no effect here: a backbone is read in the dtype it was loaded with.

    Args:
        model: from ``SpinForSequenceClassification.from_backbone``.
        tokenizer: the backbone's, with a pad token. Its ``model_max_length`` becomes the number of tokens a text is cut
            to here, so that ``pipeline(..., truncation=True)`` cuts alike; with ``windows`` there is none.
        train: ``datasets.Dataset`` or a stream of it, pandas frame, dict of columns, list of dicts, a pair (texts,
            labels), or a name: a csv, tsv, json, jsonl or parquet file, a folder of them, or ``NAME[/CONFIG][:SPLIT]``
            on the Hub. Of splits (``DatasetDict``) those for training and validation are found by name.
        eval: likewise; decides every choice. Without it the validation split of ``train`` does, or else ``cv`` folds of
            ``train``, or a part of it held out. Where none of these is asked for, five folds of fewer than 1,000 rows
            (as many as the rarest class has rows), or a fifth of more.
        text_column: column of the texts, or two columns for sentence pairs; found by common names otherwise.
        label_column: column of the labels; found by common names otherwise.
        cv: number of folds for cross-validation, without ``eval``; the final probes and head use all rows.
        validation_fraction: the part of ``train`` that is held out to choose by, without ``eval`` and ``cv``, however
            few the rows are.
        metric: ``accuracy`` (default), ``macro_f1``, ``micro_f1`` (default for multi-label), ``matthews``, ``r2``
            (default for regression), or a function of (labels, predictions).
        class_weight: ``"balanced"`` or a dict of label to weight. For multi-label the weight of a label's presence.
        sample_weight: one positive weight per row of ``train``.
        multiclass: ``"multinomial"`` or ``"ovr"`` (one-vs-rest), for more than two classes.
        preset: ``"default"``, or ``"paper"``: the rules of SPIN (Jiao et al. 2024, Tables 7 and 8), solved to
            convergence: one kind, one pooling and one C for all layers, its grids of C and eta, raw features, an L1
            head, full depth. Candidates above ``max_features`` are left out, as in the default; the result counts
            them. Where the authors' code
            differs from their text we follow

            - the code in salience: the squared weight (text: the normalised absolute weight);
            - the code in the head: L1, with the C of the probes (text: no penalty);
            - the text in the probes: every layer at the C in question (code: whichever C finished last);
            - neither in the solver: all solutions converge (code: SAGA stopped early).
        prefer: ``"score"``: the best score, candidates within half a paired standard error of it counting as tied and
            going by their loss; ``"compact"``: the smallest candidate within one standard error of that one; or
            ``"widest"``: one head, of the largest eta at the greatest depth, on all that the probes keep. Without
            ``exits`` no other is fitted. Where that is more than ``max_features``, and where a preset may not
            combine, it becomes ``"score"``; the settings of the result tell. It is the default where fewer than
            1,000 rows are cross-validated, since the best of hundreds of scores on so few is mostly luck; elsewhere
            that is ``"score"``. (Of so few rows a neuron's variance counts as that of the rows and of ten more of the
            layer's median, as one that hardly moves in them may be a hundred times as high in the next text.)
        kinds: of ``hidden`` and ``ffn``; both by default.
        poolings: of ``mean``, ``max``, ``first``, ``last`` and ``attention``. The default, ``attention``, weighs the
            tokens: it learns one vector for each hidden tap, which the next block's FFN neurons share, from the labels,
            with the backbone frozen, for the price of one more forward and a few passes over its states; see
            :mod:`spin_hf.calibration.token_weights`. Under cross-validation, and for a backbone that works on other
            positions than its tokens, the default is mean and max.
        Cs: grid of C for the probes, or how many values to try, each twice the last, starting from each probe's own
            smallest useful value (default 10; a path ends when two in a row bring nothing).
        etas: shares of salience to try; none at all (``[]``) leaves the single probes.
        depths: numbers of blocks to try; by default two, three, four and five fifths of them.
        max_features: most features a candidate may have (default 3072).
        max_depth: most blocks the classifier may run.
        max_length: tokens per text, or of a window; by default what tokenizer and backbone allow.
        windows: read texts that are longer in overlapping windows, here and in use, instead of cutting them. Each token
            is pooled once, in the window where it stands farther from the end; see :mod:`spin_hf.windows`.
        overlap: tokens that neighbouring windows share at least; by default a quarter of a window.
        exits: keep a head for every depth and eta that was tried with the chosen kinds and poolings too, and the blocks
            that the deepest of them needs. ``model.config.exits`` lists them; ``model(..., exit=0)`` answers with one,
            ``model(..., output_exits=True)`` with all, and ``model.keep_exit(0)`` leaves it alone. What the model
            answers by default stays the same, to the bit, but costs those blocks.
        batch_tokens: padded tokens per batch of the extraction. Windows of a longer text run up to 4096 tokens at once.
        tol: relative duality gap of the final head, and of every probe that neurons are chosen by. Which value of C
            is a probe's best is told by rougher solutions; that one is solved to ``tol``.
        cache_dir: keep features, probes and heads here, so that a run that was stopped goes on where it was, and one
            with other labels or settings on the same texts does not extract again; but under ``attention`` features
            come from the labels. For processes on several machines, on a file system that they share.
        seed: of the split, folds and bootstrap.
        progress: show bars, estimates and the disk needed, on standard error.
        recalibrate: choose neurons and head anew, in the blocks there are, for a model whose backbone was trained or
            got an adapter since its calibration. Its labels stay; all else, as ``windows``, is as this call says.

    Returns:
        The record of what was tried and kept.

    Raises:
        CalibrationError: one of its kinds, before long work, for data, labels, tokenizer or options that don't fit,
            or a ``cache_dir`` that another calibration is filling; :class:`~spin_hf.calibration.errors.RankError` when
            another process of the launch failed.
    """
    started = time.perf_counter()
    clock, ranks = Clock(), Ranks.here()
    recipe = Recipe.make(
        preset,
        kinds=kinds,
        poolings=poolings,
        Cs=Cs,
        etas=etas,
        depths=depths,
        max_features=max_features,
        max_depth=max_depth,
    )
    if prefer is not None and prefer not in PREFERENCES:
        raise CalibrationError(f"prefer must be one of {', '.join(PREFERENCES)}; got {prefer!r}.")
    check_exits(exits, recipe)
    asked = poolings is not None and ATTENTION in recipe.poolings
    if asked and cv is not None:
        raise CalibrationError(
            "Token weights are learned once, so folds that evaluate would have been learned from. With the pooling "
            "attention give eval, or leave cv out: then a part of train is held out."
        )
    check_fresh(model, recalibrate=recalibrate)
    ranks.check_place({parameter.device for parameter in model.spin.backbone.parameters()})
    demand_whole("batch_tokens", batch_tokens, least=1)
    demand_between("tol", tol, 0, 1)
    if max_length is not None:
        demand_whole("max_length", max_length, least=0)
    check_window_options(windows, overlap)
    check_tokenizer(tokenizer, model)
    blocks = model.spin.depth
    tried_depths = depths_to_try(model, recipe, whole=preset == "paper" and not (depths or max_depth))
    columns = {"text_column": text_column, "label_column": label_column}
    prepared = prepare(model, train, eval, cv, validation_fraction, seed, may_cross=not asked, **columns)
    if ATTENTION in recipe.poolings and prepared.crossed:
        recipe = recipe.without_token_weights()
    rows, names, labels, refit = prepared.rows, prepared.names, prepared.labels, prepared.refit
    limit = token_limit(max_length, tokenizer, model)
    cut = make_windows(tokenizer, limit, overlap, pairs=rows.pairs is not None) if windows else None
    task = Task.make(model.config.problem_type, names, metric, multiclass)
    weights = check_sample_weight(sample_weight, prepared.trained, len(rows))
    class_weights = task.class_weights(labels[refit], class_weight)
    row_weights = task.row_weights(labels, class_weights, weights)
    data = Labelled(task, labels, task.targets(labels), row_weights, prepared.folds, refit)
    prefer = prefer or ("widest" if data.few and preset == "default" else "score")
    taps = taps_to_read(model, recipe, tried_depths[-1])
    with (
        full_precision(model_device(model)),  # no fingerprint would tell what is read under autocast
        full_precision(torch.device("cpu")),
        shown(progress and ranks.main) as show,
    ):
        with clock("tokenize"):
            encoded = encode(tokenizer, rows.texts, rows.pairs, limit, cut)
        count, paired, evaluated = len(rows), rows.pairs is not None, prepared.evaluated
        del prepared, rows  # of a data set that lies in a file, the texts in memory are ours
        last = model.spin.taps[-1]  # also where no candidate may use it: the baseline is what a usual classifier reads
        read = taps if last in taps else [*taps, last]
        pad = int(tokenizer.pad_token_id)
        if ATTENTION in recipe.poolings and not asked:
            one = encoded.samples(1)
            if not ranks.on_main(lambda: can_weigh(model.spin, read, one, pad)):
                recipe = recipe.without_token_weights()
        weighted = ATTENTION in recipe.poolings
        widths = {tap: tap_width(model.spin.backbone, model.spin.layout, tap) for tap in read}
        show.say(
            f"{count:,} texts, {sum(encoded.lengths):,} tokens, {len(taps)} taps, {len(recipe.poolings)} poolings: "
            f"{required_bytes(widths, recipe.poolings, count) / 1e6:,.0f} MB of disk, "
            f"{probe_bytes(max(widths.values()), count, len(data.fits())) / 1e6:,.0f} MB of memory for a probe."
        )
        if weighted:
            needed = states_bytes(model.spin, read, encoded) / 1e6
            place = states_place(model.spin, read, encoded)
            show.say(f"{needed:,.0f} MB more of {place} while token weights are learned.")
        key = ""
        if cache_dir is not None or ranks.count > 1:
            key = fingerprint(model.spin, encoded, read, recipe.poolings, batch_tokens)
        ranks.agree(
            (key, data.fingerprint(), asdict(recipe), prefer, bool(exits)),
            "The processes of this launch don't hold the same backbone, texts, labels and options. Load and shuffle "
            "alike in all of them, with a seed.",
        )
        learned = ""
        if weighted:  # from the labels, by this version of torch on this kind of device
            of_labels = data.fingerprint(choosing=False)
            held = ranks.on_main(lambda: states_bytes(model.spin, read, encoded))
            learned = f"{of_labels} {seed} {torch.__version__} {model_device(model).type} {held}"
        with clock("extract"):
            known = known_batching(cache_dir, key, learned) if ranks.main else None
            find = partial(find_batching, model.spin, read, encoded.samples(6), pad)
            model.config.batching = ranks.on_main(lambda: known or find())
        planned = plan_batches(encoded.lengths, batch_tokens, model.config.batching)
        batches = [np.asarray(batch, dtype=np.int32) for batch in planned]
        del planned  # lists of numbers take ten times as much
        about = {"backbone": model.config.backbone_id, "texts": count, "tokens": sum(encoded.lengths)}
        about["batching"] = model.config.batching
        with open_store(
            cache_dir,
            key=key_of(key, model.config.batching, learned),
            ranks=ranks,
            widths=widths,
            poolings=recipe.poolings,
            batches=batches,
            about=about,
        ) as (store, missing):
            queries: dict[Tap, torch.Tensor] = {}
            weighed: list[int] = []
            if weighted:
                texts = Texts(encoded, data, pad, model.config.batching, batch_tokens)
                weighed = ranks.on_main(lambda: [len(rows) for rows in learning_rows(model.spin, read, texts, seed)])
                if sum(weighed) < count:
                    show.say(f"Token weights are learned from {weighed[0]:,} texts and chosen on {weighed[1]:,}.")
                with clock("token weights"), show.bar("Weighting tokens", PARTS) as advance:
                    learn = partial(learn_queries, model.spin, read, texts, store.folder, seed=seed, advance=advance)
                    kept = Fits(None if cache_dir is None else store.folder, torch.device("cpu"))
                    found = ranks.on_main(lambda: kept.keep("queries", (), learn))
                    queries = dict(zip(read, found, strict=True))
            with clock("extract"), show.bar("Reading the backbone", sum(encoded.lengths)) as advance, ranks.together():
                advance(sum(encoded.lengths) - sum(encoded.lengths[row] for i in missing for row in batches[i]))
                extract(model.spin, encoded, store, ranks.share(missing), pad, ranks.counted(advance), queries)
            split = sum(map(len, ranks.gather(store.split)))
            device = _solver_device(model)
            fits = Fits(None, device)
            if cache_dir is not None and not callable(metric):
                fits = Fits.beside(store.folder, data.fingerprint(), device)
            with clock("probe"):
                probes = probe_all(taps, store, data, recipe, tol, fits, ranks, show)
            with clock("heads"):
                fitter = HeadFitter(store, data, device, penalty=recipe.head)
                prefer, whole = settle(prefer, probes, recipe, tried_depths, show)
                only = None if exits else whole
                tried, skipped = try_heads(fitter, probes, recipe, tried_depths, tol, fits, ranks, show, only=only)
                choose = partial(conclude, fitter, tried, probes, prefer=prefer, tol=tol, seed=seed, last=last)
                choice = ranks.on_main(choose)
            fitted = None
            if exits:
                with clock("exits"):
                    chosen = choice.final.candidate
                    fitted = fit_exits(fitter, tried, chosen, recipe, tol, fits, ranks, show, seed=seed)
    final, confidence = choice.final, choice.confidence
    depth = nearest_depth(model.spin.backbone, model.spin.layout, final.candidate.depth)
    model.remove_exits()
    deepest = max((each.depth for each in fitted.exits), default=0) if fitted else 0
    model.spin.set_features(_weighted(final.groups, queries), final.mean, final.scale, depth=max(depth, deepest))
    model.spin.remember_backbone()
    model.set_head(*task.as_logits(final.weight, final.intercept))
    model.config.logit_temperature = 1.0 if confidence is None else confidence.temperature
    model.config.text_pairs = paired
    _write_config(model, task, class_weights, encoded, tokenizer)
    if fitted is not None:
        model.set_exits(_weighted(fitted.groups, queries), fitted.mean, fitted.scale, fitted.exits)
    everything = [probe for ranked in probes for probe in ranked]
    return CalibrationResult(
        chosen=replace(final.candidate, depth=depth),
        best=choice.best,
        candidates=choice.candidates,
        baselines=choice.baselines,
        intervals=choice.intervals,
        metric=task.metric_name,
        kept=tuple(model.config.features),
        data={
            "train_rows": len(refit),
            "eval_rows": len(data.eval_rows),
            "evaluated": evaluated,
            "labels": list(names),
            "truncated": encoded.truncated,
            "max_length": encoded.max_length,
            "windows": cut and {**cut.to_dict(), "texts": encoded.windowed},
            "tokens": sum(encoded.lengths),
            "batches": len(batches),
            "split_batches": split,
            **({"token_weights_rows": weighed} if weighted else {}),
        },
        seconds=ranks.on_main(lambda: {**clock.seconds, "total": time.perf_counter() - started}),
        bytes={"features": store.bytes, "model": sum(p.numel() * p.element_size() for p in model.parameters())},
        convergence={
            "worst_gap": max(probe.worst_gap for probe in everything),
            "unconverged": sum(probe.unconverged for probe in everything),
            "head_gap": final.gap,
            **({"exits_gap": fitted.worst_gap} if fitted else {}),
            "tol": tol,
        },
        probes=tuple(
            {
                "tap": str(ranked[0].tap),
                "pooling": ranked[0].pooling,
                "C": ranked[0].C,
                "score": ranked[0].score,
                "num_features": ranked[0].num_features,
                "scores_by_C": [list(pair) for pair in ranked[0].scores_by_C],
            }
            for ranked in probes
        ),
        settings={
            **asdict(recipe),
            "preset": preset,
            "prefer": prefer,
            "recalibrate": recalibrate,
            "exits": bool(exits),
            "cv": cv,
            "validation_fraction": validation_fraction,
            "class_weight": class_weights,
            "multiclass": multiclass,
            "batch_tokens": batch_tokens,
            "seed": seed,
            "tried_depths": tried_depths,
            "blocks": blocks,
        },
        confidence=confidence,
        skipped=skipped,
        exits=fitted.candidates if fitted else (),
    )


def _weighted(groups: Sequence[FeatureGroup], queries: Mapping[Tap, torch.Tensor]) -> list[FeatureGroup]:
    """The groups with the queries of their token weights."""
    return [group._replace(query=queries[group.tap]) if group.pooling == ATTENTION else group for group in groups]


def _solver_device(model: SpinForSequenceClassification) -> torch.device:
    """The backbone's device, or the CPU where that has no float64."""
    device = model_device(model)
    return device if device.type in ("cpu", "cuda", "xpu") else torch.device("cpu")


def _write_config(
    model: SpinForSequenceClassification,
    task: Task,
    class_weights: list[float] | None,
    encoded: Encoded,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model.config.id2label = dict(enumerate(task.names))
    model.config.label2id = {name: index for index, name in enumerate(task.names)}
    model.config.class_weights = class_weights
    model.config.max_text_tokens = encoded.max_length
    model.config.windows = None if encoded.windows is None else encoded.windows.to_dict()
    if encoded.windows is not None:
        tokenizer.model_max_length = VERY_LARGE_INTEGER  # transformers' own for no limit: the model cuts
    elif encoded.max_length is not None:
        tokenizer.model_max_length = encoded.max_length
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.tokenizer = tokenizer_fingerprint(tokenizer)
    model.config.architectures = [type(model).__name__]
    model.num_labels = len(task.names)
