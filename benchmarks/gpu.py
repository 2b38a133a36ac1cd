"""`python -m benchmarks.gpu`: our step and plain torch's on one GPU, in six minutes.

Torch runs the peers' TopK and vSAE steps, written here from the equations: eager, with
`torch.compile` and with its CUDA graphs, in float32 (TF32) and under bfloat16 autocast.
Each library has a process of its own, one after the other, on rows that lie on the
device. Torch is timed by CUDA events, JAX by waiting for the last of many steps. Beside
them: a grid against its arms one after another, the ways to select, and what share of a
step is the least time that the device would need. `--platform=cpu --quick` runs the
same code at tiny sizes.
"""

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu_cases import Case
from benchmarks.table import markdown
from benchmarks.train_step import Shape, read_shapes
from benchmarks.turns import ROOT
from vsae_jax.config import cli
from vsae_jax.config.fields import check_above_zero, check_at_least, flag
from vsae_jax.system.errors import UserError

SHAPES = (
    "2048x64x1024,8192x256x8192,8192x256x1024,2048x256x8192,2048x512x1024,8192x512x8192"
)
# variant, kind, dtype of the operands
TORCH = (
    ("topk", "eager", "bfloat16"),
    ("topk", "compiled", "bfloat16"),
    ("topk", "cudagraphs", "bfloat16"),
    ("vsae_topk", "eager", "bfloat16"),
    ("vsae_topk", "compiled", "bfloat16"),
    ("vsae_topk", "cudagraphs", "bfloat16"),
    ("topk", "eager", "float32"),
)
# and how we select
OURS = (
    ("topk", "single", "bfloat16", "auto"),
    ("vsae_topk", "single", "bfloat16", "auto"),
    ("vsae_topk", "grid", "bfloat16", "auto"),
    ("vsae_topk", "turns", "bfloat16", "auto"),
    ("topk", "single", "float32", "auto"),
    ("topk", "single", "bfloat16", "kernel"),
    ("vsae_topk", "single", "bfloat16", "kernel"),
    ("vsae_topk", "grid", "bfloat16", "kernel"),
    ("topk", "known", "bfloat16", "auto"),
    ("topk", "known", "bfloat16", "kernel"),
    ("topk", "graphs", "bfloat16", "kernel"),
    ("topk", "select", "float32", "auto"),
    ("topk", "select", "float32", "kernel"),
    ("topk", "select", "float32", "lax"),
)
# Of the budget; most of it is compiling.
_SHARES = {"jax": 0.67, "torch": 0.33}
_GRACE_SECONDS = 60


@dataclass(frozen=True)
class GpuConfig:
    """Times our step, a grid of it and plain torch's on one CUDA GPU."""

    platform: Literal["gpu", "cpu"] = flag("cpu only tests the code's path", "gpu")
    quick: bool = flag("tiny sizes and one round", False)
    shapes: str = flag("comma list of d_sae x k x batch, most wanted first", SHAPES)
    d_model: int = flag("width of the activations", 512)
    arms: int = flag("arms of the grid", 16)
    torch_python: str = flag("interpreter that has torch; unset: this one", "")
    budget_seconds: float = flag("for all; what it does not reach is named", 300.0)
    rounds: int = flag("measurements of each step", 3)
    out: str = flag("JSON file for what was measured", "gpu.json")

    def __post_init__(self):
        check_at_least(self, 1, "d_model", "arms", "rounds")
        check_above_zero(self, "budget_seconds")
        read_shapes(self.shapes)
        if self.torch_python and not Path(self.torch_python).is_file():
            raise UserError(f"--torch_python={self.torch_python} is no interpreter")


def command(configs: Sequence[GpuConfig]) -> None:
    """Prints a table for each shape and writes everything to `--out`."""
    config = configs[0]
    cases = [case for shape in _shapes(config) for case in _cases(config, shape)]
    environment: dict[str, Any] = {"hardware": _hardware(config)}
    results: list[dict[str, Any]] = []
    for library in _SHARES:
        mine = [case for case in cases if case.library == library]
        versions, measured = _run(config, library, mine)
        environment |= versions
        results += measured
    record = {
        "date": datetime.date.today().isoformat(),
        "config": asdict(config),
        "environment": environment,
        "results": results,
    }
    Path(config.out).write_text(json.dumps(record, indent=1) + "\n")
    print(f"{environment}, load average {os.getloadavg()[0]:.1f}")
    for shape in _shapes(config):
        of_shape = [r for r in results if Case(**r["of"]).shape == _name(shape)]
        rows = _rows(of_shape, _least_ms(environment, cases[0].d_model, shape))
        print(f"\nd_model {cases[0].d_model}, {_name(shape)}\n{markdown(rows)}")


def _shapes(config: GpuConfig) -> list[Shape]:
    return [Shape(256, 8, 64)] if config.quick else read_shapes(config.shapes)


def _cases(config: GpuConfig, shape: Shape) -> list[Case]:
    steps = [("torch", *step, "auto") for step in TORCH]
    steps += [("jax", *step) for step in OURS]
    return [
        Case(
            library=library,
            kind=kind,
            variant=variant,
            mode=mode,
            d_model=32 if config.quick else config.d_model,
            **shape._asdict(),
            platform=config.platform,
            seconds=0.02 if config.quick else 0.2,
            rounds=1 if config.quick else config.rounds,
            arms=config.arms if kind in ("grid", "turns") else 1,
            top_k=top_k,
        )
        for library, variant, kind, mode, top_k in steps
    ]


def _run(
    config: GpuConfig, library: str, cases: Sequence[Case]
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """One library's process: versions, and each case with its result or why not."""
    own = config.torch_python if library == "torch" else ""
    budget = config.budget_seconds * _SHARES[library]
    request = {"budget_seconds": budget, "cases": [case._asdict() for case in cases]}
    process = subprocess.Popen(
        [
            os.path.abspath(own) if own else sys.executable,
            "-m",
            f"benchmarks.gpu_{library}",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": _PLATFORMS[config.platform]},
    )
    try:
        text, _ = process.communicate(json.dumps(request), budget + _GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()
    answers = [json.loads(line) for line in text.splitlines()]
    if not answers:
        raise UserError(
            f"benchmarks.gpu_{library} did not start: see above; for torch in another "
            "environment give --torch_python"
        )
    by_case = {answer["case"]: answer for answer in answers[1:]}
    ended = {"skipped": f"the process ended with status {process.returncode}"}
    return answers[0], [
        {"of": case._asdict()} | by_case.get(number, ended)
        for number, case in enumerate(cases)
    ]


def _name(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _least_ms(limits: dict[str, Any], d: int, shape: Shape) -> float:
    """The least time of a bfloat16 step on the device as it was measured: that of its
    five products, or that of moving what cannot stay on the chip, if that is more.

    Moved are, read and written in float32, the weights and Adam's two moments, and the
    gradients, which wait for their norm; each batch's z, f and its gradient, written by
    one product and read by another, in two bytes.
    """
    m, _, batch = shape
    products = 10 * batch * d * m / limits["bfloat16_flop_per_second"]
    moved = 2 * 2 * batch * m * 3 + 2 * 4 * 2 * d * m * 4
    return 1e3 * max(products, moved / limits["copy_bytes_per_second"])


_PLATFORMS = {"gpu": "cuda,cpu", "cpu": "cpu"}


def _rows(results: Sequence[dict[str, Any]], least_ms: float) -> list[dict[str, Any]]:
    """One row for each step of a shape, for one arm of several, beside the fastest
    torch of its variant."""
    rows = []
    for result in results:
        case = Case(**result["of"])
        name = f"{case.library} {case.variant} {case.kind}"
        if case.arms > 1:
            name += f", 1 of {case.arms}"
        if case.top_k != "auto":
            name += f", {case.top_k}"
        row = {"step": name, "mode": case.mode} | dict.fromkeys(_COLUMNS)
        rows.append(row)
        if "skipped" in result:
            row["ms a step"] = result["skipped"]
            continue
        low, ms, high = (result[n] / case.arms for n in ("low_ms", "ms", "high_ms"))
        row["ms a step"] = f"{ms:.3f} ({low:.3f} to {high:.3f})"
        row["peak MB"] = result["peak_bytes"] / 1e6
        row["first call s"] = result["first_seconds"]
        if case.kind == "select":
            continue
        torch = [
            r["ms"]
            for r in results
            if r["of"]["library"] == "torch"
            and r["of"]["variant"] == case.variant
            and "ms" in r
        ]
        row["times the fastest torch"] = min(torch) / ms if torch else None
        if case.mode == "bfloat16":
            row["of the least time"] = least_ms / ms
    return rows


_COLUMNS = (
    "ms a step",
    "times the fastest torch",
    "of the least time",
    "peak MB",
    "first call s",
)


def _hardware(config: GpuConfig) -> str:
    if config.platform == "cpu":
        return "cpu"
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return subprocess.run(
        query, capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    cli.main(command, GpuConfig)
