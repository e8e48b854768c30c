"""The command line: `modelq quantize | autoquantize | eval | chat | compare | inspect | convert | verify | formats`.

Bad use and bad input end with exit code 2 and one line on stderr, Ctrl-C with 130, anything unforeseen with 1 (and so does `verify` if it
found errors); MODELQ_DEBUG=1 adds the traceback. Reports go to stdout, --json prints them as one JSON object.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from modelq._version import __version__

BAD_USE, UNFORESEEN, INTERRUPTED, CLOSED_PIPE = 2, 1, 130, 141
EXPECTED = (ValueError, OSError, KeyError, ImportError, MemoryError)


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_USE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text}")
    return value


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="modelq", description="Post-training quantization of language models without PyTorch.")
    parser.add_argument("--version", action="version", version=f"modelq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    source = {"metavar": "SRC", "help": "a checkpoint folder, a .gguf file or a hub id"}

    sub = commands.add_parser("quantize", help="calibrate, quantize and export a checkpoint")
    sub.add_argument("source", **source)
    sub.add_argument("--format", default=None, help="nvfp4 (default), fp8, int8_sq, int4_awq, int4_gptq, nvfp4_awq, nvfp4_gptq, ... or any "
                     "preset by its name")
    sub.add_argument("--block-size", type=count, metavar="N", help="columns of a block of INT4 weights (default 128)")
    sub.add_argument("--config", type=Path, metavar="FILE", help="a quantization config (YAML or JSON) instead of --format")
    sub.add_argument("--calib", default="python_docs", metavar="DATA",
                     help="calibration text: python_docs (default), a .txt, .jsonl or .parquet file, or a data set's name")
    sub.add_argument("--samples", type=count, default=128, metavar="N", help="calibration samples (default 128)")
    sub.add_argument("--seq-len", type=count, default=512, metavar="L", help="tokens per sample at most (default 512)")
    sub.add_argument("--batch-size", type=count, default=8, metavar="B", help="samples per batch (default 8)")
    sub.add_argument("--checkpoint-dir", type=Path, metavar="DIR",
                     help="keep the calibration's progress there: the same command goes on where an interrupted one was")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    sub.add_argument("--overwrite", action="store_true", help="replace DIR if it is there")
    sub.add_argument("--dialect", help="modelopt (default), compressed-tensors, autoawq, gptq or fp8: how the checkpoint is written")
    sub.add_argument("--engine", help="vllm, sglang, tensorrt-llm or transformers: chooses the dialect, refuses what it does not load")
    sub.add_argument("--weights-only", action="store_true",
                     help="do not run the model, whatever its config.json asks for: for formats that need no data")
    add_compute(sub)

    sub = commands.add_parser("autoquantize", help="a format for every layer within a budget of bits")
    sub.add_argument("source", **source)
    sub.add_argument("--effective-bits", required=True, metavar="BITS",
                     help="mean bits of a weight at most: 6, or 4.5,6 or 4.5..8 to compare")
    sub.add_argument("--formats", default="nvfp4,fp8", help="to choose from, as for quantize --format (default nvfp4,fp8)")
    sub.add_argument("--method", choices=["gradient", "kl_div"], default="gradient", help="how layers are scored (default gradient)")
    sub.add_argument("--disable", action="append", metavar="PATTERN", help="modules that stay as they are, and count in no budget (default "
                     "'*lm_head*'; may be given again)")
    sub.add_argument("--calib", default="python_docs", metavar="DATA", help="text to calibrate and score with, as for quantize")
    sub.add_argument("--samples", type=count, default=128, metavar="N", help="calibration samples (default 128)")
    sub.add_argument("--score-samples", type=count, default=32, metavar="N", help="of them, how many are scored (default 32)")
    sub.add_argument("--seq-len", type=count, default=512, metavar="L", help="tokens per sample (default 512)")
    sub.add_argument("--batch-size", type=count, default=8, metavar="B", help="samples per batch (default 8)")
    sub.add_argument("--checkpoint-dir", type=Path, metavar="DIR",
                     help="keep scores there: other budgets and interrupted searches take them")
    sub.add_argument("--text", default="python_docs_heldout", metavar="FILE", help="perplexity is measured on this (as for eval)")
    sub.add_argument("--window", type=count, default=512, metavar="L", help="tokens per window (default 512)")
    sub.add_argument("--max-windows", type=count, default=16, metavar="N", help="windows to measure (default 16)")
    sub.add_argument("--no-eval", action="store_true", help="measure nothing")
    sub.add_argument("--no-uniform", action="store_true", help="do not measure the formats by themselves")
    sub.add_argument("--plot", type=Path, metavar="FILE", help="draw perplexity against bits (.png, .svg, .pdf)")
    sub.add_argument("--plot-layers", type=Path, metavar="FILE", help="draw which layer got which format, of the last budget")
    sub.add_argument("--out", type=Path, metavar="DIR", help="export the model of a single budget")
    sub.add_argument("--overwrite", action="store_true", help="replace DIR if it is there")
    sub.add_argument("--dialect", help="as for quantize")
    sub.add_argument("--engine", help="as for quantize")
    add_compute(sub)

    sub = commands.add_parser("eval", help="perplexity on a text")
    sub.add_argument("source", **source)
    sub.add_argument("--text", default="python_docs_heldout", metavar="FILE",
                     help="a .txt file (default: a part of Python's own documentation)")
    sub.add_argument("--window", type=count, default=512, metavar="L", help="tokens per window (default 512)")
    sub.add_argument("--max-windows", type=count, metavar="N", help="stop after N windows")
    add_compute(sub)

    sub = commands.add_parser("chat", help="talk to a model; questions are lines of stdin where it is no terminal")
    sub.add_argument("source", **source)
    sub.add_argument("--prompt", metavar="TEXT", help="one question, instead of those of stdin")
    add_generation(sub)
    add_compute(sub)

    sub = commands.add_parser("compare", help="two models' answers side by side, and how far their next tokens are apart")
    sub.add_argument("first", metavar="A", help="a checkpoint folder, a .gguf file or a hub id")
    sub.add_argument("second", metavar="B", help="the same of the other model, such as an export of A")
    sub.add_argument("--prompt", metavar="TEXT", required=True)
    add_generation(sub)
    add_compute(sub)

    sub = commands.add_parser("inspect", help="the tensors of a checkpoint: formats, scales, bits per weight")
    sub.add_argument("source", **source)
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = commands.add_parser("convert", help="write an exported folder in another dialect, without the original weights")
    sub.add_argument("directory", type=Path, metavar="DIR", help="an exported folder")
    sub.add_argument("--dialect", help="modelopt, compressed-tensors, autoawq, gptq or fp8")
    sub.add_argument("--engine", help="the dialect that vllm, sglang, tensorrt-llm or transformers loads")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    sub.add_argument("--overwrite", action="store_true", help="replace it if it is there")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = commands.add_parser("verify", help="would an engine load this export? exit code 1 if not")
    sub.add_argument("directory", type=Path, metavar="DIR", help="an exported folder")
    sub.add_argument("--engine", required=True, help="vllm, sglang, tensorrt-llm or transformers")
    sub.add_argument("--source", metavar="SRC", help="the unquantized checkpoint: also report how far the dequantized weights are from it")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = commands.add_parser("formats", help="the number formats and block schemes")
    sub.add_argument("--json", action="store_true", help="print JSON")
    return parser


def add_generation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="what the conversation begins with")
    parser.add_argument("--plain", action="store_true", help="complete the text as it is, without a chat template")
    parser.add_argument("--max-new-tokens", type=count, default=256, metavar="N", help="tokens of an answer at most (default 256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="default 0: always the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens that have P between them")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest tokens (default 0: all)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the draws (default: another each time)")


def add_compute(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compute", choices=["auto", "bfloat16", "float32"], default="auto",
                        help="what activations are stored as (default auto)")
    parser.add_argument("--threads", type=count, metavar="N", help="default: MODELQ_NUM_THREADS, or all processor cores")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> tuple[str, int]:
    """What to print, and the exit code."""
    from modelq import chat_commands, commands, search_commands
    from modelq.tables import wants_color
    if args.command == "quantize":
        if args.format and args.config:
            raise ValueError("give --format or --config, not both")
        args.format = args.format or "nvfp4"
    function = {"quantize": commands.quantize, "autoquantize": search_commands.autoquantize, "eval": commands.evaluate,
                "inspect": commands.inspect, "chat": chat_commands.chat, "compare": chat_commands.compare, "convert": commands.convert,
                "verify": commands.verify, "formats": commands.formats}
    report = function[args.command](args)
    return json.dumps(report.data, default=str) if args.json else report.text(wants_color()), report.code


def one_line(error: BaseException) -> str:
    """What an exception says, on one line: a KeyError without the quotes of str(), an OSError without its number."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{os.fspath(error.filename)}: {error.strerror}"
    return " ".join(text.split()) or type(error).__name__


def complain(text: str) -> None:
    print(f"modelq: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    debug = os.environ.get("MODELQ_DEBUG", "0") not in ("", "0")
    try:
        args = make_parser().parse_args(argv)
    except SystemExit as end:
        return int(end.code or 0)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("ignore", DeprecationWarning)   # advice for those who write code
        try:
            text, code = run(args)
            if text:        # a chat has said all by then
                print(text, flush=True)
            return code
        except KeyboardInterrupt:
            complain("interrupted")
            return INTERRUPTED
        except BrokenPipeError:   # the reader had enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return CLOSED_PIPE
        except Exception as error:
            if debug:
                raise
            if isinstance(error, EXPECTED):
                complain(one_line(error))
                return BAD_USE
            complain(f"{type(error).__name__}: {one_line(error)} (a bug: MODELQ_DEBUG=1 shows where)")
            return UNFORESEEN


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    complain(f"warning: {' '.join(str(message).split())}")
