"""What the command line takes: a table of options, each said once, and a table of commands made of them."""
from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from modelq._version import __version__

BAD_USE = 2
EXIT_CODES = """\
exit codes: 0 done; 1 verify found errors, or something unforeseen happened; 2 bad use or bad input, said in one line on stderr;
130 interrupted (Ctrl-C); 141 the reader of a pipe went away.
environment: NO_COLOR=1 no colors; MODELQ_NUM_THREADS=N; MODELQ_DEBUG=1 tracebacks."""
# As in modelq.checkpoint.dialects, modelq.verify.engines and modelq.choices, which would take time to import.
DIALECTS = ("modelopt", "compressed-tensors", "autoawq", "gptq", "fp8")
ENGINES = ("vllm", "sglang", "tensorrt-llm", "transformers")
KV_CACHES = ("none", "fp8", "fp8_affine", "nvfp4", "nvfp4_affine", "nvfp4_rotate")
SHELLS = ("bash", "zsh", "fish")


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_USE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of 1 or more, got {text}")
    return value


def number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {text}")
    return value


class Option(NamedTuple):
    flag: str
    settings: dict[str, Any]

    def but(self, **changes: Any) -> Option:
        """The same, other than that."""
        return Option(self.flag, {**self.settings, **changes})


def option(flag: str, help: str, **settings: Any) -> Option:
    return Option(flag, {"help": help, **settings})


SOURCE = option("source", "a checkpoint folder, a .gguf file or a hub id", metavar="SRC")
DIRECTORY = option("directory", "an exported folder", metavar="DIR", type=Path)
JSON = option("--json", "print one JSON object instead of text", action="store_true")

FORMAT = option("--format", "nvfp4 (default), fp8, int8_sq, int4_awq, ... or any preset by its name: `modelq formats` lists them",
                metavar="NAME")
FORMATS = option("--formats", "formats with commas between them, as for quantize --format", metavar="NAMES")
BLOCK_SIZE = option("--block-size", "columns of a block of INT4 weights (default 128)", type=count, metavar="N")
ALGORITHM = option("--algorithm", "calibrate by this instead of the format's own: max, awq_lite, awq_clip, gptq, ...; several with +, as "
                   "rotate+gptq", metavar="NAME")
KV_CACHE = option("--kv-cache", "quantize the cache of keys and values too (default none)", choices=KV_CACHES, default="none")
CONFIG = option("--config", "a quantization config (YAML or JSON) instead of --format", type=Path, metavar="FILE")
CALIB = option("--calib", "text to calibrate with: python_docs (default), a .txt, .jsonl or .parquet file, or a data set's name",
               default="python_docs", metavar="DATA")
SAMPLES = option("--samples", "calibration samples (default 128)", type=count, default=128, metavar="N")
SEQ_LEN = option("--seq-len", "tokens per sample at most (default 512)", type=count, default=512, metavar="L")
BATCH_SIZE = option("--batch-size", "samples per batch (default 8)", type=count, default=8, metavar="B")
CALIBRATION = [CALIB, SAMPLES, SEQ_LEN, BATCH_SIZE]
CHECKPOINT_DIR = option("--checkpoint-dir", "keep progress there: the same command goes on where an interrupted one was", type=Path,
                        metavar="DIR")
OUT = option("--out", "the folder to make", type=Path, metavar="DIR")
OVERWRITE = option("--overwrite", "replace what is there", action="store_true")
DIALECT = option("--dialect", "how the checkpoint is written (default modelopt)", choices=DIALECTS)
ENGINE = option("--engine", "chooses the dialect, and refuses what the engine does not load", choices=ENGINES)
WEIGHTS_ONLY = option("--weights-only", "do not run the model, whatever its config.json asks for: for formats that need no data",
                      action="store_true")
DRY_RUN = option("--dry-run", "write nothing: say what would be done to which layers, how big the result is, and about how long it takes",
                 action="store_true")

TEXT = option("--text", "measure on this .txt file (default: a part of Python's own documentation)", default="python_docs_heldout",
              metavar="FILE")
DATASET = option("--dataset", "measure on a .jsonl or .parquet file or a data set's name, instead of --text", metavar="DATA")
WINDOW = option("--window", "tokens per window (default 512)", type=count, default=512, metavar="L")
MAX_WINDOWS = option("--max-windows", "windows to measure (default 16)", type=count, default=16, metavar="N")
MEASUREMENT = [TEXT, DATASET, WINDOW, MAX_WINDOWS]

PROMPT = option("--prompt", "what to answer", metavar="TEXT")
SYSTEM = option("--system", "what the conversation begins with", metavar="TEXT")
PLAIN = option("--plain", "complete the text as it is, without a chat template", action="store_true")
NEW_TOKENS = option("--max-new-tokens", "tokens of an answer at most (default 256)", type=count, default=256, metavar="N")
SAMPLING = [option("--temperature", "default 0: always the likeliest token", type=number, default=0.0, metavar="X"),
            option("--top-p", "draw from the likeliest tokens that have P between them", type=number, default=1.0, metavar="P"),
            option("--top-k", "draw from the K likeliest tokens (default 0: all)", type=int, default=0, metavar="K"),
            option("--seed", "of the draws (default: another each time)", type=int, metavar="N")]
GENERATION = [SYSTEM, PLAIN, NEW_TOKENS, *SAMPLING]
COMPUTE = [option("--compute", "what activations are stored as (default auto)", choices=["auto", "bfloat16", "float32"], default="auto"),
           option("--threads", "default: MODELQ_NUM_THREADS, or all processor cores", type=count, metavar="N")]
DEVICE = [option("--device", "where layers are computed: cpu (default), cuda or cuda:0", default="cpu", metavar="NAME"),
          option("--device-memory", "how much of it may be used, as 8GB (default: nine tenths of what is free)", metavar="BYTES")]
PLOT = option("--plot", "draw it (.png, .svg or .pdf; may be given again)", type=Path, action="append", default=[], metavar="FILE")


class Command(NamedTuple):
    """function: "module.name" in modelq, imported when it is run. examples: command lines without the program's name."""
    name: str
    help: str
    function: str
    options: Sequence[Option]
    examples: Sequence[str]


COMMANDS = (
    Command("quantize", "calibrate, quantize and export a checkpoint", "quantize_commands.quantize",
            [SOURCE, FORMAT, BLOCK_SIZE, ALGORITHM, KV_CACHE, CONFIG, *CALIBRATION, CHECKPOINT_DIR, OUT, OVERWRITE, DIALECT, ENGINE,
             DRY_RUN, WEIGHTS_ONLY, *COMPUTE, *DEVICE, JSON],
            ["quantize path/to/model --format nvfp4 --out model-nvfp4",
             "quantize org/model --format int4_awq --engine vllm --out model-int4",
             "quantize path/to/model --format fp8 --kv-cache fp8 --dry-run"]),
    Command("autoquantize", "a format for every layer within a budget of bits", "search_commands.autoquantize",
            [SOURCE, option("--effective-bits", "mean bits of a weight at most: 6, or 4.5,6 or 4.5..8 to compare", required=True,
                            metavar="BITS"),
             FORMATS.but(default="nvfp4,fp8", help="to choose from, as for quantize --format (default nvfp4,fp8)"), KV_CACHE,
             option("--method", "how layers are scored (default gradient)", choices=["gradient", "kl_div"], default="gradient"),
             option("--disable", "modules that stay as they are, and count in no budget (default '*lm_head*'; may be given again)",
                    action="append", metavar="PATTERN"),
             *CALIBRATION, option("--score-samples", "of them, how many are scored (default 32)", type=count, default=32, metavar="N"),
             CHECKPOINT_DIR.but(help="keep scores there: other budgets, interrupted searches and `modelq report --search` take them"),
             *MEASUREMENT, option("--no-eval", "measure nothing", action="store_true"),
             option("--no-uniform", "do not measure the formats by themselves", action="store_true"),
             PLOT.but(help="draw perplexity against bits (.png, .svg or .pdf; may be given again)"),
             PLOT._replace(flag="--plot-layers").but(help="draw which layer got which format, of the last budget (the same)"),
             OUT.but(help="export the model of a single budget"), OVERWRITE, DIALECT, ENGINE, *COMPUTE, *DEVICE, JSON],
            ["autoquantize path/to/model --effective-bits 6 --out model-6bit",
             "autoquantize path/to/model --effective-bits 4.5..8 --plot bits.png"]),
    Command("eval", "perplexity on a text", "commands.evaluate",
            [SOURCE, TEXT, DATASET, WINDOW, MAX_WINDOWS.but(default=None, help="stop after N windows (default: the whole text)"), *COMPUTE,
             *DEVICE, JSON],
            ["eval model-nvfp4", "eval model-nvfp4 --text wiki.test.txt --max-windows 16 --json"]),
    Command("chat", "talk to a model; questions are lines of stdin where it is no terminal", "chat_commands.chat",
            [SOURCE, PROMPT.but(help="one question, instead of those of stdin"), *GENERATION, *COMPUTE, JSON],
            ["chat model-nvfp4", "chat model-nvfp4 --prompt 'What is a block scale?' --temperature 0.7"]),
    Command("compare", "two models' answers side by side, and how far their next tokens are apart", "chat_commands.compare",
            [option("first", "a checkpoint folder, a .gguf file or a hub id", metavar="A"),
             option("second", "the same of the other model, such as an export of A", metavar="B"), PROMPT.but(required=True), *GENERATION,
             *COMPUTE, JSON],
            ["compare path/to/model model-nvfp4 --prompt 'What is a block scale?'"]),
    Command("bench", "accuracy kept against decode speed, for exports and formats", "bench_commands.bench",
            [SOURCE, option("directories", "exported folders of SRC to measure", nargs="*", metavar="DIR", type=Path),
             FORMATS.but(help="measure these too, quantized and exported for the occasion"), BLOCK_SIZE, *CALIBRATION, *MEASUREMENT,
             option("--decode-tokens", "tokens to decode when speed is measured (default 32)", type=count, default=32, metavar="N"),
             option("--repeat", "times to measure speed, in turns (default 3)", type=count, default=3, metavar="N"),
             PLOT, OVERWRITE.but(help="replace pictures that are there"), *COMPUTE, JSON],
            ["bench path/to/model model-nvfp4 model-fp8",
             "bench path/to/model --formats nvfp4,fp8,int4_awq,int8 --plot bench.png --plot bench.svg"]),
    Command("report", "one self-contained HTML page on an export", "report_commands.report",
            [SOURCE.but(help="the unquantized checkpoint: a folder, a .gguf file or a hub id"), DIRECTORY,
             OUT.but(help="the page to make (default report.html)", metavar="FILE", default=Path("report.html")), OVERWRITE, *MEASUREMENT,
             option("--search", "the --checkpoint-dir of the AutoQuantize search that chose the formats, to show its scores", type=Path,
                    metavar="DIR"),
             WEIGHTS_ONLY.but(help="compare weights alone, do not run the model"), *COMPUTE, JSON],
            ["report path/to/model model-nvfp4 --out report.html", "report path/to/model model-6bit --search scores --text wiki.test.txt"]),
    Command("inspect", "the tensors of a checkpoint: formats, scales, bits per weight", "commands.inspect", [SOURCE, JSON],
            ["inspect model-nvfp4", "inspect model.gguf --json"]),
    Command("convert", "write an exported folder in another dialect, or a Megatron-LM, NeMo or GGUF model as a Hugging Face folder",
            "commands.convert",
            [DIRECTORY, DIALECT.but(help="the one to write"), ENGINE.but(help="the dialect that this engine loads"),
             OUT.but(required=True), OVERWRITE, JSON],
            ["convert model-nvfp4 --dialect compressed-tensors --out model-ct", "convert model-fp8 --engine transformers --out model-hf",
             "convert llama.nemo --out llama-hf", "convert megatron/checkpoints --out llama-hf"]),
    Command("verify", "would an engine load this export? exit code 1 if not", "commands.verify",
            [DIRECTORY, ENGINE.but(help="the one to ask for (default: all; then it is an error if none would load it)"),
             option("--source", "the unquantized checkpoint: also report how far the dequantized weights are from it", metavar="SRC"),
             JSON],
            ["verify model-nvfp4 --engine vllm", "verify model-nvfp4 --source path/to/model --json"]),
    Command("formats", "the presets, number formats and block schemes, and what this machine computes with", "commands.formats", [JSON],
            ["formats", "formats --json"]),
    Command("families", "the model families that run natively, and how they are tested", "commands.families", [JSON],
            ["families", "families --json"]),
    Command("completion", "print what completes modelq's words in a shell", "completion.completion",
            [option("shell", "bash, zsh or fish", choices=SHELLS, metavar="SHELL")],
            ["completion bash > ~/.local/share/bash-completion/completions/modelq", 'completion zsh > "${fpath[1]}/_modelq"',
             "completion fish > ~/.config/fish/completions/modelq.fish"]),
)


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="modelq", description="Post-training quantization of language models without PyTorch.", epilog=EXIT_CODES,
                    formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"modelq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS:
        examples = "examples:\n" + "\n".join(f"  modelq {line}" for line in command.examples)
        sub = commands.add_parser(command.name, help=command.help, description=f"{command.help[0].upper()}{command.help[1:]}.",
                                  epilog=examples, formatter_class=raw)
        for flag, settings in command.options:
            sub.add_argument(flag, **settings)
    return parser


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Every command's parser by its name, in the order of the help."""
    action = next(action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)
