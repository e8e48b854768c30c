"""Data parallel: two processes with half of the data each find what one with all of it does."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

WORKER = """
import json, sys, warnings
import numpy as np, torch, transformers
import modelq.quantization as mtq
rank, world, out, cases, fails = json.loads(sys.argv[1])
torch.set_num_threads(1)
warnings.simplefilter("ignore")
def work(number, source, rows, config):
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    data = torch.from_numpy(np.load(rows))
    def loop(model):
        if fails and rank == 1:
            raise OSError("no such disk")
        for row in data[rank * len(data) // world:(rank + 1) * len(data) // world]:
            model(row[None])
    config = getattr(mtq, config) if isinstance(config, str) else {**getattr(mtq, config[0]), "algorithm": config[1]}
    mtq.quantize(model, config, loop)
    found = {name: module.amax for name, module in model.named_modules() if getattr(module, "amax", None) is not None}
    found |= {name + ":pre": module.pre_quant_scale for name, module in model.named_modules()
              if getattr(module, "pre_quant_scale", None) is not None}
    np.savez(f"{out}/found{world}_{rank}_{number}.npz", **found)
if world > 1:
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/meet", rank=rank, world_size=world)
for number, case in enumerate(cases):
    work(number, *case)
if world > 1:       # else gloo's threads may outlive what they look at
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


SEARCHER = WORKER.replace("    mtq.quantize(model, config, loop)\n", """
    batches = [{"input_ids": row[None], "labels": row[None]} for row in data[rank * len(data) // world:(rank + 1) * len(data) // world]]
    def forward_step(model, batch):
        if fails and rank == 1 and torch.is_grad_enabled():
            raise OSError("no such disk")
        return model(**batch)
    _, state = mtq.auto_quantize(model, {"effective_bits": 7}, [mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG, config], batches, forward_step,
                                 lambda output, batch: output.loss, checkpoint=f"{out}/search{world}")
    json.dump(state, open(f"{out}/state{world}_{rank}.json", "w"))
""")
CASES = [("llama", "FP8_DEFAULT_CFG"), ("llama", "INT4_AWQ_CFG"), ("qwen3moe", "INT8_DEFAULT_CFG"),
         ("llama", ["INT8_DEFAULT_CFG", {"method": "histogram", "range_method": "mse"}])]


def run(world, golden, out, cases=CASES[:1], fails=False, code=WORKER):
    given = [str(out), [(str(golden[name].source), str(golden[name].folder / "calib.npy"), config) for name, config in cases], fails]
    jobs = [subprocess.Popen([sys.executable, "-c", code, json.dumps([rank, world, *given])], cwd=out, stderr=subprocess.PIPE, text=True)
            for rank in range(world)]       # there: not the sources of modelq, but the installed one
    said = [job.communicate(timeout=300)[1] for job in jobs]
    return [job.returncode for job in jobs], said


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    """What one process found for all cases, and what each of two did."""
    folder = tmp_path_factory.mktemp("found")
    for world in (1, 2):
        codes, said = run(world, golden, folder, CASES)
        assert codes == [0] * world, said
    return folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{name}-{config}" for name, config in CASES])
def test_two_processes_find_the_same(folder, number):
    alone, first, second = (dict(np.load(folder / f"found{world}_{rank}_{number}.npz")) for world, rank in ((1, 0), (2, 0), (2, 1)))
    assert alone.keys() == first.keys() == second.keys() and len(alone) >= 14
    for key, expected in alone.items():
        np.testing.assert_array_equal(first[key], second[key])
        np.testing.assert_allclose(first[key], expected, rtol=1e-5 if "AWQ" in str(CASES[number]) else 0)


def test_one_that_fails_stops_the_other(golden, tmp_path):
    """Instead of letting it wait."""
    codes, said = run(2, golden, tmp_path, fails=True)
    assert 0 not in codes and "OSError: no such disk" in said[1] and "calibration failed in process 1: OSError: no such disk" in said[0]
    assert not list(Path(tmp_path).glob("found*"))


def test_two_processes_choose_the_same(golden, tmp_path):
    """Scores are those of all data; a search that is there already, of both, is taken."""
    for world in (1, 2, 2):
        (tmp_path / "meet").unlink(missing_ok=True)
        codes, said = run(world, golden, tmp_path, code=SEARCHER)
        assert codes == [0] * world, said
        if (tmp_path / "search2").exists():
            (tmp_path / "search2" / "process_1" / "FP8_DEFAULT_CFG.safetensors").unlink(missing_ok=True)     # both calibrate again, together
    alone, first, second = (json.loads((tmp_path / f"state{name}.json").read_text()) for name in ("1_0", "2_0", "2_1"))
    assert first == second and first["best"]["recipe"] == alone["best"]["recipe"]
    for key, group in alone["candidate_stats"].items():
        np.testing.assert_allclose(first["candidate_stats"][key]["scores"], group["scores"], rtol=1e-5)
    assert len(list((tmp_path / "search2").glob("process_*/search.json"))) == 2


def test_one_that_fails_to_score_stops_the_other(golden, tmp_path):
    codes, said = run(2, golden, tmp_path, fails=True, code=SEARCHER)
    assert 0 not in codes and "OSError: no such disk" in said[1] and "calibration failed in process 1: OSError: no such disk" in said[0]
