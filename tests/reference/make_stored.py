"""Makes tests/data/reference of what run_reference.py wrote: of every format one family, for the suite that runs without the reference.

    python tests/reference/run_reference.py OUT && python tests/reference/make_stored.py OUT tests/data/reference

The first in the reference's environment, the second in modelq's. A file's export: name -> dtype, shape, digest of the bytes, and, where a
value may be near instead of equal, the bytes (zlib, base64).
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from reference_cases import STORED, folder_of       # noqa: E402
from comparison import bases_of, packed, read_export      # noqa: E402
from golden_data import read_safetensors      # noqa: E402


def main() -> None:
    made, target = Path(sys.argv[1]), Path(sys.argv[2])
    target.mkdir(exist_ok=True)
    for format, family in STORED.items():
        tensors, words = read_export(made / family / folder_of(format), family, format)
        source = made / family / "source"
        said = {"config": json.loads((source / "config.json").read_text()), "source": bases_of(read_safetensors(source)),
                "export": packed(tensors), "words": words}
        (target / f"{folder_of(format)}.json").write_text(json.dumps(said, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
