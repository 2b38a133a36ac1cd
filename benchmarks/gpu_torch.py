"""The peers' TopK and vSAE steps in plain torch, for `benchmarks.gpu`.

Written from the equations (docs/paper_and_code.md 1), as fast as plain torch goes:
top-k by `torch.topk`, a scattered dense decode, fused Adam, and no read of the device
within a step, which the peers have (`loss.item()`, the count of dead latents).

    pre = (x - b_dec) w_enc + b_enc;   z = relu(pre), or pre + eps for the vSAE
    loss = mean_batch ||x - topk(z) w_dec - b_dec||^2 + beta / 2 mean_batch ||pre||^2
"""

import sys
import time
from collections.abc import Callable

import torch

from benchmarks.gpu_cases import Case, answer_all

BETA, RATE, CLIP = 0.1, 4e-4, 1.0
COMPILE_MODES = {"compiled": "default", "cudagraphs": "reduce-overhead"}


def measure(case: Case) -> dict[str, float]:
    """Milliseconds a step on the device, peak bytes, and seconds of the first step."""
    device = torch.device("cuda" if case.platform == "gpu" else "cpu")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    # Or, after eight shapes of one function, torch would no longer compile it.
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    x = torch.randn(4, case.batch, case.d_model, device=device)
    if case.mode == "bfloat16":
        # Rows lie in bfloat16, as ours do.
        x = x.bfloat16()
    step = make_step(case, device)
    start = time.perf_counter()
    step(x[0])
    _wait(device)
    first_seconds = time.perf_counter() - start
    for i in range(5):
        step(x[i % len(x)])
    one_ms = _timed(step, x, 3, device)
    count = max(int(1e3 * case.seconds / one_ms), 3)
    ms = [_timed(step, x, count, device) for _ in range(case.rounds)]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {"ms": sorted(ms)[len(ms) // 2], "low_ms": min(ms), "high_ms": max(ms)} | {
        "first_seconds": first_seconds,
        "peak_bytes": peak,
    }


def make_step(case: Case, device: torch.device) -> Callable[[torch.Tensor], None]:
    """One optimizer step on raw rows: counters, clipping, Adam, unit-norm decoder."""
    d, m = case.d_model, case.d_sae
    w_dec = torch.nn.functional.normalize(torch.randn(m, d, device=device), dim=1)
    parameters = {
        "w_enc": w_dec.T.clone(),
        "b_enc": torch.zeros(m, device=device),
        "w_dec": w_dec,
        "b_dec": torch.zeros(d, device=device),
    }
    for parameter in parameters.values():
        parameter.requires_grad_()
    since_fired = torch.zeros(m, dtype=torch.long, device=device)
    adam = torch.optim.Adam(list(parameters.values()), lr=RATE, fused=True)
    loss = _compiled(vsae_loss if case.variant == "vsae_topk" else topk_loss, case)
    tangent, normalise = _compiled(remove_parallel, case), _compiled(unit_norm, case)
    autocast = torch.autocast(
        device.type, dtype=torch.bfloat16, enabled=case.mode == "bfloat16"
    )

    def step(x: torch.Tensor) -> None:
        if case.kind == "cudagraphs":
            torch.compiler.cudagraph_mark_step_begin()
        with autocast:
            value, index = loss(parameters, x, case.k)
        value.backward()
        with torch.no_grad():
            fired = torch.zeros_like(since_fired, dtype=torch.bool)
            fired[index.flatten()] = True
            since_fired.add_(len(x)).masked_fill_(fired, 0)
            w_dec.grad = tangent(w_dec, w_dec.grad)
            torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP, foreach=True)
            adam.step()
            w_dec.copy_(normalise(w_dec))
        adam.zero_grad(set_to_none=True)

    return step


def topk_loss(p: dict[str, torch.Tensor], x: torch.Tensor, k: int):
    """Squared error of the k largest relu(pre), and which they were."""
    x = x.float()
    z = torch.relu((x - p["b_dec"]) @ p["w_enc"] + p["b_enc"])
    x_hat, index = _decode(p, z, k)
    return (x - x_hat).pow(2).sum(-1).mean(), index


def vsae_loss(p: dict[str, torch.Tensor], x: torch.Tensor, k: int):
    """Squared error of the k largest mu + eps, and the KL of every mu."""
    x = x.float()
    mu = (x - p["b_dec"]) @ p["w_enc"] + p["b_enc"]
    x_hat, index = _decode(p, mu + torch.randn_like(mu), k)
    kl = 0.5 * mu.float().pow(2).sum(-1)
    return ((x - x_hat).pow(2).sum(-1) + BETA * kl).mean(), index


def _decode(p: dict[str, torch.Tensor], z: torch.Tensor, k: int):
    value, index = z.topk(k, dim=-1, sorted=False)
    f = torch.zeros_like(z).scatter(-1, index, value)
    return f @ p["w_dec"] + p["b_dec"], index


def remove_parallel(w: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The decoder's gradient without its part along each unit row."""
    return gradient - (gradient * w).sum(1, keepdim=True) * w


def unit_norm(w: torch.Tensor) -> torch.Tensor:
    """Rows of norm 1."""
    return w / w.norm(dim=1, keepdim=True).clamp_min(1e-8)


def _compiled(function: Callable, case: Case) -> Callable:
    if case.kind == "eager":
        return function
    # A graph's outputs are overwritten by the next replay: only the loss is one.
    mode = COMPILE_MODES[
        case.kind if function in (topk_loss, vsae_loss) else "compiled"
    ]
    return torch.compile(function, mode=mode, dynamic=False)


def _timed(step: Callable, x: torch.Tensor, count: int, device: torch.device) -> float:
    """Milliseconds a step: between two events on a GPU, by the clock on a CPU."""
    if device.type == "cpu":
        start = time.perf_counter()
        for i in range(count):
            step(x[i % len(x)])
        return 1e3 * (time.perf_counter() - start) / count
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for i in range(count):
        step(x[i % len(x)])
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    versions = {"torch": torch.__version__}
    answer_all(measure, versions=lambda *_: versions, errors=(RuntimeError,))
    sys.exit()
