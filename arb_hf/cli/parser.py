"""The arguments of ``arb-hf``'s commands. The work is in :mod:`arb_hf.cli.commands`, imported when a command needs it."""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..format.headers import inspect_folder, printable, table

EXIT_CODES = "exit codes: 0 done, 1 failed, 2 wrong arguments, 130 interrupted"
# Arguments of ArbConfig that a run fills in.
NOT_OPTIONS = ("format_version", "modules", "embeddings", "kwargs")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["lm-eval"]:
        from . import commands

        return commands.lm_eval(argv[1:])
    args, unknown = build_parser(argv).parse_known_args(argv)
    if unknown:
        args.usage_error(_unknown(unknown, args.options))
    return execute(args)


def _unknown(arguments: Sequence[str], options: Sequence[str]) -> str:
    """What is wrong with arguments that a command does not know, and what may have been meant."""
    text = f"unrecognized arguments: {' '.join(arguments)}"
    near = [name for each in arguments for name in difflib.get_close_matches(each.partition("=")[0], options, 1)]
    return f"{text}; did you mean {', '.join(near)}?" if near else text


def execute(args: argparse.Namespace) -> int:
    """Do what parsed arguments ask for. What is asked for goes to stdout, everything else to stderr."""
    try:
        if args.command == "inspect":
            result, text = _inspect(args)
        else:
            from . import commands  # imports torch and transformers

            result, text = commands.run(args)
    except KeyboardInterrupt:
        print("arb-hf: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if args.debug:
            raise
        print(f"arb-hf: error: {error}", file=sys.stderr)
        return 1
    if int(os.environ.get("RANK", "0")) == 0:  # one process of several speaks
        try:
            print(json.dumps(result, indent=2) if args.json else text, flush=True)
        except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _inspect(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    summary = inspect_folder(args.path)
    tensors = summary.pop("tensors")
    text = table(summary)
    if args.tensors:
        summary["tensors"] = tensors
        lines = [f"{name:<60} {entry['dtype']:<5} {entry['shape']}" for name, entry in sorted(tensors.items())]
        text = "\n".join([text, "", printable("\n".join(lines))])
    return summary, text


def build_parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of ``arb-hf``."""
    parser = argparse.ArgumentParser(
        prog="arb-hf",
        description="Binary language models: make them, measure them, publish them.",
        epilog=f"arb-hf COMMAND --help says more, with examples.\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"arb-hf {_version()}")
    commands = add_commands(parser, argv)
    harness = commands.add_parser("lm-eval", help="run lm-evaluation-harness with packed models; takes its arguments")
    harness.set_defaults(usage_error=parser.error, options=())
    return parser


def add_commands(parser: argparse.ArgumentParser, argv: Sequence[str] = ()) -> Any:
    """Give ``parser`` the commands; returns argparse's object that holds them.

    Options of ``quantize`` and ``plan`` are ArbConfig's, read from it (which imports torch) only if ``argv`` is that
    command.
    """
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (help_text, examples, add_arguments) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=help_text,
            description=help_text[0].upper() + help_text[1:] + ".",
            epilog=f"examples:\n{examples.replace('arb-hf', parser.prog)}\n\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_arguments(command)
        if name in CONFIGURED and list(argv[:1]) == [name]:
            add_config_options(command)
        if name in LONG:
            command.add_argument("--log-file", metavar="FILE", help="append what is logged, and the result, to FILE")
        command.add_argument("--json", action="store_true", help="print the result as one JSON object")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(usage_error=command.error, options=tuple(command._option_string_actions))
    return commands


def _version() -> str:
    try:
        version = importlib.metadata.version("arb_hf")
    except importlib.metadata.PackageNotFoundError:
        version = "(not installed)"
    built = any(Path(__file__).parent.parent.glob("_native*"))
    return f"{version}, C kernels {'built' if built else 'not built'}"


def _quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="name on the Hub or folder of the original")
    parser.add_argument("out", help="folder to write; must not hold a model yet")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
    parser.add_argument("--device-map", help="as for from_pretrained: auto, cpu, cuda:0 ...")
    parser.add_argument(
        "--base-model", help="name of the original on the Hub, for the model card (default: MODEL, if it is one)"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file (default: 5GB)")
    parser.add_argument("--evaluate", metavar="TEXT", help="measure perplexity on TEXT before and after, for the card")
    _windows(parser)
    _trust(parser)


def _plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="name on the Hub or folder of the original; only its config.json is read")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
    parser.add_argument("--device-map", help="as for from_pretrained: auto, cpu, cuda:0 ...")
    parser.add_argument("--max-shard-size", default="5GB", help="largest weight file (default: 5GB)")
    _trust(parser)


def _evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="packed or dense model: folder or name on the Hub")
    parser.add_argument("--text", help="perplexity on this text: a name (wikitext2, c4, ptb: test split) or a file")
    parser.add_argument(
        "--items",
        nargs="+",
        default=[],
        metavar="FILE",
        help="zero-shot accuracy on .jsonl files with a question per line: "
        '{"query": "...", "choices": ["...", "..."], "gold": 0}',
    )
    parser.add_argument("--max-items", type=int, help="most questions to take from each file (default: all)")
    parser.add_argument("--baseline", metavar="MODEL", help="measure this model too, in the same type, to compare with")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
    parser.add_argument("--device-map", help="as for from_pretrained")
    parser.add_argument("--save", action="store_true", help="keep the figures in MODEL's report and model card")
    _windows(parser)
    _trust(parser)


def _windows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--eval-length", type=int, default=2048, help="tokens per window of text (default: 2048)")
    parser.add_argument("--eval-windows", type=int, help="most windows to take, from the start (default: all)")


def _trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model; read it before"
    )


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="folder of a model")
    parser.add_argument("--tensors", action="store_true", help="list every tensor")


def _compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", help="folder of a packed model")
    parser.add_argument("b", help="folder of another")
    parser.add_argument("--plot", metavar="FILE", help="draw both runs' output errors to an image")


def _push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="folder of a packed model")
    parser.add_argument("repo_id", help="owner/name, or name")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--commit-message", help="message of the commit")
    parser.add_argument("--revision", help="branch (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--base-model", help="name of the original on the Hub, for the model card")


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="packed model: folder or name on the Hub")
    parser.add_argument("out", help="folder (dense) or file (gguf) to write")
    parser.add_argument("--to", choices=("dense", "gguf"), required=True, help="format")
    parser.add_argument("--dtype", help="dense: type of the weights, as for quantize (default: bfloat16)")
    parser.add_argument(
        "--type",
        choices=("auto", "q1_0", "f16", "f32"),
        help="gguf: type of the binary matrices. q1_0: llama.cpp's one bit and one scale per 128 weights, for models that have "
        "that form exactly; auto: q1_0 where it is exact, else f16 (default: auto)",
    )
    parser.add_argument("--pre-tokenizer", metavar="NAME", help="gguf: llama.cpp's name for the tokenizer's splitting")
    _trust(parser)


CONFIGURED = ("quantize", "plan")  # commands that take ArbConfig's options
LONG = ("quantize", "evaluate")  # commands that one comes back to
Add = Callable[[argparse.ArgumentParser], None]
COMMANDS: dict[str, tuple[str, str, Add]] = {
    "quantize": (
        "make a model binary, and write it with its record and model card",
        "  arb-hf quantize HuggingFaceTB/SmolLM2-135M-Instruct ./smol-arb\n"
        "  arb-hf quantize ./model ./model-arb --dataset my_text.jsonl --num-samples 64 --evaluate wikitext2\n"
        "  arb-hf quantize ./model ./model-arb-paper --dataset my_text.jsonl --refinement paper\n"
        "  arb-hf quantize ./model ./model-arb --dataset my_text.jsonl \\\n"
        '      --overrides \'{"model.layers.0": null, "*.down_proj": {"block_size": 64}}\'\n'
        "  accelerate launch -m arb_hf quantize ./model ./model-arb --checkpoint-dir ./resume",
        _quantize,
    ),
    "plan": (
        "say what a run would give: what is binarized, bits, file sizes, memory, time; reads no weights",
        "  arb-hf plan HuggingFaceTB/SmolLM2-135M-Instruct\n"
        "  arb-hf plan ./model --refinement full --scale-dtype int8 --no-group-bitmap --json",
        _plan,
    ),
    "evaluate": (
        "measure perplexity and zero-shot accuracy",
        "  arb-hf evaluate ./smol-arb --text wikitext2\n"
        "  arb-hf evaluate ./smol-arb --text my.txt --eval-length 512 --baseline ./smol --save\n"
        "  arb-hf evaluate ./smol-arb --items arc_easy.jsonl piqa.jsonl --max-items 200 --json",
        _evaluate,
    ),
    "inspect": (
        "show what a model's files hold: layers, true bits, options; reads headers only",
        "  arb-hf inspect ./smol-arb\n  arb-hf inspect ./smol-arb --tensors --json",
        _inspect_arguments,
    ),
    "compare": (
        "compare two packed models side by side",
        "  arb-hf compare ./smol-arb-rc ./smol-billm --plot errors.png",
        _compare,
    ),
    "push": (
        "publish a packed model's folder on the Hub",
        "  arb-hf push ./smol-arb me/SmolLM2-135M-arb-rc\n  arb-hf push ./smol-arb me/smol --private --create-pr",
        _push,
    ),
    "export": (
        "write a packed model in another format",
        "  arb-hf export ./smol-arb ./smol-dense --to dense --dtype float16\n"
        "  arb-hf export ./smol-arb ./smol.gguf --to gguf",
        _export,
    ),
}


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """An option for every argument of ArbConfig, with its default and its words; given ones are in ``args.config``."""
    from .. import config as module  # imports torch and transformers

    config = module.ArbConfig
    words = argument_docs(config.__doc__)
    group = parser.add_argument_group("options of the binarization (ArbConfig's)")
    for name, parameter in inspect.signature(config).parameters.items():
        if name in NOT_OPTIONS:
            continue
        group.add_argument(
            "--" + name.replace("_", "-"),
            dest=f"config.{name}",
            default=argparse.SUPPRESS,
            help=(words.get(name, "") + _default(module, parameter)).replace("%", "%%"),
            **{**_reading(str(parameter.annotation)), **_values(module, name)},
        )


def _default(module: Any, parameter: inspect.Parameter) -> str:
    """What ``--help`` says of an option's default; it may depend on the refinement."""
    dependent = module.DEFAULTS.get(parameter.name)
    if dependent:
        return f" (default: {', '.join(f'{value} with refinement={name}' for name, value in dependent.items())})"
    return "" if parameter.default is None else f" (default: {parameter.default})"


def _values(module: Any, name: str) -> dict[str, str]:
    """What ``--help`` shows for an option that has few values; ArbConfig checks them, in one place and with one message."""
    values = module.CHOICES.get(name)
    return {"metavar": "{" + ",".join(values) + "}"} if values else {}


def argument_docs(docstring: str | None) -> dict[str, str]:
    """The entries of a docstring's ``Args:``, by name; entries of several names stand under each."""
    section = re.search(r"^Args:\n(.*?)(?:\n\s*\n|\Z)", inspect.cleandoc(docstring or ""), re.DOTALL | re.MULTILINE)
    docs: dict[str, str] = {}
    names: list[str] = []
    for line in section[1].splitlines() if section else ():
        entry = re.match(r" {4}([\w, ]+): (.*)", line)
        if entry:
            names = entry[1].split(", ")
        for name in names:
            text = entry[2] if entry else line.strip()
            docs[name] = f"{docs[name]} {text}" if name in docs else text
    return {name: re.sub(r":\w+:`~?([^`]*)`", r"\1", re.sub(r"[`*]{2}", "", text)) for name, text in docs.items()}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON ({error}): {text}") from None


def _reading(annotation: str) -> dict[str, Any]:
    """How argparse is to read a value of this type."""
    annotation = annotation.removesuffix(" | None")
    if annotation == "bool":
        return {"action": argparse.BooleanOptionalAction}
    if annotation in ("int", "float"):
        return {"type": {"int": int, "float": float}[annotation], "metavar": annotation.upper()}
    if annotation.startswith("list[str]"):
        return {"nargs": "+", "metavar": "NAME"}
    if annotation.startswith(("dict", "Mapping")):
        return {"type": _json, "metavar": "JSON"}
    return {"metavar": "VALUE"}
