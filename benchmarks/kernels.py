"""The CPU kernels and what they bring to a model: correctness first, then time and memory, beside their peers.

    python -m benchmarks.kernels --output results/kernels-cpu.json [--rte DIR] [--only NAME ...]

About 10 minutes on two cores; nothing else should run meanwhile. Ratios compare what ran in this one process.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from benchmarks.measure import machine_rates, peak_extra_bytes, stamp, timing
from rich.console import Console
from torch import Tensor
from transformers import BertConfig, BertModel
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from mabert import MaBertConfig, MaBertModel
from mabert.files import atomic_write
from mabert.layers.mamba import MambaLayer
from mabert.models.init import init_module
from mabert.ops import SequenceLayout, depthwise_conv, selective_scan

INNER, STATE = 1536, 16  # the base model's
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
console = Console()


def scan_inputs(length: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> dict[str, Tensor]:
    """Inputs with the statistics of a freshly initialised layer."""
    g = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(1, length, INNER, generator=g),
        "delta": torch.randn(1, length, INNER, generator=g) * 0.1,
        "A": -torch.arange(1.0, STATE + 1).expand(INNER, STATE).contiguous(),
        "B": torch.randn(1, length, STATE, generator=g),
        "C": torch.randn(1, length, STATE, generator=g),
        "D": torch.ones(INNER),
        "z": torch.randn(1, length, INNER, generator=g),
        "delta_bias": torch.randn(INNER, generator=g) - 4,
    }
    low = ("x", "delta", "B", "C", "z")
    return {name: t.to(dtype if name in low else t.dtype).requires_grad_(grad) for name, t in inputs.items()}


def forward(inputs: dict[str, Tensor], backend: str) -> Callable[[], object]:
    """The scan alone, as in inference."""

    def run() -> None:
        with torch.no_grad():
            selective_scan(**inputs, backend=backend)

    return run


def forward_and_backward(inputs: dict[str, Tensor], backend: str) -> Callable[[], object]:
    """A training step of the scan."""

    seed = torch.randn_like(inputs["x"])

    def run() -> None:
        y = selective_scan(**inputs, backend=backend)
        assert isinstance(y, Tensor)
        torch.autograd.grad(y, list(inputs.values()), seed)

    return run


def correctness() -> dict[str, float]:
    """Largest error of the native scan relative to the largest value, output and each gradient, against float64."""
    inputs = scan_inputs(512, grad=True)
    exact = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    seed = torch.randn_like(inputs["x"])
    results = []
    for tensors, backend in ((exact, "torch"), (inputs, "native")):
        y = selective_scan(**tensors, backend=backend)
        results.append([y, *torch.autograd.grad(y, list(tensors.values()), seed.to(y.dtype))])
    errors = {}
    for name, truth, got in zip(["y", *inputs], *results, strict=True):
        errors[name] = float((got.double() - truth).abs().max() / truth.abs().max())
        assert errors[name] < 1e-4, f"{name} is wrong: error {errors[name]:.1e}"
    return errors


def scans() -> list[dict[str, object]]:
    """Forward, and forward with backward, over length, dtype and backend."""
    rows: list[dict[str, object]] = []
    for length in LENGTHS:
        for dtype in (torch.float32, torch.bfloat16):
            for backend in ("native", "torch"):
                if backend == "torch" and (length > 2048 or dtype != torch.float32):
                    continue
                with_grad = scan_inputs(length, dtype, grad=True)
                common = {"length": length, "dtype": str(dtype).removeprefix("torch."), "backend": backend}
                rows.append({**common, "pass": "forward", **timing(forward(with_grad, backend))})
                rows.append({**common, "pass": "forward+backward", **timing(forward_and_backward(with_grad, backend))})
                console.print(rows[-2], rows[-1])
    return rows


def peers() -> list[dict[str, object]]:
    """transformers' loop over time and, where it is installed, mambapy's parallel scan."""
    rows: list[dict[str, object]] = []

    def theirs(inputs: dict[str, Tensor], **options: bool) -> Tensor:
        swapped = {name: inputs[name].mT for name in ("delta", "B", "C", "z")}
        y = mamba_selective_scan(
            inputs["x"].mT, swapped["delta"], inputs["A"], swapped["B"], swapped["C"], D=inputs["D"], z=swapped["z"],
            delta_bias=inputs["delta_bias"], delta_softplus=True, **options,
        )  # fmt: skip
        return y.mT

    inputs = scan_inputs(2048)
    with torch.no_grad():
        torch.testing.assert_close(theirs(inputs), selective_scan(**inputs), rtol=1e-3, atol=1e-3)
        loop = timing(lambda: theirs(inputs), seconds=10)
    rows.append({"peer": "transformers loop", "length": 2048, "pass": "forward", **loop})
    try:
        import mambapy  # noqa: F401
    except ImportError:
        console.print("mambapy is not installed (pip install mambapy): its parallel scan is left out")
        return rows
    inputs = scan_inputs(512, grad=True)
    seed = torch.randn(1, 512, INNER)

    def pscan() -> None:
        torch.autograd.grad(theirs(inputs, use_mambapy=True), list(inputs.values()), seed)

    rows.append({"peer": "mambapy pscan", "length": 512, "pass": "forward+backward", **timing(pscan, seconds=15)})
    return rows


def layer_share() -> dict[str, object]:
    """Scan and convolution as a share of one base-size M layer's inference at 4,096 tokens."""
    config = MaBertConfig.base()
    layer = MambaLayer(config, "forward").eval()
    layer.apply(lambda module: init_module(module, config))
    x = torch.randn(4096, config.hidden_size)
    layout = SequenceLayout.build(1, 4096, "cpu", packed=True)
    inputs = scan_inputs(4096)
    weight, bias = torch.randn(INNER, 4), torch.randn(INNER)
    wide = torch.randn(1, 4096, 2 * INNER)
    with torch.inference_mode():
        whole = timing(lambda: layer(x, layout), seconds=10)
        scan = timing(lambda: selective_scan(**inputs))
        conv = timing(lambda: depthwise_conv(wide[..., :INNER], weight, bias, activation="silu"))
    share = (scan["median_ms"] + conv["median_ms"]) / whole["median_ms"]
    return {"layer": whole, "scan": scan, "conv": conv, "share": share}


def training_memory() -> dict[str, float]:
    """Peak extra memory of one training step of the scan at 4,096 tokens over the size of its inputs and outputs."""
    inputs = scan_inputs(4096, grad=True)
    step = forward_and_backward(inputs, "native")
    step()
    inputs_and_outputs = sum(t.numel() * t.element_size() for t in inputs.values()) + inputs["x"].numel() * 4
    extra = peak_extra_bytes(step)
    return {"extra_bytes": extra, "inputs_and_outputs_bytes": inputs_and_outputs, "ratio": extra / inputs_and_outputs}


def models() -> list[dict[str, object]]:
    """Inference of the base encoder at batch 1 beside transformers' BERT-base on SDPA."""
    rows: list[dict[str, object]] = []
    for length in (512, 1024, 2048, 4096):
        torch.manual_seed(0)
        encoders = {
            "MaBERT": MaBertModel(MaBertConfig.base(max_position_embeddings=length)),
            "BERT": BertModel(
                BertConfig(max_position_embeddings=length, attn_implementation="sdpa"), add_pooling_layer=False
            ),
        }
        ids = torch.randint(5, 30000, (1, length))
        mask = torch.ones_like(ids)
        for bf16 in (False, True):
            medians = {}
            for name, model in encoders.items():
                model.eval()
                with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    result = timing(partial(model, ids, attention_mask=mask), seconds=12)
                medians[name] = result["median_ms"]
                rows.append({"model": name, "length": length, "bf16": bf16, **result})
            console.print(f"length {length}, bf16 {bf16}: MaBERT / BERT = {medians['MaBERT'] / medians['BERT']:.3f}")
    return rows


def rte_pairs(folder: Path) -> dict[str, object]:
    """64 sentence pairs of RTE in one batch, packed against padded execution; lengths as real text has them."""
    lines = (folder / "dev.tsv").read_text(encoding="utf-8").splitlines()[1:65]
    lengths = [min(512, 3 + len(line.split("\t")[1].split()) + len(line.split("\t")[2].split())) for line in lines]
    lengths = [round(1.25 * n) for n in lengths]  # word pieces a word
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, n in zip(mask, lengths, strict=True):
        row[:n] = 1
    ids = torch.randint(5, 30000, mask.shape) * mask
    outputs, timings = {}, {}
    for execution in ("packed", "padded"):
        torch.manual_seed(0)
        model = MaBertModel(MaBertConfig.base(execution=execution)).eval()
        with torch.inference_mode():
            outputs[execution] = model(ids, attention_mask=mask).last_hidden_state
            timings[execution] = timing(partial(model, ids, attention_mask=mask), seconds=20)
    return {
        "pairs": len(lengths),
        "tokens": int(mask.sum()),
        "padded_tokens": mask.numel(),
        **timings,
        "speed_up": timings["padded"]["median_ms"] / timings["packed"]["median_ms"],
        "largest_difference": float((outputs["packed"] - outputs["padded"]).abs().max()),
    }


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results/kernels-cpu.json"))
    parser.add_argument("--rte", type=Path, help="folder with RTE's dev.tsv, for the lengths of real pairs")
    parts = {
        "scans": scans,
        "peers": peers,
        "layer_share": layer_share,
        "training_memory": training_memory,
        "models": models,
    }
    parser.add_argument("--only", nargs="+", choices=[*parts, "rte_pairs"], help="measure these parts, keep the others")
    arguments = parser.parse_args()
    wanted = arguments.only or [*parts, *(["rte_pairs"] if arguments.rte else [])]

    results = json.loads(arguments.output.read_text()) if arguments.only and arguments.output.exists() else {}
    results |= {"stamp": stamp(), "sizes": {"batch": 1, "inner": INNER, "state": STATE}, "correctness": correctness()}
    results["rates"] = machine_rates()
    for name in wanted:
        console.rule(name)
        results[name] = rte_pairs(arguments.rte) if name == "rte_pairs" else parts[name]()
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(arguments.output, "w") as file:
            json.dump(results, file, indent=1)
    console.print_json(data={name: results[name] for name in wanted if name not in ("scans", "models")})


if __name__ == "__main__":
    main()
