"""The CPU kernels and what they bring to a model: correctness first, then time and memory, beside their peers.

    python -m benchmarks.kernels --output results/kernels-cpu.json [--glue DIR --tokenizer DIR] [--only NAME ...]

About 15 minutes on two cores; nothing else should run meanwhile. Ratios compare what ran in this one process.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.measure import keep_freed_memory, machine_rates, peak_extra_bytes, ratio, stamp, timings
from rich.console import Console
from torch import Tensor
from transformers import BertConfig, BertModel
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from mabert import MaBertConfig, MaBertModel
from mabert.data.glue import load_glue
from mabert.data.tokenizer import load_tokenizer
from mabert.files import atomic_write
from mabert.layers.attention import SelfAttention, grid_is_cheaper
from mabert.layers.mamba import MambaLayer
from mabert.models.init import init_module
from mabert.ops import SequenceLayout, depthwise_conv, selective_scan
from mabert.ops.native import kernels, missing_because

INNER, STATE = 1536, 16  # the base model's
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
# Sequences, tokens of the longest one, how much shorter others may be. The constants of layers/attention.py were chosen
# on the first kind; how well they choose is said of the second one alone.
MIXTURES = {
    "chosen on": (
        (4, 32, 0.3), (16, 32, 0.3), (64, 32, 0.8), (16, 64, 0.1), (16, 64, 0.5), (64, 64, 0.9), (16, 128, 0.1),
        (16, 128, 0.5), (16, 128, 0.9), (32, 128, 0.02), (8, 256, 0.1), (8, 256, 0.5), (16, 256, 0.9), (4, 512, 0.2),
        (8, 512, 0.8),
    ),
    "held out": (
        (2, 24, 0.4), (8, 24, 0.1), (32, 48, 0.5), (8, 48, 0.05), (48, 40, 0.7), (24, 96, 0.3), (12, 96, 0.8),
        (6, 160, 0.2), (20, 160, 0.6), (3, 320, 0.1), (10, 320, 0.9), (5, 400, 0.5), (2, 640, 0.3), (6, 640, 0.02),
        (40, 16, 0.5),
    ),
}  # fmt: skip
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
    """Forward, and forward with backward, over length, dtype and backend."""
    rows = [
        *sweep("native", torch.float32, LENGTHS),
        *sweep("native", torch.bfloat16, LENGTHS),
        *sweep("torch", torch.float32, LENGTHS[:3]),
    ]
    for row in rows:
        console.print(row)
    return rows


def sweep(backend: str, dtype: torch.dtype, lengths: tuple[int, ...]) -> list[dict[str, object]]:
    """One backend over lengths, which take turns."""
    rows: list[dict[str, object]] = []
    inputs = {length: scan_inputs(length, dtype, grad=True) for length in lengths}
    for name, make in (("forward", forward), ("forward+backward", forward_and_backward)):
        runs = {str(length): make(inputs[length], backend) for length in lengths}
        for length, result in timings(runs, seconds=4.0, at_most=40).items():
            row = {"backend": backend, "dtype": str(dtype).removeprefix("torch."), "length": int(length)}
            rows.append({**row, "pass": name, **result})
    return rows


def scans_in_kept_memory() -> list[dict[str, object]]:
    """The native fp32 scans in a process whose allocator gives nothing back to the system (glibc), however large.

    By default it does with every block over 32 MiB, and the system hands out zeroed pages anew at every call: what is
    then measured at L = 8,192 and above is the system too.
    """
    code = "from benchmarks.kernels import *; print(json.dumps(sweep('native', torch.float32, LENGTHS)))"
    measured = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)},
    )
    return json.loads(measured.stdout.splitlines()[-1])


def dispatch() -> dict[str, object]:
    """The scan over one token: what torch needs to call an operation and its gradient, whatever they compute."""
    inputs = scan_inputs(1, grad=True)
    return timings({"forward": forward(inputs, "native"), "forward+backward": forward_and_backward(inputs, "native")})


def swapped(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with time last, contiguous, as transformers' own layer passes it."""
    per_token = ("x", "delta", "B", "C", "z")
    return {
        name: (t.detach().mT.contiguous() if name in per_token else t.detach()).requires_grad_(t.requires_grad)
        for name, t in inputs.items()
    }


def theirs(inputs: dict[str, Tensor], **options: bool) -> Tensor:
    """transformers' scan of a Mamba layer where nothing is compiled; time is last."""
    return mamba_selective_scan(
        inputs["x"], inputs["delta"], inputs["A"], inputs["B"], inputs["C"], D=inputs["D"], z=inputs["z"],
        delta_bias=inputs["delta_bias"], delta_softplus=True, **options,
    )  # fmt: skip


def peers() -> dict[str, object]:
    """transformers' loop over time and, where it is installed, mambapy's parallel scan; each beside ours."""
    results: dict[str, object] = {}

    @torch.no_grad()
    def loop(inputs: dict[str, Tensor]) -> Tensor:
        return theirs(inputs)

    inputs = scan_inputs(2048)
    time_last = swapped(inputs)
    torch.testing.assert_close(loop(time_last).mT, selective_scan(**inputs), rtol=1e-3, atol=1e-3)
    runs: dict[str, Callable[[], object]] = {"transformers' loop": partial(loop, time_last)}
    runs |= {"mabert": forward(inputs, "native"), "mabert, torch backend": forward(inputs, "torch")}
    runs |= {f"mabert, {isa}": on(isa, forward(inputs, "native")) for isa in kernels.isas()[1:]}
    results["forward, 2048"] = timings(runs, seconds=5)
    inputs = scan_inputs(512, grad=True)
    time_last, seed = swapped(inputs), torch.randn(1, INNER, 512)
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
            theirs(time_last, use_mambapy=True), list(time_last.values()), seed
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
    for config in (MaBertConfig.tiny(), MaBertConfig.base()):
        config._attn_implementation = "sdpa"
        for dtype in (torch.float32, torch.bfloat16):
            layer = SelfAttention(config).eval().to(dtype)
            for kind, (sequences, longest, spread) in (
                (k, mixture) for k, many in MIXTURES.items() for mixture in many
            ):
                lengths = (longest * (1 - spread * torch.rand(sequences, generator=generator))).long().clamp(min=1)
                lengths[0] = longest
                mask = torch.arange(longest) < lengths[:, None]
                layout = SequenceLayout.build(sequences, longest, "cpu", packed=True, attention_mask=mask)
                qkv = torch.randn(layout.num_tokens, 3, config.num_attention_heads, config.head_size, dtype=dtype)
                with torch.inference_mode():
                    both = timings(
                        {
                            "grid": partial(layer.attention._attend_in_grid, qkv, layout),
                            "one by one": partial(layer.attention._attend_one_by_one, qkv, layout),
                        },
                        seconds=0.4,
                    )
                rows.append(
                    {
                        "kind": kind,
                        "hidden_size": config.hidden_size,
                        "dtype": str(dtype).removeprefix("torch."),
                        "sequences": sequences,
                        "longest": longest,
                        "tokens": layout.num_tokens,
                        "pairs": int((layout.lengths_S**2).sum()),
                        "grid_ms": both["grid"]["median_ms"],
                        "one_by_one_ms": both["one by one"]["median_ms"],
                        "takes_grid": grid_is_cheaper(layout, config.hidden_size),
                    }
                )
    return {"mixtures": rows, "least_lost_on": {"kind": "chosen on", **best_costs(rows)}}


def best_costs(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The constants of layers/attention.py that would lose least time on the mixtures they are chosen on."""
    rows = [row for row in rows if row["kind"] == "chosen on"]
    best = {"over_the_cheaper_one": math.inf}
    for call in (10 ** (exponent / 8) for exponent in range(40, 59)):
        for copy in (2 ** (exponent / 2) for exponent in range(19)):
            lost = []
            for row in rows:
                hidden, sequences, longest = row["hidden_size"], row["sequences"], row["longest"]
                grid = call + hidden * sequences * longest * (longest + copy)
                each = call * sequences + hidden * row["pairs"]
                taken = row["grid_ms"] if grid <= each else row["one_by_one_ms"]
                lost.append(taken / min(row["grid_ms"], row["one_by_one_ms"]))
            if (mean := sum(lost) / len(lost)) < best["over_the_cheaper_one"]:
                best = {"over_the_cheaper_one": mean, "call_cost": call, "copy_cost": copy}
    return best


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


def rte_pairs(glue: Path, tokenizer: Path) -> dict[str, object]:
    """The first 64 sentence pairs of RTE's dev set in one batch, packed against padded execution."""
    dev = load_glue(glue, "RTE")["dev"]
    assert dev.pairs is not None
    batch = load_tokenizer(tokenizer)(
        dev.texts[:64],
        dev.pairs[:64],
        truncation="longest_first",
        max_length=512,
        padding=True,
        return_tensors="pt",
    )
    ids, mask, types = batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]
    encoders = {}
    for execution in ("packed", "padded"):
        torch.manual_seed(0)
        encoders[execution] = MaBertModel(MaBertConfig.base(execution=execution)).eval()

    def run(model: MaBertModel) -> Tensor:
        return model(ids, attention_mask=mask, token_type_ids=types).last_hidden_state

    with torch.inference_mode():
        outputs = {name: run(model) for name, model in encoders.items()}
        results = timings({name: partial(run, model) for name, model in encoders.items()}, seconds=20)
    return {
        "pairs": len(ids),
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
    parser.add_argument("--glue", type=Path, help="folder with RTE in the official layout, for real pairs")
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer for them")
    parts = {
        "scans": scans,
        "scans_in_kept_memory": scans_in_kept_memory,
        "dispatch": dispatch,
        "peers": peers,
        "layer_share": layer_share,
        "training_memory": training_memory,
        "attention": attention,
        "models": models,
    }
    parser.add_argument("--only", nargs="+", choices=[*parts, "rte_pairs"], help="measure these parts, keep the others")
    arguments = parser.parse_args()
    wanted = arguments.only or [*parts, *(["rte_pairs"] if arguments.glue else [])]
    if "rte_pairs" in wanted and not (arguments.glue and arguments.tokenizer):
        parser.error("rte_pairs needs --glue and --tokenizer")

    if kernels is None:
        parser.exit(2, f"the CPU kernels are not compiled, there is nothing to measure: {missing_because}\n")
    keep_freed_memory()
    results = json.loads(arguments.output.read_text()) if arguments.only and arguments.output.exists() else {}
    results |= {"sizes": {"batch": 1, "inner": INNER, "state": STATE}, "correctness": correctness()}
    for name in wanted:
        console.rule(name)
        results.setdefault("stamps", {})[name] = stamp()
        if name == "scans":
            results["rates"] = machine_rates()  # of the same minutes: the floor of the scans is made of them
        results[name] = rte_pairs(arguments.glue, arguments.tokenizer) if name == "rte_pairs" else parts[name]()
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(arguments.output, "w") as file:
            json.dump(results, file, indent=1)
    console.print("Render it with `make results`.")


if __name__ == "__main__":
    main()
