"""The library's messages in the command line's words: options as a shell has them, and no calls of Python."""

from __future__ import annotations

import re

# Advice that a shell can't follow as it stands.
_ADVICE = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r", or give a function of \(labels, predictions\)", ""),
        (r"; or if the data lacks some classes, say how many there are with num_labels=\.\.\. in from_backbone", ""),
        (r"(Give|Name) all of them [^.]*labels=\[\.\.\.\][^.]*", "Give each label a row in --train"),
        (r"class_weight has no meaning for regression; use sample_weight", "--balanced has no meaning for regression"),
        (r'Use kinds=\["hidden"\], or [^.]*ffn="\.\.\." in from_backbone', "Use --kind hidden"),
        (r"load it with from_pretrained", "use it with spin-hf predict"),
        (r"call SpinForSequenceClassification\.from_backbone\('([^']*)', .*\)", r"run: spin-hf calibrate \1"),
        (r"trust_remote_code=True to (this call|the call that loads the model)", "--trust-remote-code"),
        (r'from_pretrained\(\.\.\., backbone="folder, id or a loaded model"\)', "--backbone with its folder or Hub id"),
        (r"with backbone=,", "with --backbone,"),
        (r' Replace it: text\.encode\(.*"replace"\)', " Replace it"),
        (r"Leave depths and max_depth out", "Leave --max-depth out"),
        (r"spin_calibrate\(\.\.\., windows=True, max_length=512\)", "--windows --max-length 512"),
        (r"windows=True", "--windows"),
        (r"spin_calibrate\(model, tokenizer, train, exits=True\)", "spin-hf calibrate --exits"),
        (r"exits=True keeps", "--exits keeps"),
        (r"^exit must", "--exit must"),
        (r"^label='([^']*)' is not", r"--label \1 is not"),
        (
            r"Save it there: (result\.save\([^)]*\)), or pass result= to write_card",
            r"spin-hf calibrate --out writes it; in Python, \1",
        ),
        (r"model\.config\.exits lists them", "config.json lists them"),
        (r"Leave (windows|stacks) out", r"Leave --\1 out"),
        (r"dtype=torch\.bfloat16 or float32", "--dtype bfloat16 or float32"),
        (r'data\["SPLIT"\](, or of a name "NAME:SPLIT")?', "NAME:SPLIT"),
        (r"\b(Give|give|and) eval\b", r"\1 --validation"),
        (r"\b(or|and) cv(?=,| was)", r"\1 --cv"),
        (r"^cv, the number of folds,", "--cv"),
        (r"^kinds must", "--kind must"),
        (r"^poolings must", "--pooling must"),
        (r"\beval data\b", "validation data"),
        (r"a list of one or more of", "one of"),
        (r"got \('([^)]*)'[^)]*\)", r"got \1"),
        (r"write_card\(\.\.\., base_model=\.\.\.\)", "spin-hf calibrate --base-model"),
    )
)
_OPTIONS = (
    *("text_column", "label_column", "problem_type", "max_features", "max_depth", "max_length", "batch_tokens"),
    *("cache_dir", "min_confidence", "(?:cv|metric|overlap)(?==)"),
)
_OPTION = re.compile(
    rf"""(?<![\w\-./'"])(?P<name>{"|".join(_OPTIONS)})(?![\w/]|\.\w)"""
    r"""(?:=(?P<value>"\.\.\."|\[[^\]]*\]|'[^']*'|"[^"]*"|[^\s,.;)]+))?(?: in from_backbone)?"""
)


def in_shell_words(message: str) -> str:
    """A message of the library as ``spin-hf`` tells it, on one line."""
    told = " ".join(message.split())
    for pattern, replacement in _ADVICE:
        told = pattern.sub(replacement, told)
    return _OPTION.sub(_option, told)


def _option(found: re.Match[str]) -> str:
    name, value = "--" + found["name"].replace("_", "-"), found["value"]
    if value is None:
        return name
    if value == '"..."':
        return f"{name} {'FOLDER' if name == '--cache-dir' else 'NAME'}"
    return " ".join(name + " " + item.strip(" '\"") for item in value.strip("[]").split(","))
