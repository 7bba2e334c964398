"""The CPU kernels and what they bring to a model: correctness first, then time and memory, beside their peers.

    python -m benchmarks.kernels --output results/kernels-cpu.json [--rte DIR] [--only NAME ...]

About 10 minutes on two cores; nothing else should run meanwhile. Ratios compare what ran in this one process.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from benchmarks.measure import keep_freed_memory, machine_rates, peak_extra_bytes, ratio, stamp, timings
from rich.console import Console
from torch import Tensor
from transformers import BertConfig, BertModel
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from mabert import MaBertConfig, MaBertModel
from mabert.files import atomic_write
from mabert.layers.attention import SelfAttention, grid_is_cheaper
from mabert.layers.mamba import MambaLayer
from mabert.models.init import init_module
from mabert.ops import SequenceLayout, depthwise_conv, selective_scan
from mabert.ops.native import kernels, missing_because

INNER, STATE = 1536, 16  # the base model's
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
MIXTURES = (  # sequences, tokens of the longest one, how much shorter others may be
    (4, 32, 0.3), (16, 32, 0.3), (64, 32, 0.8), (16, 64, 0.1), (16, 64, 0.5), (64, 64, 0.9), (16, 128, 0.1),
    (16, 128, 0.5), (16, 128, 0.9), (32, 128, 0.02), (8, 256, 0.1), (8, 256, 0.5), (16, 256, 0.9), (4, 512, 0.2),
    (8, 512, 0.8),
)  # fmt: skip
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


def on(instruction_set: str, run: Callable[[], object]) -> Callable[[], object]:
    """The same run with kernels for an older processor."""
    best = kernels.isa()

    def older() -> None:
        kernels.use_isa(instruction_set)
        run()
        kernels.use_isa(best)

    return older


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
    """Forward, and forward with backward, over length, dtype and backend; the lengths of one backend take turns."""
    rows: list[dict[str, object]] = []
    for backend, dtype, lengths in (
        ("native", torch.float32, LENGTHS),
        ("native", torch.bfloat16, LENGTHS),
        ("torch", torch.float32, LENGTHS[:3]),
    ):
        inputs = {length: scan_inputs(length, dtype, grad=True) for length in lengths}
        for name, make in (("forward", forward), ("forward+backward", forward_and_backward)):
            runs = {str(length): make(inputs[length], backend) for length in lengths}
            for length, result in timings(runs, seconds=4.0, at_most=40).items():
                row = {"backend": backend, "dtype": str(dtype).removeprefix("torch."), "length": int(length)}
                rows.append({**row, "pass": name, **result})
                console.print(rows[-1])
    return rows


def theirs(inputs: dict[str, Tensor], **options: bool) -> Tensor:
    """transformers' scan of a Mamba layer where nothing is compiled, on our inputs."""
    swapped = {name: inputs[name].mT for name in ("delta", "B", "C", "z")}
    y = mamba_selective_scan(
        inputs["x"].mT, swapped["delta"], inputs["A"], swapped["B"], swapped["C"], D=inputs["D"], z=swapped["z"],
        delta_bias=inputs["delta_bias"], delta_softplus=True, **options,
    )  # fmt: skip
    return y.mT


def peers() -> dict[str, object]:
    """transformers' loop over time and, where it is installed, mambapy's parallel scan; each beside ours."""
    results: dict[str, object] = {}

    @torch.no_grad()
    def loop(inputs: dict[str, Tensor]) -> Tensor:
        return theirs(inputs)

    inputs = scan_inputs(2048)
    torch.testing.assert_close(loop(inputs), selective_scan(**inputs), rtol=1e-3, atol=1e-3)
    runs: dict[str, Callable[[], object]] = {"transformers' loop": partial(loop, inputs)}
    runs |= {"mabert": forward(inputs, "native"), "mabert, torch backend": forward(inputs, "torch")}
    runs |= {f"mabert, {isa}": on(isa, forward(inputs, "native")) for isa in kernels.isas()[1:]}
    results["forward, 2048"] = timings(runs, seconds=5)
    inputs = scan_inputs(512, grad=True)
    seed = torch.randn(1, 512, INNER)
    runs = {
        "mabert": forward_and_backward(inputs, "native"),
        "mabert, forward alone": forward(inputs, "native"),
        "mabert, torch backend": forward_and_backward(inputs, "torch"),
    }
    try:
        import mambapy  # noqa: F401
    except ImportError:
        console.print("mambapy is not installed (pip install mambapy): its parallel scan is left out")
    else:
        runs["mambapy's pscan"] = lambda: torch.autograd.grad(
            theirs(inputs, use_mambapy=True), list(inputs.values()), seed
        )
    results["forward+backward, 512"] = timings(runs, seconds=8)
    return results


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
    runs: dict[str, Callable[[], object]] = {
        "layer": lambda: layer(x, layout),
        "scan": lambda: selective_scan(**inputs),
        "conv": lambda: depthwise_conv(wide[..., :INNER], weight, bias, activation="silu"),
    }
    with torch.inference_mode():
        results = timings(runs, seconds=6)
    share = (results["scan"]["median_ms"] + results["conv"]["median_ms"]) / results["layer"]["median_ms"]
    return {**results, "share": share}


def training_memory() -> dict[str, float]:
    """Peak extra memory of one training step of the scan at 4,096 tokens over the size of its inputs and outputs.

    In a process of its own: in this one, freed memory would be used again and no growth be seen.
    """
    measured = subprocess.run(
        [sys.executable, "-c", "from benchmarks.kernels import _training_memory; _training_memory()"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    extra, inputs_and_outputs = (int(number) for number in measured[-2:])
    return {"extra_bytes": extra, "inputs_and_outputs_bytes": inputs_and_outputs, "ratio": extra / inputs_and_outputs}


def _training_memory() -> None:
    forward_and_backward(scan_inputs(1, grad=True), "native")()  # threads and code pages are not the scan's memory
    inputs = scan_inputs(4096, grad=True)
    step = forward_and_backward(inputs, "native")
    inputs_and_outputs = sum(t.numel() * t.element_size() for t in inputs.values()) + inputs["x"].numel() * 4
    print(peak_extra_bytes(step), inputs_and_outputs)


def attention() -> dict[str, object]:
    """Packed attention over mixtures of lengths: a grid, one call a sequence, and what the cost model chooses."""
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, object]] = []
    lost: dict[str, list[float]] = {"chosen": [], "always a grid": [], "always one by one": []}
    for config in (MaBertConfig.tiny(), MaBertConfig.base()):
        config._attn_implementation = "sdpa"
        for dtype in (torch.float32, torch.bfloat16):
            layer = SelfAttention(config).eval().to(dtype)
            for sequences, longest, spread in MIXTURES:
                lengths = (longest * (1 - spread * torch.rand(sequences, generator=generator))).long().clamp(min=1)
                lengths[0] = longest
                mask = torch.arange(longest) < lengths[:, None]
                layout = SequenceLayout.build(sequences, longest, "cpu", packed=True, attention_mask=mask)
                qkv = torch.randn(layout.num_tokens, 3, config.num_attention_heads, config.head_size, dtype=dtype)
                with torch.inference_mode():
                    both = timings(
                        {
                            "grid": partial(layer._attend_in_grid, qkv, layout),
                            "one by one": partial(layer._attend_one_by_one, qkv, layout),
                        },
                        seconds=0.4,
                    )
                grid, each = both["grid"]["median_ms"], both["one by one"]["median_ms"]
                chosen = grid if grid_is_cheaper(layout, config.hidden_size) else each
                for name, taken in (("chosen", chosen), ("always a grid", grid), ("always one by one", each)):
                    lost[name].append(taken / min(grid, each))
                rows.append(
                    {
                        "hidden_size": config.hidden_size,
                        "dtype": str(dtype).removeprefix("torch."),
                        "sequences": sequences,
                        "longest": longest,
                        "tokens": layout.num_tokens,
                        "grid_ms": grid,
                        "one_by_one_ms": each,
                        "chosen_ms": chosen,
                    }
                )
    return {
        "over_the_cheaper_one": {
            name: {"mean": sum(values) / len(values), "worst": max(values)} for name, values in lost.items()
        },
        "mixtures": rows,
    }


def models() -> list[dict[str, object]]:
    """Inference of the base encoder at batch 1 beside transformers' BERT-base on SDPA."""
    rows: list[dict[str, object]] = []
    for length in (512, 1024, 2048, 4096):
        torch.manual_seed(0)
        encoders = {
            "MaBERT": MaBertModel(MaBertConfig.base(max_position_embeddings=length)).eval(),
            "BERT": BertModel(
                BertConfig(max_position_embeddings=length, attn_implementation="sdpa"), add_pooling_layer=False
            ).eval(),
        }
        ids = torch.randint(5, 30000, (1, length))
        mask = torch.ones_like(ids)
        for bf16 in (False, True):
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                results = timings(
                    {name: partial(model, ids, attention_mask=mask) for name, model in encoders.items()}, seconds=12
                )
            rows += [{"model": name, "length": length, "bf16": bf16, **result} for name, result in results.items()]
            console.print(
                f"length {length}, bf16 {bf16}: MaBERT / BERT = {ratio(results['MaBERT'], results['BERT']):.3f}"
            )
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
    encoders = {}
    for execution in ("packed", "padded"):
        torch.manual_seed(0)
        encoders[execution] = MaBertModel(MaBertConfig.base(execution=execution)).eval()
    with torch.inference_mode():
        outputs = {name: model(ids, attention_mask=mask).last_hidden_state for name, model in encoders.items()}
        results = timings(
            {name: partial(model, ids, attention_mask=mask) for name, model in encoders.items()}, seconds=20
        )
    return {
        "pairs": len(lengths),
        "tokens": int(mask.sum()),
        "padded_tokens": mask.numel(),
        **results,
        "speed_up": ratio(results["padded"], results["packed"]),
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
        "attention": attention,
        "models": models,
    }
    parser.add_argument("--only", nargs="+", choices=[*parts, "rte_pairs"], help="measure these parts, keep the others")
    arguments = parser.parse_args()
    wanted = arguments.only or [*parts, *(["rte_pairs"] if arguments.rte else [])]

    if kernels is None:
        parser.exit(2, f"the CPU kernels are not compiled, there is nothing to measure: {missing_because}\n")
    keep_freed_memory()
    results = json.loads(arguments.output.read_text()) if arguments.only and arguments.output.exists() else {}
    results |= {"sizes": {"batch": 1, "inner": INNER, "state": STATE}, "correctness": correctness()}
    results["rates"] = machine_rates()
    for name in wanted:
        console.rule(name)
        results.setdefault("stamps", {})[name] = stamp()
        results[name] = rte_pairs(arguments.rte) if name == "rte_pairs" else parts[name]()
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(arguments.output, "w") as file:
            json.dump(results, file, indent=1)
    console.print("Render it with `make results`.")


if __name__ == "__main__":
    main()
