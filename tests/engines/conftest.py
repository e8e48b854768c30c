"""The engines, and the exports they are asked to load. Run by `make test-engines`, which makes their environments."""
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import families
import small_model
from processes import Engine

TREE = Path(__file__).resolve().parents[2]


def environment(name: str, variable: str) -> str:
    python = os.environ.get(variable) or str(TREE / name / "bin" / "python")
    if not Path(python).exists():
        pytest.skip(f"no environment {name}: make test-engines makes it")
    return python


def engine(python: str, *arguments: str):
    process = Engine(python, *arguments)
    yield process
    process.stop()


@pytest.fixture(scope="session")
def transformers_engine():
    yield from engine(environment(".venv-engines", "MODELQ_TRANSFORMERS_PYTHON"), "run_transformers.py")


@pytest.fixture(scope="session")
def vllm_engine():
    yield from engine(environment(".venv-vllm", "MODELQ_VLLM_PYTHON"), "run_vllm.py")


@pytest.fixture(scope="session")
def vllm_emulating():
    yield from engine(environment(".venv-vllm", "MODELQ_VLLM_PYTHON"), "run_vllm.py", "--emulate")


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """The small model, unquantized."""
    return small_model.write_model(tmp_path_factory.mktemp("engines") / "source")


def rewrite(folder: Path, target: Path, change) -> Path:
    """A copy of an export with its tensors changed: change(tensors) works on the dictionary of arrays."""
    from golden_data import read_safetensors
    from safetensors import TensorSpec, serialize_file

    shutil.copytree(folder, target)
    tensors = read_safetensors(folder)
    change(tensors)
    arrays = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
    specs = {name: TensorSpec(dtype=array.dtype.name, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes)
             for name, array in arrays.items()}
    serialize_file(specs, target / "model.safetensors", metadata={"format": "pt"})
    return target


def configuration(name: str) -> dict:
    """A preset; "A+B": with B's rules, for the KV cache, behind A's; "MIXED": FP8, with NVFP4 in the MLP."""
    import modelq.quantization as mtq

    if name == "MIXED":
        four_bits = [rule | {"quantizer_name": "*mlp." + rule["quantizer_name"]} for rule in mtq.NVFP4_DEFAULT_CFG["quant_cfg"][1:3]]
        rules = mtq.FP8_DEFAULT_CFG["quant_cfg"]
        return {**mtq.FP8_DEFAULT_CFG, "quant_cfg": [*rules[:3], *four_bits, *rules[3:]]}

    first, *rest = (getattr(mtq, part) for part in name.split("+"))
    return {**first, "quant_cfg": [*first["quant_cfg"], *(rule for other in rest for rule in other["quant_cfg"])]}


@pytest.fixture(scope="session")
def make_export(source, tmp_path_factory):
    """make_export(row, dtype): the folder of the small model quantized and exported as the row says; made once."""
    import modelq
    import modelq.quantization as mtq
    from modelq.export import export_hf_checkpoint

    made, models = {}, {}
    batches = np.random.default_rng(3).integers(2, small_model.VOCABULARY, size=(8, 64))

    def make(row, dtype: str) -> Path:
        if (row, dtype) not in made:
            if (row.config, dtype) not in models:
                model = modelq.load(source, compute=dtype)
                models[row.config, dtype] = mtq.quantize(model, configuration(row.config), lambda m: [m(batch[None]) for batch in batches])
            folder = tmp_path_factory.mktemp("export") / str(row)
            made[row, dtype] = export_hf_checkpoint(models[row.config, dtype], folder, dtype=dtype, dialect=row.dialect)
        return made[row, dtype]
    return make


@pytest.fixture(scope="session")
def families_of(tmp_path_factory):
    """families_of(engine): what makes sources and exports of families for an engine's process."""
    return lambda engine, process: FamilyExports(engine, process, tmp_path_factory.mktemp("families"))


class FamilyExports:
    def __init__(self, engine: str, process: Engine, folder: Path):
        self.engine, self.process, self.folder = engine, process, folder

    def source(self, family: str) -> Path:
        """The family's micro model, as the engine's transformers names its tensors; made once."""
        folder = self.folder / family
        if not folder.exists():
            families.write_source(family, folder, lambda **order: self.process.ask(make=order, folder=order["folder"]))
        return folder

    def export(self, family: str, row, dtype: str, rules=None) -> Path:
        """Quantized and exported as the row says; rules: behind the preset's, else what the engine needs."""
        import modelq
        import modelq.quantization as mtq
        from modelq.export import export_hf_checkpoint

        preset = configuration(row.config)
        rules = families.rules_for(self.engine, family, row.config, row.dialect) if rules is None else rules
        model = modelq.load(self.source(family), compute=dtype)
        batch = np.random.default_rng(3).integers(2, families.VOCABULARY, size=(8, 48))
        mtq.quantize(model, {**preset, "quant_cfg": [*preset["quant_cfg"], *rules]}, lambda model: model(batch))
        name = f"{family}-{row}-{len(rules)}-{dtype}"
        return export_hf_checkpoint(model, self.folder / name, dtype=dtype, dialect=row.dialect, overwrite=True)
