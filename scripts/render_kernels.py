"""The CPU kernels' part of the results: tables and a roofline plot from results/kernels-cpu.json."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "results" / "kernels-cpu.json"
PLOT = ROOT / "docs" / "images" / "kernels-cpu.png"

BYTES = {"float32": 4, "bfloat16": 2}
# Of one state in one step of the forward: Δ·A, Δx·B, and the multiply-adds of state and readout; one exponential.
FLOPS, MULTIPLY_ADDS = 6, 4
# The same of the backward, which computes decays and states again; its exponential is counted apart as well.
BACKWARD_FLOPS, BACKWARD_MULTIPLY_ADDS = 20, 12
# Tensors of the size of x that are read or written.
FORWARD_ROWS, BACKWARD_ROWS = 4, 7


def section() -> str:
    """The Markdown of the section, empty while nothing is measured."""
    if not MEASURED.exists():
        return ""
    results = json.loads(MEASURED.read_text(encoding="utf-8"))
    stamps = results["stamps"]
    hardware, versions = stamps["scans"]["hardware"], stamps["scans"]["versions"]
    commits = {
        f"{stamp['commit'][:7]}{' with uncommitted changes' if stamp['uncommitted_changes'] else ''} ({stamp['date']})"
        for stamp in stamps.values()
    }
    lines = [
        "## The CPU kernels",
        "",
        f"Batch 1, E = {results['sizes']['inner']}, N = {results['sizes']['state']}, medians; what is compared ran in "
        "turns in one process. Measured by `make bench`.",
        "",
        "| what | wanted | measured |",
        "|---|---|---|",
        *[f"| {what} | {wanted} | {measured} |" for what, wanted, measured in goals(results)],
        "",
        "![Throughput of the scan beside what the machine reaches](images/kernels-cpu.png)",
        "",
        "The selective scan alone. The floor is the larger of the bytes at the measured copy bandwidth "
        f"({results['rates']['copy_bytes_per_s'] / 1e9:.0f} GB/s) and the exponentials and multiply-adds at their "
        f"measured rates ({results['rates']['exp_per_s'] / 1e9:.1f} and {results['rates']['fma_per_s'] / 1e9:.0f} "
        "billion a second, the latter by a matrix product of torch's).",
        "",
        "| backend | dtype | pass | L | ms (quartiles) | µs a token | floor ms | share of the floor |",
        "|---|---|---|---|---|---|---|---|",
        *[scan_row(row, results) for row in results["scans"]],
        "",
        "The whole base encoder beside transformers' BERT-base on SDPA, inference at batch 1:",
        "",
        "| L | precision | MaBERT ms | BERT ms | ratio |",
        "|---|---|---|---|---|",
        *model_rows(results["models"]),
        "",
        attention_text(results["attention"]),
        "",
        f"{hardware['processor']}, {hardware['threads']} threads, {hardware['instruction_set']}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; commit {', '.join(sorted(commits))}.",
    ]
    return "\n".join(lines) + "\n"


def goals(results: dict) -> list[tuple[str, str, str]]:
    """What was wanted of the kernels and what was measured."""
    forward, both = results["peers"]["forward, 2048"], results["peers"]["forward+backward, 512"]
    loop, pscan = "transformers' loop", "mambapy's pscan"
    rows = [
        ("scan forward, L = 2,048, over transformers' loop", "≥ 30×", f"{ratio(forward, loop):.0f}×"),
        *(
            (f"the same with {isa}", wanted, f"{ratio(forward, loop, f'mabert, {isa}'):.0f}×")
            for isa, wanted in (("avx2", "≥ 20×"), ("baseline", ""))
            if f"mabert, {isa}" in forward
        ),
        (
            "scan forward + backward, L = 512, over mambapy's pscan",
            "≥ 50×",
            f"{ratio(both, pscan):.0f}×" if pscan in both else "mambapy was not installed",
        ),
        (
            "forward + backward over forward, L = 512",
            "≤ 4.5×",
            f"{ratio(both, 'mabert', 'mabert, forward alone'):.1f}×",
        ),
        ("cost of a token, L = 512 to 16,384, over the mean, fp32", "within 10%", linearity(results)),
        ("scan + conv in one M layer, L = 4,096, fp32", "≤ 6%", f"{results['layer_share']['share']:.1%}"),
        (
            "peak extra memory of a training step of the scan, L = 4,096, over inputs and outputs",
            "≤ 1.5×",
            f"{results['training_memory']['ratio']:.2f}×",
        ),
    ]
    for length, bf16, wanted in ((4096, False, "0.85"), (4096, True, "0.57"), (512, False, "1.12")):
        times = {r["model"]: r["median_ms"] for r in results["models"] if (r["length"], r["bf16"]) == (length, bf16)}
        rows.append(
            (
                f"base MaBERT over BERT, L = {length:,}, {'bf16' if bf16 else 'fp32'}",
                f"≤ {wanted}",
                f"{times['MaBERT'] / times['BERT']:.2f}",
            )
        )
    pairs = results.get("rte_pairs")
    if pairs:
        rows.append(
            (
                f"{pairs['pairs']} pairs of RTE's lengths, packed over padded throughput",
                "≥ 1.4×",
                f"{pairs['speed_up']:.1f}×, outputs within {pairs['largest_difference']:.0e}",
            )
        )
    return rows


def ratio(medians: dict, peer: str, ours: str = "mabert") -> float:
    """How many times as long the peer takes."""
    return medians[peer]["median_ms"] / medians[ours]["median_ms"]


def linearity(results: dict) -> str:
    """Range of the cost of a token over lengths, beside its mean."""
    spans = []
    for name in ("forward", "forward+backward"):
        costs = [
            row["median_ms"] / row["length"]
            for row in results["scans"]
            if (row["backend"], row["dtype"], row["pass"]) == ("native", "float32", name)
        ]
        mean = sum(costs) / len(costs)
        spans.append(f"{name} {min(costs) / mean - 1:+.0%} to {max(costs) / mean - 1:+.0%}")
    return ", ".join(spans)


def floor_ms(row: dict, results: dict) -> float:
    """The least time that the measured rates allow for one scan."""
    inner, state, rates = results["sizes"]["inner"], results["sizes"]["state"], results["rates"]
    steps, backward = row["length"] * inner * state, row["pass"] == "forward+backward"
    rows_moved = (FORWARD_ROWS + BACKWARD_ROWS * backward) * row["length"]
    moved = rows_moved * inner * BYTES[row["dtype"]] / rates["copy_bytes_per_s"]
    multiply_adds = MULTIPLY_ADDS + BACKWARD_MULTIPLY_ADDS * backward
    computed = steps * ((1 + backward) / rates["exp_per_s"] + multiply_adds / rates["fma_per_s"])
    return max(moved, computed) * 1e3


def scan_row(row: dict, results: dict) -> str:
    """One line of the scans' table."""
    floor = floor_ms(row, results)
    return (
        f"| {row['backend']} | {row['dtype']} | {row['pass']} | {row['length']:,} | {row['median_ms']:.2f} "
        f"({row['lower_quartile_ms']:.2f} to {row['upper_quartile_ms']:.2f}) | "
        f"{row['median_ms'] / row['length'] * 1e3:.2f} | {floor:.2f} | {floor / row['median_ms']:.0%} |"
    )


def model_rows(models: list[dict]) -> list[str]:
    """MaBERT and BERT side by side."""
    times: dict = {}
    for row in models:
        times.setdefault((row["length"], row["bf16"]), {})[row["model"]] = row["median_ms"]
    return [
        f"| {length:,} | {'bf16 autocast' if bf16 else 'fp32'} | {both['MaBERT']:,.0f} | {both['BERT']:,.0f} | "
        f"{both['MaBERT'] / both['BERT']:.2f} |"
        for (length, bf16), both in times.items()
    ]


def attention_text(attention: dict) -> str:
    """How well the cost model of packed attention chooses."""
    over = attention["over_the_cheaper_one"]
    return (
        f"Packed attention over {len(attention['mixtures'])} mixtures of lengths, time over that of the cheaper way: "
        + ", ".join(f"{name} {cost['mean']:.2f} (at worst {cost['worst']:.1f})" for name, cost in over.items())
        + "."
    )


def plot() -> None:
    """The roofline: operations a second over operations a byte."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = json.loads(MEASURED.read_text(encoding="utf-8"))
    rates, state = results["rates"], results["sizes"]["state"]
    figure, axes = pyplot.subplots(figsize=(7.5, 4.8), layout="constrained")
    intensity = [0.25, 64]
    bandwidth, matmul = rates["copy_bytes_per_s"] / 1e9, 2 * rates["fma_per_s"] / 1e9
    mixture = FLOPS / (1 / rates["exp_per_s"] + MULTIPLY_ADDS / rates["fma_per_s"]) / 1e9
    ridge = matmul / bandwidth
    axes.plot(
        [intensity[0], ridge, intensity[1]],
        [intensity[0] * bandwidth, matmul, matmul],
        color="0.35",
        label="copy bandwidth, then torch's matrix product",
    )
    axes.axhline(mixture, color="tab:red", linestyle="--", label="the scan's one exponential to four multiply-adds")
    lengths = sorted({row["length"] for row in results["scans"]})
    for backend, dtype, marker in (("native", "float32", "o"), ("native", "bfloat16", "s"), ("torch", "float32", "X")):
        for name, alpha in (("forward", 1.0), ("forward+backward", 0.45)):
            both = name == "forward+backward"
            rows = [r for r in results["scans"] if (r["backend"], r["dtype"], r["pass"]) == (backend, dtype, name)]
            flops = (FLOPS + BACKWARD_FLOPS * both) * results["sizes"]["inner"] * state
            moved = (FORWARD_ROWS + BACKWARD_ROWS * both) * BYTES[dtype] * results["sizes"]["inner"]
            axes.scatter(
                [flops / moved] * len(rows),
                [flops * row["length"] / row["median_ms"] / 1e6 for row in rows],
                marker=marker,
                color=[pyplot.get_cmap("viridis")(lengths.index(row["length"]) / len(lengths)) for row in rows],
                alpha=alpha,
                zorder=3,
                label=f"{backend}, {dtype}, {name}",
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(0.3, 2 * max(matmul, mixture))
    axes.set_xlim(*intensity)
    axes.set_xlabel("operations a byte moved")
    axes.set_ylabel("billion operations a second")
    axes.set_title(f"Selective scan, L = {lengths[0]:,} (dark) to {lengths[-1]:,} (light)")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower left", fontsize=8)
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=130)
    pyplot.close(figure)
