"""The model card: written from what a packed folder holds, so that it states only what is true of it."""

from __future__ import annotations

import importlib.metadata
import math
import os
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..auto import GENERATORS, TASKS, auto_class, needs_trust, saved_class
from ..binarize.methods import METHODS
from ..errors import ArbFormatError
from ..format.headers import REPORT_FILE, inspect_folder, read_json, span
from ..names import is_hub_id
from ..report import ArbReport, Measurement
from ..text import NAMED

TEMPLATE = Path(__file__).parent / "model_card.md"
PLOT_FILE = "arb_report.png"
MARKER = "Written by arb_hf, and again at every push. Delete this line to keep your own edits."
FULL_NAME = "{}, chosen and refined by what they do to each layer's outputs, beyond the paper"
# Said elsewhere in the card, or of no use to its reader.
HIDDEN_OPTIONS = (
    "quant_method",
    "dataset",
    "num_samples",
    "sequence_length",
    "batch_size",
    "tokenizer",
    "checkpoint_dir",
    "modules_to_not_convert",
)
# Either of them says that a folder has a processor, for pictures or sound beside text.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
# What a model without a language model's head gives, where that is not called logits.
OUTPUTS = {"AutoModel": "last_hidden_state", "AutoModelForQuestionAnswering": "start_logits"}
QUANTIZED = "quantized"  # what a packed model is to its original, in the Hub's words
LICENSE_KEYS = ("license", "license_name", "license_link")


def model_card(
    folder: str | os.PathLike,
    repo_id: str | None = None,
    base_model: str | None = None,
    metadata: dict[str, Any] | None = None,
) -> ModelCard:
    """The card of a packed model's folder.

    Args:
        folder: with ``config.json``, safetensors and, where the run was recorded, ``arb_report.json``.
        repo_id: where the model will be found; by default the folder's name.
        base_model: the original's name on the Hub; by default the report's, if that is one.
        metadata: of the original's card; its licence and languages are inherited. Where the original is on no Hub,
            the models that its card names as its base are named here too.

    Raises:
        ValueError: the folder holds no packed model.
    """
    folder = Path(folder)
    summary = inspect_folder(folder)
    if not summary["options"] or summary["bits_per_weight"] is None:
        raise ValueError(f"{folder} holds no model packed by arb_hf")
    report = ArbReport.from_json(folder / REPORT_FILE) if (folder / REPORT_FILE).is_file() else None
    original = base_model or (report.model if report else None) or "The original model"
    base_model = original if is_hub_id(original) else None
    metadata = metadata or {}
    repo_id = repo_id or folder.resolve().name
    title = repo_id.rpartition("/")[2]
    loading = _loading(folder)
    ancestors = [] if base_model else _on_the_hub(metadata.get("base_model"))
    known = metadata | {"pipeline_tag": TASKS.get(loading["auto"]), "base_model": base_model or ancestors}
    data = _card_data(title, known, report, QUANTIZED if base_model else None)
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        marker=MARKER,
        title=title,
        repo_id=repo_id,
        base_model=base_model,
        original=original,
        ancestors=ancestors,
        source=_source(),
        license=metadata.get("license_name") or metadata.get("license"),
        plot=PLOT_FILE if (folder / PLOT_FILE).is_file() else None,
        **loading,
        **_sizes(summary),
        **_run(report),
    )


def _loading(folder: Path) -> dict[str, Any]:
    """What the card's snippet needs to load the model: its class, what turns text into its inputs, and trust."""
    config = read_json(folder / "config.json")
    processor = any((folder / name).is_file() for name in PROCESSOR_FILES)
    try:
        auto, module, trust = auto_class(config), "transformers", needs_trust(config)
    except ArbFormatError:  # a class of the maker's that transformers has no name for
        auto, module, trust = saved_class(config.get("architectures")) or "PreTrainedModel", None, False
    return {
        "auto": auto,
        "module": module,
        "preprocessor": "AutoProcessor" if processor else "AutoTokenizer",
        "arguments": ", trust_remote_code=True" if trust else "",
        "generates": auto in GENERATORS or module is None,
        "output": OUTPUTS.get(auto, "logits"),
    }


def _on_the_hub(names: Any) -> list[str]:
    """Those of a card's ``base_model``, a name or several, that can be on the Hub."""
    listed = names if isinstance(names, list) else [names]
    return [name for name in listed if isinstance(name, str) and is_hub_id(name)]


def _source() -> str | None:
    """The address of the package's repository: ``Repository`` in ``[project.urls]`` of ``pyproject.toml``."""
    try:
        urls = importlib.metadata.metadata("arb_hf").get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder, not installed
        urls = []
    return dict(url.split(", ", 1) for url in urls).get("Repository")


def _card_data(
    title: str, metadata: dict[str, Any], report: ArbReport | None, base_model_relation: str | None
) -> ModelCardData:
    dataset = report.config.get("dataset") if report else None
    inherited = {key: metadata[key] for key in (*LICENSE_KEYS, "language") if metadata.get(key)}
    measured = [each for each in report.measurements if math.isfinite(each.value)] if report else []
    return ModelCardData(
        **inherited,
        library_name="transformers",
        pipeline_tag=metadata["pipeline_tag"],
        tags=["arb_hf", "arb-llm", "binary", "quantized"],
        base_model=metadata["base_model"] or None,
        base_model_relation=base_model_relation,
        datasets=[NAMED[dataset][0]] if dataset in NAMED else None,
        model_name=title if measured else None,
        eval_results=[_eval_result(each) for each in measured] or None,
        ignore_metadata_errors=False,
    )


def _eval_result(measurement: Measurement) -> EvalResult:
    known = NAMED.get(measurement.data)
    return EvalResult(
        task_type="text-generation",
        dataset_type=known[0] if known else "text",  # a file of the maker's has no name on the Hub
        dataset_name=measurement.data,
        metric_type=measurement.metric,
        metric_name=f"{measurement.metric} ({measurement.protocol})",
        metric_value=round(measurement.value, 4),
    )


def _sizes(summary: dict[str, Any]) -> dict[str, Any]:
    binary, int8, kept = summary["binary"], summary["int8"], summary["kept"]
    options = summary["options"]
    return {
        "method_name": _method_name(options),
        "options": [
            (name, value) for name, value in options.items() if value is not None and name not in HIDDEN_OPTIONS
        ],
        "bits_per_weight": f"{summary['bits_per_weight']:.3f}",
        "kinds": [
            (
                kind,
                row["layers"],
                f"{row['bits'] / max(row['weights'], 1):.3f}",
                span(row["bits_per_weight"]).strip(" ()"),
            )
            for kind, row in summary["kinds"].items()
        ],
        "differ": any(span(row["bits_per_weight"]) for row in summary["kinds"].values()),
        "binary_weights": f"{binary['weights']:,}",
        "binary_layers": sum(kind["layers"] for kind in summary["kinds"].values()),
        "int8_weights": f"{int8['weights']:,}" if int8["tensors"] else None,
        "int8_megabytes": f"{int8['bits'] / 8e6:,.1f}",
        "kept_weights": f"{kept['weights']:,}",
        "kept_megabytes": f"{kept['bits'] / 8e6:,.1f}",
        "megabytes": f"{summary['bytes'] / 1e6:,.1f}",
        "dense_megabytes": f"{(binary['weights'] + int8['weights'] + kept['weights']) * 2 / 1e6:,.1f}",
    }


def _method_name(options: dict[str, Any]) -> str:
    method = METHODS.get(str(options.get("method")))
    if method is None:
        return str(options.get("method"))
    if options.get("refinement") == "full":  # keeps of the method what is stored
        return FULL_NAME.format("row and column scales" if method.has_column_scales else "row scales and means")
    return method.words


def _run(report: ArbReport | None) -> dict[str, Any]:
    if report is None:
        return {"report": None, "measurements": []}
    before, after = report.held_out_loss or (0.0, 0.0)
    return {
        "report": report,
        "measurements": [
            {
                "metric": each.metric,
                "data": each.data,
                "protocol": each.protocol,
                "value": _figure(each.value),
                "baseline": _figure(each.baseline),
            }
            for each in report.measurements
        ],
        "output_error": f"{report.output_error:.4f}",
        "samples": f"{report.samples:,}",
        "tokens": f"{report.tokens:,}",
        "dataset": report.config.get("dataset"),
        "seconds": f"{report.seconds:,.0f}",
        "versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        "tuned": len(report.tuned_layers),
        "tuned_before": f"{before:.4f}",
        "tuned_after": f"{after:.4f}",
        "layers": len({each.layer for each in report.matrices}),
        "data_free": sum(each.solve.data_free for each in report.matrices),
    }


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:,.2f}"


def written_by_us(card: str | os.PathLike) -> bool:
    """Whether a README is absent, or a card of ours that nobody edited by hand."""
    path = Path(card)
    return not path.exists() or MARKER in path.read_text(encoding="utf-8", errors="replace")
