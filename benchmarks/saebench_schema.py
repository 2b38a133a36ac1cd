"""Does SAEBench 0.6's own schema accept the files of `evaluate --saebench_json`?

    PYTHON -m benchmarks.saebench_schema RUN_OR_GRID

with a PYTHON that has sae-bench==0.6.0 (see `benchmarks.saebench`). Each file is read
into SAEBench's output class by pydantic, strictly, and checked against the JSON schema
that the package ships. Exits with 1 if one is refused.
"""

import importlib
import json
import sys
from pathlib import Path

CLASSES = {
    "core": ("core.eval_output", "CoreEvalOutput"),
    "sparse_probing": ("sparse_probing.eval_output", "SparseProbingEvalOutput"),
    "scr": ("scr_and_tpp.eval_output", "ScrEvalOutput"),
    "tpp": ("scr_and_tpp.eval_output", "TppEvalOutput"),
    "absorption_first_letter": ("absorption.eval_output", "AbsorptionEvalOutput"),
}


def main() -> None:
    """Checks every file and prints a line for each."""
    refused = 0
    files = sorted(Path(sys.argv[1]).glob("**/evals/saebench/*_eval_results.json"))
    for path in files:
        error = check(path)
        print(f"{'refused' if error else 'accepted'}: {path}{error}")
        refused += bool(error)
    print(f"{len(files) - refused} of {len(files)} accepted")
    sys.exit(1 if refused or not files else 0)


def check(path: Path) -> str:
    """What is wrong with a file; nothing where it is accepted."""
    import jsonschema  # pyright: ignore[reportMissingModuleSource]
    import pydantic

    value = json.loads(path.read_text())
    module, name = CLASSES[value["eval_type_id"]]
    found = importlib.import_module(f"sae_bench.evals.{module}")
    schemas = Path(str(found.__file__)).parent
    schema = schemas / f"eval_output_schema_{value['eval_type_id']}.json"
    try:
        pydantic.TypeAdapter(getattr(found, name)).validate_python(value, strict=False)
        jsonschema.validate(value, json.loads(schema.read_text()))
    except (pydantic.ValidationError, jsonschema.ValidationError) as error:
        return f"\n  {error}"
    return ""


if __name__ == "__main__":
    main()
