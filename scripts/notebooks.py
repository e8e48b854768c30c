"""The notebooks: run from top to bottom, stored with their outputs, and checked.

    python scripts/notebooks.py [NAME ...]     # runs notebooks/NAME*.ipynb (all) and stores their outputs; needs nbclient, ipykernel
    python scripts/notebooks.py --check        # only looks at what is stored

Cells have tags in their metadata. The first is the cell's name, by which PROMISED says what it must print; "figure" is for those that draw.
Nothing that changes from run to run is stored: no times, no versions, no progress bars.
"""
from __future__ import annotations

import argparse
import base64
import io
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
MOST_BYTES = 300_000
TIMEOUT = 1800      # seconds, for one cell
INLINE = "module://matplotlib_inline.backend_inline"
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}

# What cells must print, by notebook and name of the cell: a pattern that re.search finds.
PROMISED = {
    "1_FP4-FP8_PTQ_Min-Max_Calibration": {
        "load": r"llama, 30 layers", "data": r"TokenBatches\(", "before": r"perplexity before: \d+\.\d+\n\n\w+",
        "quantize-fp8": r"420 quantizers on",
        "after-fp8": r"perplexity with FP8: \d+\.\d+\n\n\w+",
        "summary": r"q_proj.input_quantizer +TensorQuantizer\(\(4, 3\) bit.*In high precision:.*lm_head.*TensorQuantizers found",
        "export-fp8": r"bytes  config.json.*hf_quant_config.json.*safetensors", "reopen-fp8": r"reopened export: (\S+), simulated: \1",
        "nvfp4": r"NVFP4: (\S+), of the reopened export: \1\n\n\w+",
        "torch": r"not installed|windows? before: .*TensorQuantizer.*with FP8: .*reopened export: \d"},
    "2_PTQ_AWQ_Calibration": {
        "load": r"llama, 30 layers.*TokenBatches\(", "before": r"perplexity before: \d+\.\d+\n\n\w+",
        "why-64": r"576 columns with block 128: use block_size 64 or 192", "config": r"-1: 64.*awq_lite.*modelopt",
        "plain": r"plain: \d+\.\d+\n\n\w+", "quantize": r"with AWQ: \d+\.\d+\n\n\w+",
        "summary": r"q_proj.input_quantizer +TensorQuantizer\(disabled pre_quant_scale.*In high precision:.*smoothed by .*: 210 linears",
        "block-sizes": r"bfloat16 +\d.*max, blocks of 64 +\d.*AWQ, blocks of 64 +\d.*AWQ, blocks of 192 +\d",
        "export": r"MB of weights", "engine": r"vLLM: nothing found; perplexity \d",
        "reopen": r"reopened export: \d+\.\d+, simulated: \d+\.\d+\n\n\w+",
        "torch": r"not installed|windows? before: .*TensorQuantizer.*with AWQ: .*reopened export: \d"},
    "3_PTQ_AutoQuantization": {
        "load": r"llama, 30 layers.*TokenBatches\(", "before": r"perplexity before: \d+\.\d+\n\n\w+", "formats": r"\[kv\]_bmm_quantizer",
        "search": r"[56]\.\d+ bits per weight: \d+ groups in FP8_DEFAULT_CFG.*\d+ groups in NVFP4_DEFAULT_CFG",
        "kv": r"60 quantizers of keys and values are on", "summary": r"v_bmm_quantizer +TensorQuantizer\(\(4, 3\).*In high precision:",
        "after": r"with 6 bits: \d+\.\d+\n\n\w+", "export": r"MB of weights.*TensorRT-LLM: 0 errors",
        "reopen": r"reopened export: (\S+), simulated: \1\n\n\w+", "budgets": r"5 bits: perplexity \d.*all nvfp4: .*all fp8: ",
        "torch": r"not installed|windows? before: .*chose the same for.*with 6 bits: .*reopened export: \d"},
}


def stored(name: str = "") -> list[Path]:
    """The notebooks whose names begin so."""
    return sorted(FOLDER.glob(f"{name}*.ipynb"))


def execute(path: Path, folder: Path, quick: bool = False, **environment: str) -> Any:
    """The notebook with the outputs of a run from top to bottom within a folder, by this interpreter. An exception in a cell is raised
    here (nbclient.exceptions.CellExecutionError)."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(path, as_version=4)
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    environment = {**os.environ, "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "MODELQ_NOTEBOOK_QUICK": str(int(quick)), "MPLBACKEND": INLINE,
                   "IPYTHONDIR": str(folder / ".ipython"), **environment}
    client = NotebookClient(book, timeout=TIMEOUT, record_timing=False, coalesce_streams=True,
                            resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    return book


def tidied(book: Any) -> Any:
    """Without what changes from run to run, its pictures small."""
    book.metadata = METADATA
    for cell in book.cells:
        cell.metadata = {"tags": cell.metadata["tags"]} if "tags" in cell.metadata else {}
        for output in cell.get("outputs", []):
            output.metadata = {}
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
    return book


def smaller(png: str) -> str:
    """A picture (base64) in 256 colours: plots have no more that anybody could tell apart."""
    from PIL import Image

    made = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(made, "PNG", optimize=True)
    return base64.b64encode(made.getvalue()).decode()


def name_of(cell: Any) -> str:
    return cell.metadata.get("tags", [""])[0]


def printed(cell: Any) -> str:
    """What a cell wrote to stdout, and the text of its values."""
    return "".join(output.get("text", "") if output.get("name") == "stdout" else output.get("data", {}).get("text/plain", "")
                   for output in cell.outputs)


def mistakes(book: Any, name: str) -> list[str]:
    """What is missing in a notebook with outputs."""
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    found = [f"cell {number} was not run in its place" for number, cell in enumerate(cells, 1) if cell.execution_count != number]
    found += [f"{name_of(cell)}: {output.output_type} {output.get('name', '')}: {output.get('text', output.get('ename'))}" for cell in cells
              for output in cell.outputs if output.output_type == "error" or output.get("name") == "stderr"]
    named = {name_of(cell): cell for cell in cells}
    for wanted, pattern in PROMISED[name].items():
        if wanted not in named:
            found.append(f"{wanted}: there is no such cell")
        elif not re.search(pattern, printed(named[wanted]), flags=re.S):
            found.append(f"{wanted}: {pattern!r} is not in {printed(named[wanted])!r}")
    for cell in cells:
        for reopened, simulated in re.findall(r"reopened export: ([\d.]+), simulated: ([\d.]+)", printed(cell)):
            if abs(float(reopened) / float(simulated) - 1) > 0.01:
                found.append(f"{name_of(cell)}: the export is not what was simulated: {reopened}, {simulated}")
        pictures = sum("image/png" in output.get("data", {}) for output in cell.outputs)
        if pictures != ("figure" in cell.metadata.get("tags", [])):
            found.append(f"{name_of(cell)}: {pictures} pictures")
    return found


def check(path: Path) -> list[str]:
    """What is wrong with a stored notebook."""
    import nbformat

    found = mistakes(nbformat.read(path, as_version=4), path.stem)
    text = path.read_text(encoding="utf-8")
    found += [f"{path.stat().st_size} bytes, more than {MOST_BYTES}"] * (path.stat().st_size > MOST_BYTES)
    places = sorted(set(re.findall(r"/(?:home|tmp|work|root)/[\w.-]+", text)))
    return found + [f"it names a place on some machine: {place}" for place in places]


def main() -> None:
    import nbformat

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[""])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    wrong = 0
    for path in [path for name in args.names for path in stored(name)]:
        if not args.check:
            with tempfile.TemporaryDirectory() as folder:
                book = tidied(execute(path, Path(folder)))
            nbformat.write(book, path)
        found = check(path)
        wrong += len(found)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB", *found, sep="\n    ")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
