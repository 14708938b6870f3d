"""The work of ``arb-hf``'s commands; their arguments are in :mod:`arb_hf.cli.parser`.

A command takes the parsed arguments and returns what it has to say, as data for ``--json`` and as text.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from .. import evaluate as evaluation
from ..bits import bits_per_weight, summary
from ..config import ArbConfig
from ..export import export_dense, export_gguf
from ..export.gguf import require_gguf
from ..folders import require_place
from ..format.headers import REPORT_FILE, inspect_folder
from ..hub.load import from_pretrained, load_report
from ..hub.publish import push_folder
from ..hub.save import require_arguments, save_pretrained, write_card
from ..hub.source import naming, read_config
from ..planning import ModelPlan
from ..planning import plan as make_plan
from ..report import ArbReport, Measurement, plot_comparison
from .loading import find_processor, find_tokenizer, load, need

logger = logging.getLogger(__name__)
DTYPES = ("auto", "float32", "bfloat16", "float16")
LINE = "%(asctime)s %(levelname)s %(message)s"
Said = tuple[dict[str, Any], str]


def run(args: argparse.Namespace) -> Said:
    """Run the command that was asked for."""
    commands = {each.__name__: each for each in (quantize, plan, evaluate, compare, push, export)}
    with _progress(), _log_file(vars(args).get("log_file")) as log:
        result, text = commands[args.command](args)
        log(logging.INFO, text)
    return result, text


def quantize(args: argparse.Namespace) -> Said:
    """``arb-hf quantize``: everything that can be refused is refused before the model is loaded."""
    dtype, out = _dtype(args), Path(args.out)
    config = _config(args)
    _refuse_existing(args, out)
    with _writable(out, args.model):
        logger.info("the plan of this run\n%s", _planned(args, config, dtype))
        return _quantize(args, config, dtype, out)


def plan(args: argparse.Namespace) -> Said:
    """``arb-hf plan``: what ``quantize`` with these options would give."""
    dtype = _dtype(args)
    made = _planned(args, _config(args), dtype)
    return made.to_dict(), str(made)


def _config(args: argparse.Namespace) -> ArbConfig:
    """The options of the run; wrong ones, and a wrong size of files, end the command."""
    options = {name.removeprefix("config."): value for name, value in vars(args).items() if name.startswith("config.")}
    try:
        config = ArbConfig(**options)
        require_arguments(None, vars(args).get("base_model"), {"max_shard_size": args.max_shard_size})
    except ValueError as error:
        args.usage_error(str(error))
    return config


def _planned(args: argparse.Namespace, config: ArbConfig, dtype: Any) -> ModelPlan:
    return make_plan(
        args.model,
        config,
        dtype=dtype,
        device_map=args.device_map,
        max_shard_size=args.max_shard_size,
        trust_remote_code=args.trust_remote_code,
    )


def _quantize(args: argparse.Namespace, config: ArbConfig, dtype: Any, out: Path) -> Said:
    tokenizer = find_tokenizer(args.model, args.trust_remote_code)
    processor = find_processor(args.model, tokenizer, args.trust_remote_code)
    if config.tokenizer is None:  # loaded once, and with its own code where that is trusted
        config.tokenizer = tokenizer
    windows = None
    if args.evaluate:
        windows = _windows(need(tokenizer, args.model), args.evaluate, args)
        before = evaluation.perplexity(load(args.model, dtype, args), windows)
    model = load(args.model, dtype, args, quantization_config=config)
    report: ArbReport = model.arb_report  # type: ignore[assignment]
    if windows is not None:
        report.add(_perplexity(model, windows, args.evaluate, before))
    if _first_process():
        save_pretrained(model, processor, out, base_model=args.base_model, max_shard_size=args.max_shard_size)
    result = {
        "folder": str(out),
        "bits_per_weight": bits_per_weight(model),
        "output_error": report.output_error,
        "seconds": report.seconds,
        "measurements": [vars(each) for each in report.measurements],
    }
    lines = [report.table(), "", summary(model), *_lines(report.measurements), f"written to {out}"]
    return result, "\n".join(lines)


def evaluate(args: argparse.Namespace) -> Said:
    """``arb-hf evaluate``: the same items and windows for the model and its baseline."""
    dtype = _dtype(args)
    if not args.text and not args.items:
        args.usage_error("nothing to measure: pass --text or --items")
    if args.save and not os.path.isfile(os.path.join(args.model, REPORT_FILE)):
        args.usage_error(f"--save keeps figures in {REPORT_FILE} of a folder written by arb_hf; {args.model} has none")
    report = ArbReport.from_json(os.path.join(args.model, REPORT_FILE)) if args.save else None
    measured, dtype = _measure(args.model, dtype, args)
    if args.baseline:
        originals, _ = _measure(args.baseline, dtype, args)
        measured = [
            Measurement(each.metric, each.data, each.protocol, each.value, original.value)
            for each, original in zip(measured, originals, strict=True)
        ]
    if report is not None:
        for each in measured:
            report.add(each)
        report.to_json(os.path.join(args.model, REPORT_FILE))
        write_card(args.model)
    return {"model": args.model, "measurements": [vars(each) for each in measured]}, "\n".join(_lines(measured))


def compare(args: argparse.Namespace) -> Said:
    """``arb-hf compare``: bits, sizes, output errors by kind of layer, and what was measured of each."""
    names = (args.a, args.b)
    if args.plot:
        _refuse_plot(args)
    summaries = [inspect_folder(name) for name in names]
    for name, each in zip(names, summaries, strict=True):
        if each["bits_per_weight"] is None:
            raise ValueError(f"{name} holds no model packed by arb_hf")
    reports = [load_report(name) for name in names]
    rows: list[tuple[Any, ...]] = []
    for key in ("method", "refinement", "scale_dtype"):
        rows.append((key, *(each["options"].get(key) for each in summaries)))
    rows.append(("bits per weight", *(each["bits_per_weight"] for each in summaries)))
    rows.append(("MB", *(each["bytes"] / 1e6 for each in summaries)))
    losses = [None if each is None else each.held_out_loss for each in reports]
    rows.append(("tuning: held-out loss before", *(each and each[0] for each in losses)))
    rows.append(("tuning: held-out loss after", *(each and each[1] for each in losses)))
    rows.append(("scales trained afterwards", *(None if each is None else each.scales_trained for each in reports)))
    rows.append(("output error", *(None if each is None else each.output_error for each in reports)))
    errors = [{} if each is None else each.errors_by_kind() for each in reports]
    rows += [(f"  {kind}", *(each.get(kind) for each in errors)) for kind in errors[0] | errors[1]]
    found = [
        {} if each is None else {(m.metric, m.data, m.protocol): m.value for m in each.measurements} for each in reports
    ]
    rows += [(", ".join(key), *(each.get(key) for each in found)) for key in found[0] | found[1]]
    if args.plot:
        plot_comparison(dict(zip(names, _reports(names, reports), strict=True)), args.plot)
    width = max(len(label) for label, _, _ in rows) + 2
    short = [Path(name).name for name in names]
    column = max(16, *map(len, short)) + 2
    cells = [f"{label:<{width}}{_cell(a):>{column}}{_cell(b):>{column}}" for label, a, b in [("", *short), *rows]]
    return {"models": list(names), "rows": [list(row) for row in rows]}, "\n".join(cells)


def _refuse_plot(args: argparse.Namespace) -> None:
    """Refuse a plot that cannot be drawn, before anything is read for it."""
    from matplotlib.figure import Figure  # an extra of the package; the error says its name

    known = Figure().canvas.get_supported_filetypes()
    suffix = Path(args.plot).suffix.removeprefix(".")
    if suffix.lower() not in known:
        args.usage_error(
            f"--plot {args.plot}: end the name with one of {', '.join(f'.{each}' for each in sorted(known))}"
        )
    if not Path(args.plot).absolute().parent.is_dir():
        args.usage_error(f"--plot {args.plot}: there is no such folder")


def _reports(names: Sequence[str], reports: Sequence[ArbReport | None]) -> list[ArbReport]:
    """All the reports, or an error that names the model without one."""
    for name, report in zip(names, reports, strict=True):
        if report is None:
            raise ValueError(f"{name} has no {REPORT_FILE} to draw")
    return [report for report in reports if report is not None]


def push(args: argparse.Namespace) -> Said:
    """``arb-hf push``: publish a folder."""
    commit = push_folder(
        args.folder,
        args.repo_id,
        private=args.private,
        commit_message=args.commit_message,
        revision=args.revision,
        create_pr=args.create_pr,
        base_model=args.base_model,
    )
    url = commit.pr_url or commit.commit_url
    return {"url": url, "commit": commit.oid}, f"pushed: {url}"


def export(args: argparse.Namespace) -> Said:
    """``arb-hf export``: says what is lost. A folder that holds a model is not written to."""
    for option, format in (("dtype", "dense"), ("type", "gguf"), ("pre_tokenizer", "gguf")):
        if getattr(args, option) is not None and args.to != format:
            args.usage_error(f"--{option.replace('_', '-')} has no effect with --to {args.to}: it is for {format}")
    out, dense = Path(args.out), args.to == "dense"
    args.dtype = args.dtype or "bfloat16"
    dtype = _dtype(args)
    _refuse_existing(args, out)
    if not dense:
        require_gguf()
        if out.is_dir():
            args.usage_error(f"{out} is a folder: a GGUF model is one file, name it")
    with _writable(out if dense else out.absolute().parent, ""):
        with naming(args.model):
            model = from_pretrained(args.model, dtype=torch.float32, trust_remote_code=args.trust_remote_code)
        tokenizer = find_tokenizer(args.model, args.trust_remote_code)
        if dense:
            processor = find_processor(args.model, tokenizer, args.trust_remote_code)
            result = export_dense(model, processor, out, dtype)
        else:
            tokenizer = need(tokenizer, args.model)
            result = export_gguf(model, tokenizer, out, args.type or "auto", args.pre_tokenizer)
    return vars(result), str(result)


def lm_eval(argv: Sequence[str]) -> int:
    """``arb-hf lm-eval``: lm-evaluation-harness's own command line, in a process that can load packed models."""
    if importlib.util.find_spec("lm_eval") is None:
        print("arb-hf: error: lm-evaluation-harness is not installed: pip install 'arb_hf[eval]'", file=sys.stderr)
        return 1
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *argv]
    try:
        cli_evaluate()
    except (OSError, ValueError) as error:  # a task's data out of reach, a model that is not there
        print(f"arb-hf: error: lm_eval: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _progress() -> Iterator[None]:
    """Dated lines of what is done; on a terminal bars too, which in a log file would be one endless line each."""
    terminal = sys.stderr.isatty()
    ours, handler = logging.getLogger("arb_hf"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(LINE))
    level, bars, hub_bars = ours.level, transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    if not terminal:
        transformers_logging.disable_progress_bar()
        disable_progress_bars()
    try:
        with logging_redirect_tqdm([ours]):  # lines do not tear bars
            yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()


@contextmanager
def _log_file(path: str | None) -> Iterator[Callable[[int, str], None]]:
    """Append the dated lines to a file too, with the command and how it ended; gives what writes there alone.

    Raises:
        OSError: the file cannot be written.
    """
    if path is None or not _first_process():
        yield lambda level, text: None
        return
    try:
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise OSError(f"--log-file {path} cannot be written: {error.strerror or error}") from error
    handler.setFormatter(logging.Formatter(LINE))
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk ends the log, not the run

    def log(level: int, text: str) -> None:
        handler.handle(logging.LogRecord("arb_hf", level, __file__, 0, text, None, None))

    log(logging.INFO, shlex.join(["arb-hf", *sys.argv[1:]]))
    ours = logging.getLogger("arb_hf")
    ours.addHandler(handler)
    try:
        yield log
    except BaseException as error:
        log(logging.ERROR, f"{type(error).__name__}: {error}")
        raise
    finally:
        ours.removeHandler(handler)
        handler.close()


def _dtype(args: argparse.Namespace) -> Any:
    if args.dtype not in DTYPES:
        args.usage_error(f"--dtype {args.dtype} is not one of {', '.join(DTYPES)}")
    return args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)


def _refuse_existing(args: argparse.Namespace, out: Path) -> None:
    if (out / "config.json").exists():
        args.usage_error(f"{out} holds a model already; name another folder, or remove it")
    if out.is_file():
        args.usage_error(f"{out} is a file already; name another, or remove it")
    try:
        require_place(out)
    except ValueError as error:
        args.usage_error(str(error))


@contextmanager
def _writable(out: Path, model: str) -> Iterator[None]:
    """Make the folder to write, before hours of work; it needs an eighth of the original at least, two bits of 16.

    If the work then fails, folders that were made for it and are still empty go.
    """
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        _make_writable(out, model)
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # one is not empty, or another process was quicker
            for folder in made:
                folder.rmdir()
        raise


def _make_writable(out: Path, model: str) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OSError(f"{out} cannot be written: {error.strerror or error}") from error
    original = sum(path.stat().st_size for path in Path(model).glob("*.safetensors")) if os.path.isdir(model) else 0
    free = shutil.disk_usage(out).free
    if free < original / 8:
        raise OSError(
            f"the disk of {out} has {free / 1e6:.1f} MB free, too little for what becomes of {original / 1e6:.1f} MB"
        )


def _windows(tokenizer: Any, text: str, args: argparse.Namespace) -> torch.Tensor:
    return evaluation.evaluation_windows(tokenizer, text, args.eval_length, args.eval_windows)


def _measure(name: str, dtype: Any, args: argparse.Namespace) -> tuple[list[Measurement], torch.dtype]:
    """What was asked for of a model, and the type it was measured in."""
    read_config(name, args.trust_remote_code)  # refuses what cannot be loaded, before anything else is
    tokenizer = need(find_tokenizer(name, args.trust_remote_code), name)
    windows = _windows(tokenizer, args.text, args) if args.text else None
    model = load(name, dtype, args)
    found = [] if windows is None else [_perplexity(model, windows, args.text)]
    for path in args.items:
        accuracy = evaluation.multiple_choice(model, tokenizer, path, args.max_items)
        protocol = f"zero-shot, {accuracy.items} items, {_type_of(model)}"
        found.append(Measurement("acc", Path(path).name, protocol, accuracy.acc))
        found.append(Measurement("acc_norm", Path(path).name, protocol, accuracy.acc_norm))
    return found, model.dtype


def _perplexity(model: PreTrainedModel, windows: torch.Tensor, text: str, baseline: float | None = None) -> Measurement:
    protocol = f"{len(windows)} windows of {windows.shape[1]} tokens, {_type_of(model)}"
    return Measurement("perplexity", os.path.basename(text), protocol, evaluation.perplexity(model, windows), baseline)


def _type_of(model: PreTrainedModel) -> str:
    """``float32``, ``bfloat16`` ...: what the model computes in, which moves the figures a little."""
    return str(model.dtype).removeprefix("torch.")


def _lines(measurements: Sequence[Measurement]) -> list[str]:
    return [
        f"{each.metric} on {each.data} ({each.protocol}): {each.value:.4f}"
        + ("" if each.baseline is None else f"; original {each.baseline:.4f}")
        for each in measurements
    ]


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _first_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0
