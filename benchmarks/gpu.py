"""The kernels and the model on a GPU: first the tests, then times beside their peers and beside the memory's speed.

    PYTHONPATH=src python -m benchmarks.gpu --output results/gpu.json

Resumable: what the file holds is not measured again, and `--minutes` ends it in time (the same line goes on). It needs
torch, Triton and transformers only, and runs from the source tree. mamba-ssm is measured beside the kernels where it
can be imported. Prints a short table last.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from benchmarks.measure import stamp
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModel

from mabert import MaBertConfig, MaBertForMaskedLM
from mabert.experiments.architectures import architecture
from mabert.experiments.scales import base
from mabert.files import atomic_write
from mabert.ops import depthwise_conv, selective_scan

INNER, STATE, WIDTH = 1536, 16, 4
KERNEL_SHAPES = [(32, length) for length in (4096, 512, 2048, 128, 1024)] + [
    (1, length) for length in (4096, 512, 65536, 16384, 2048)
]
MODEL_SHAPES = [(32, 128), (32, 512), (8, 2048), (4, 4096), (1, 128), (1, 512), (1, 4096), (1, 16384)]
# Reads and writes of tensors of x's size; neither the narrow ones nor what a kernel keeps or sums up for itself.
ROWS_MOVED = {"scan forward": 4, "scan backward": 7, "conv forward": 2, "conv backward": 3}
H200_DENSE_BF16_FLOPS = 989e12
# The files with tests marked `gpu`: others need packages for training to be collected.
TESTS = (
    "tests/ops/test_triton.py",
    "tests/layers/test_causal_layers.py",
    "tests/layers/test_parallel.py",
    "tests/models/test_causal.py",
)
console = Console()


@dataclass(frozen=True)
class Cell:
    """One thing to measure: a name that tells it from all others, and how."""

    name: str
    measure: Callable[[], dict[str, object]]


def milliseconds(run: Callable[[], object], *, at_most: int = 50, seconds: float = 0.5) -> dict[str, object]:
    """Median and quartiles by the GPU's clock, after three runs that do not count."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < 5 or (len(samples) < at_most and time.perf_counter() < end):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        samples.append(start.elapsed_time(stop))
    lower, median, upper = torch.tensor(samples).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return {
        "median_ms": median,
        "lower_quartile_ms": lower,
        "upper_quartile_ms": upper,
        "repetitions": len(samples),
    }


def peak_bytes(run: Callable[[], object]) -> int:
    """Memory allocated at most while `run` runs, above what was allocated before."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_rate() -> dict[str, object]:
    """Bytes a second of a large copy, read and written: what a kernel that only moves memory could reach."""
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    result = milliseconds(lambda: target.copy_(source))
    return result | {"bytes_per_s": 2 * source.nbytes / (float(str(result["median_ms"])) * 1e-3)}


def scan_inputs(batch: int, length: int, grad: bool) -> dict[str, Tensor]:
    """As a freshly initialised base-size layer would give them."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    inputs = {
        "x": randn(batch, length, INNER),
        "delta": randn(batch, length, INNER) * 0.1,
        "A": -torch.arange(1.0, STATE + 1, device="cuda").expand(INNER, STATE).contiguous(),
        "B": randn(batch, length, STATE),
        "C": randn(batch, length, STATE),
        "D": torch.ones(INNER, device="cuda"),
        "z": randn(batch, length, INNER),
        "delta_bias": torch.randn(INNER, device="cuda") - 4,
    }
    return {name: t.requires_grad_(grad) for name, t in inputs.items()}


def scan_cell(batch: int, length: int, backend: str, backwards: bool) -> dict[str, object]:
    """The scan alone; the backward without its forward."""
    inputs = scan_inputs(batch, length, backwards)
    if not backwards:
        with torch.no_grad():
            return milliseconds(partial(selective_scan, **inputs, backend=backend))
    y = selective_scan(**inputs, backend=backend)
    assert isinstance(y, Tensor)
    return backward_alone(y, list(inputs.values()))


def conv_cell(batch: int, length: int, backwards: bool) -> dict[str, object]:
    """The convolution alone, over half of a wider tensor, as the layer calls it."""
    wide = torch.randn(batch, length, 2 * INNER, device="cuda", dtype=torch.bfloat16)
    x = wide[..., :INNER].detach().requires_grad_(backwards)
    weight = torch.randn(INNER, WIDTH, device="cuda", requires_grad=backwards)
    bias = torch.randn(INNER, device="cuda", requires_grad=backwards)
    run = partial(depthwise_conv, x, weight, bias, activation="silu")
    if not backwards:
        return milliseconds(run)
    return backward_alone(run(), [x, weight, bias])


def backward_alone(y: Tensor, inputs: list[Tensor], *, seconds: float = 0.5) -> dict[str, object]:
    """Time of the gradients."""
    dy = torch.randn_like(y)
    return milliseconds(lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True), seconds=seconds)


def mamba_ssm_cell(batch: int, length: int, backwards: bool) -> dict[str, object]:
    """mamba-ssm's CUDA kernel on the same values; time is last in its tensors."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    inputs = {
        name: t.detach().mT.contiguous().requires_grad_(backwards) if t.dim() == 3 else t
        for name, t in scan_inputs(batch, length, backwards).items()
    }
    run = partial(
        selective_scan_fn, inputs["x"], inputs["delta"], inputs["A"], inputs["B"], inputs["C"], inputs["D"],
        z=inputs["z"], delta_bias=inputs["delta_bias"], delta_softplus=True,
    )  # fmt: skip
    return backward_alone(run(), list(inputs.values())) if backwards else milliseconds(run)


def model_names(length: int) -> list[str]:
    """Encoders of base size that are measured at a length."""
    long = ["MaBERT", "BERT", "ModernBERT"]
    return long if length > 4096 else [*long, "BERT without flash", "ALBERT", "Longformer", "BigBird", "DeBERTa"]


def model_cell(name: str, batch: int, length: int, training: bool) -> dict[str, object]:
    """Inference, or a training step without the optimizer, in bf16 autocast; out of memory is a result."""
    torch.manual_seed(0)
    config = architecture(name.removesuffix(" without flash"), base(), longest=length)
    model = AutoModel.from_config(config).cuda().train(training)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for field in ("attention_probs_dropout_prob", "attention_dropout"):
        if hasattr(model.config, field):
            setattr(model.config, field, 0.0)
    ids = torch.randint(5, 30000, (batch, length), device="cuda")
    mask = torch.ones_like(ids)

    def step() -> None:
        output = model(ids, attention_mask=mask).last_hidden_state
        if training:
            output.float().square().mean().backward()
            model.zero_grad(set_to_none=True)

    kernels = [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]
    if name != "BERT without flash":
        kernels += [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    try:
        with torch.set_grad_enabled(training), torch.autocast("cuda", torch.bfloat16), sdpa_kernel(kernels):
            step()
            return milliseconds(step, at_most=20, seconds=0.5) | {"peak_bytes": peak_bytes(step)}
    except torch.cuda.OutOfMemoryError:
        return {"out_of_memory": True}


def pretraining_cell(batch: int, length: int, compiled: bool) -> dict[str, object]:
    """A masked-language-modelling step of the base model with its optimizer: tokens a second, and what share of the
    dense bf16 peak of an H200 the model's own operations are (recomputation not counted).
    """
    torch.manual_seed(0)
    config = MaBertConfig.base(attention_probs_dropout_prob=0.0)
    model = MaBertForMaskedLM(config).cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(5, config.vocab_size, (batch, length), device="cuda")
    labels = ids.masked_fill(torch.rand(ids.shape, device="cuda") > 0.15, -100)
    mask = torch.ones_like(ids)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = forward(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    result = milliseconds(step, at_most=20, seconds=3.0) | {"peak_bytes": peak_bytes(step)}
    tokens_per_s = batch * length / (float(str(result["median_ms"])) * 1e-3)
    flops = flops_per_token(model, config, length)
    return result | {
        "tokens_per_s": tokens_per_s,
        "flops_per_token": flops,
        "model_flop_utilisation": tokens_per_s * flops / H200_DENSE_BF16_FLOPS,
    }


def flops_per_token(model: MaBertForMaskedLM, config: MaBertConfig, length: int) -> float:
    """Operations of a training step: six a weight that is multiplied with (embeddings are looked up; the output matrix
    sees the masked 15% only), twelve a head feature and key in a T layer, and the scan's own.
    """
    names = {name for name, _ in model.named_parameters() if "embedding" not in name and "A_log" not in name}
    matrices = sum(p.numel() for name, p in model.named_parameters() if name in names and p.dim() == 2)
    head = 0.15 * config.vocab_size * config.hidden_size
    attention = 2 * config.pattern.count("T") * length * config.hidden_size
    scan = config.pattern.count("M") * 3 * config.inner_size * config.state_size
    return 6.0 * (matrices + head + attention + scan)


def cells() -> Iterator[Cell]:
    """Everything, what matters most first."""
    yield Cell("copy", copy_rate)
    for batch, length in KERNEL_SHAPES:
        for backwards in (False, True):
            way = "backward" if backwards else "forward"
            shape = f"{batch} x {length}"
            yield Cell(f"scan {way}, triton, {shape}", partial(scan_cell, batch, length, "triton", backwards))
            yield Cell(f"conv {way}, triton, {shape}", partial(conv_cell, batch, length, backwards))
            if mamba_ssm_is_there():
                yield Cell(f"scan {way}, mamba-ssm, {shape}", partial(mamba_ssm_cell, batch, length, backwards))
            if batch * length <= 4096:
                yield Cell(f"scan {way}, torch, {shape}", partial(scan_cell, batch, length, "torch", backwards))
    for compiled in (False, True):
        name = f"pretraining, 64 x 512{', compiled' if compiled else ''}"
        yield Cell(name, partial(pretraining_cell, 64, 512, compiled))
    for training in (False, True):
        for batch, length in MODEL_SHAPES:
            for model in model_names(length):
                way = "training" if training else "inference"
                yield Cell(f"{way}, {model}, {batch} x {length}", partial(model_cell, model, batch, length, training))


def mamba_ssm_is_there() -> bool:
    """Whether mamba-ssm's kernel can be imported."""
    try:
        import mamba_ssm.ops.selective_scan_interface  # noqa: F401
    except ImportError:
        return False
    return True


def summary(results: dict[str, dict]) -> Table:
    """Times, and for the kernels how many times the floor that the copy's speed allows."""
    table = Table("what", "median ms", "over the memory's floor", "peak MiB")
    rate = results.get("copy", {}).get("bytes_per_s")
    for name, result in results.items():
        kind = name.split(",")[0]
        over = ""
        if rate and kind in ROWS_MOVED and "median_ms" in result:
            batch, length = (int(number) for number in name.rsplit(", ", 1)[1].split(" x "))
            floor_ms = ROWS_MOVED[kind] * batch * length * INNER * 2 / rate * 1e3
            over = f"{result['median_ms'] / floor_ms:.1f}x"
        if "model_flop_utilisation" in result:
            over = f"{result['tokens_per_s']:,.0f} tokens/s, MFU {result['model_flop_utilisation']:.1%}"
        peak = f"{result['peak_bytes'] / 2**20:,.0f}" if "peak_bytes" in result else ""
        if "error" in result:
            shown = result["error"][:60]
        else:
            shown = "out of memory" if "out_of_memory" in result else f"{result['median_ms']:.3f}"
        table.add_row(name, shown, over, peak)
    return table


def main() -> None:
    """Tests, then cells until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/gpu.json"))
    parser.add_argument("--minutes", type=float, default=8.5, help="stop before this many (default 8.5)")
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--no-tests", action="store_true", help="measure without running the tests first")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    if not torch.cuda.is_available():
        parser.exit(2, "there is no GPU: nothing to measure\n")
    content = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    content |= {"channels": INNER, "rows_moved": ROWS_MOVED}  # what a reader needs for the floors
    content.setdefault("cells", {})

    def save() -> None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(arguments.output, "w") as file:
            json.dump(content, file, indent=1)

    if not arguments.no_tests and content.get("tests_passed", {}).get("commit") != stamp()["commit"]:
        # one at a time they would compile for too long; another machine's packages have warnings of their own
        many = ["-n", "auto", "-W", "default"]
        subprocess.run([sys.executable, "-m", "pytest", "-q", *many, "-m", "gpu", *TESTS], check=True)
        content["tests_passed"] = stamp()
        save()
    for cell in cells():
        if cell.name in content["cells"] or arguments.only not in cell.name:
            continue
        if time.monotonic() > end - 20:
            console.print("time is up: the same command goes on from here")
            break
        try:
            result = cell.measure()
        except Exception as error:  # is a result as well, and must not keep the other cells from theirs
            result = {"error": f"{type(error).__name__}: {error}"[:500]}
        content["cells"][cell.name] = result | {"stamp": stamp()}
        save()
        torch.cuda.empty_cache()
    console.print(summary(content["cells"]))


if __name__ == "__main__":
    main()
