"""The README's Python example runs as it stands, given the folder that it names."""
import re
import shutil
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_the_example_runs(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    code, = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len([line for line in code.splitlines() if line]) == 10
    shutil.copytree(tiny_checkpoint, tmp_path / "path" / "to" / "checkpoint")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1] == "(1, 3, 256)"
    assert (tmp_path / "checkpoint-nvfp4" / "hf_quant_config.json").exists()


def test_the_commands_exist():
    from modelq.cli import make_parser

    parser = make_parser()
    for line in re.findall(r"^    modelq (.+)$", README, flags=re.M):
        assert parser.parse_args(line.split()).command == line.split()[0]


def test_links_lead_somewhere():
    root = Path(__file__).resolve().parents[1]
    pages = [root / "README.md", root / "CONTRIBUTING.md", *(root / "docs").glob("*.md")]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
        for named in re.findall(r"(?<![\w/.-])((?:docs|tests|modelq|csrc|scripts|notebooks)/[\w/.-]+\.(?:md|py|c|h|def|ipynb))", text):
            assert (root / named).exists(), f"{page.name}: {named}"


def test_the_engines_of_each_format(smollm2):
    """docs/choosing.md says who loads what, and an export is refused just where it does not."""
    import modelq
    from modelq.choices import preset, with_block_size
    from modelq.export import check_exportable

    model, page = modelq.load(smollm2), (Path(__file__).resolve().parents[1] / "docs" / "choosing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| `(\w+)(?: --block-size (\d+))?` \|.*\| ([^|]+) \|$", page, flags=re.M)
    assert len(rows) > 8
    for name, block_size, engines in rows:
        config = with_block_size(preset(name), int(block_size)) if block_size else preset(name)
        for engine in ("vLLM", "SGLang", "TensorRT-LLM", "transformers"):
            if engine in engines:
                check_exportable(model, config, engine=engine.lower())
            else:
                with pytest.raises(ValueError, match=engine.lower()):
                    check_exportable(model, config, engine=engine.lower())
