"""The CPU kernels' part of the results: tables and a roofline plot from results/kernels-cpu.json."""

import json
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "results" / "kernels-cpu.json"
PLOT = ROOT / "docs" / "images" / "kernels-cpu.png"

BYTES = {"float32": 4, "bfloat16": 2}
# Of one state in one step of the forward: Δ·A, Δx·B, and the multiply-adds of state and readout; its exponential is
# counted apart.
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
        "| what | wanted | measured | |",
        "|---|---|---|---|",
        *[f"| {goal.what} | {goal.wanted()} | {goal.measured} | {goal.verdict()} |" for goal in goals(results)],
        "",
        "![Throughput of the scan beside what the machine reaches](images/kernels-cpu.png)",
        "",
        "The selective scan alone. The floor is the largest of three times: the bytes at the measured copy bandwidth "
        f"({results['rates']['copy_bytes_per_s'] / 1e9:.0f} GB/s), the exponentials at the rate of the same function "
        f"over an array in the first-level cache ({results['rates']['exp_per_s'] / 1e9:.1f} billion a second), and the "
        f"multiply-adds at that of torch's matrix product ({results['rates']['fma_per_s'] / 1e9:.0f} billion).",
        "",
        "| backend | dtype | pass | L | ms (quartiles) | µs a token | floor ms | share of the floor |",
        "|---|---|---|---|---|---|---|---|",
        *[scan_row(row, results) for row in results["scans"]],
        *[scan_row({**row, "backend": "native, memory kept"}, results) for row in results["scans_in_kept_memory"]],
        "",
        "Memory kept: in a process whose allocator gives nothing back to the system. Otherwise glibc returns every "
        "block over 32 MiB, and each call at the greater lengths waits for new zeroed pages. At the other end a "
        f"call over one token takes {results['dispatch']['forward']['median_ms']:.2f} ms, and "
        f"{results['dispatch']['forward+backward']['median_ms']:.2f} ms with its backward: torch's dispatch, which "
        "weighs on 512 tokens. Both are in the cost of a token above.",
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


@dataclass(frozen=True)
class Goal:
    """What was wanted of the kernels: `value` at least, or at most, `bound`."""

    what: str
    bound: float
    at_least: bool
    value: float
    measured: str
    unit: str = "×"

    def wanted(self) -> str:
        """The bound as it is shown."""
        return f"{'≥' if self.at_least else '≤'} {self.bound:g}{self.unit}"

    def verdict(self) -> str:
        """Whether it was reached."""
        reached = self.value >= self.bound if self.at_least else self.value <= self.bound
        return "met" if reached else "missed"


def goals(results: dict) -> list[Goal]:
    """Every goal with what was measured."""
    forward, both = results["peers"]["forward, 2048"], results["peers"]["forward+backward, 512"]
    loop, pscan = "transformers' loop", "mambapy's pscan"
    rows = [faster("scan forward, L = 2,048, over transformers' loop", 30, forward, loop, "mabert")]
    if "mabert, avx2" in forward:
        rows.append(faster("the same with AVX2", 20, forward, loop, "mabert, avx2"))
    if pscan in both:
        rows.append(faster("scan forward + backward, L = 512, over mambapy's pscan", 50, both, pscan, "mabert"))
    step = ratio(both["mabert"], both["mabert, forward alone"])
    rows.append(Goal("forward + backward over forward, L = 512", 4.5, False, step, f"{step:.1f}×"))
    sweeps = [(dtype, "scans", "") for dtype in BYTES]
    sweeps.append(("float32", "scans_in_kept_memory", ", freed memory kept by the allocator"))
    for dtype, part, condition in sweeps:
        for name in ("forward", "forward+backward"):
            low, high = linearity(results[part], dtype, name)
            rows.append(
                Goal(
                    f"cost of a token from L = 512 to 16,384 off the mean, {name}, {dtype}{condition}",
                    10,
                    False,
                    max(-low, high) * 100,
                    f"{low:+.0%} to {high:+.0%}",
                    "%",
                )
            )
    share, memory = results["layer_share"]["share"], results["training_memory"]["ratio"]
    rows += [
        Goal("scan + conv in one M layer, L = 4,096, fp32", 6, False, share * 100, f"{share:.1%}", "%"),
        Goal(
            "peak extra memory of a training step of the scan, L = 4,096, over inputs and outputs",
            1.5,
            False,
            memory,
            f"{memory:.2f}×",
        ),
    ]
    for length, bf16, wanted in ((4096, False, 0.85), (4096, True, 0.57), (512, False, 1.12)):
        model = {r["model"]: r for r in results["models"] if (r["length"], r["bf16"]) == (length, bf16)}
        value = ratio(model["MaBERT"], model["BERT"])
        what = f"time of base MaBERT over BERT, L = {length:,}, {'bf16' if bf16 else 'fp32'}"
        rows.append(Goal(what, wanted, False, value, spread(model["MaBERT"], model["BERT"], 2)))
    if pairs := results.get("rte_pairs"):
        measured = f"{spread(pairs['padded'], pairs['packed'], 1)}, outputs within {pairs['largest_difference']:.0e}"
        what = f"{pairs['pairs']} pairs of RTE, throughput of packed over padded execution"
        rows.append(Goal(what, 1.4, True, pairs["speed_up"], measured))
    return rows


def faster(what: str, bound: float, medians: dict, peer: str, ours: str) -> Goal:
    """A goal about a ratio to a peer."""
    value = ratio(medians[peer], medians[ours])
    return Goal(what, bound, True, value, spread(medians[peer], medians[ours], 0))


def ratio(over: dict, under: dict) -> float:
    """Of two medians."""
    return over["median_ms"] / under["median_ms"]


def spread(over: dict, under: dict, digits: int) -> str:
    """The ratio of two medians, and what the quartiles of both would make of it."""
    low = over["lower_quartile_ms"] / under["upper_quartile_ms"]
    high = over["upper_quartile_ms"] / under["lower_quartile_ms"]
    return f"{ratio(over, under):.{digits}f}× ({low:.{digits}f} to {high:.{digits}f})"


def linearity(rows: list[dict], dtype: str, name: str) -> tuple[float, float]:
    """How far the cheapest and the dearest token lie from the mean over all lengths."""
    costs = [
        row["median_ms"] / row["length"]
        for row in rows
        if (row["backend"], row["dtype"], row["pass"]) == ("native", dtype, name)
    ]
    mean = sum(costs) / len(costs)
    return min(costs) / mean - 1, max(costs) / mean - 1


def floor_ms(row: dict, results: dict) -> float:
    """The least time that the measured rates allow for one scan."""
    inner, state, rates = results["sizes"]["inner"], results["sizes"]["state"], results["rates"]
    steps, backward = row["length"] * inner * state, row["pass"] == "forward+backward"
    rows_moved = (FORWARD_ROWS + BACKWARD_ROWS * backward) * row["length"]
    moved = rows_moved * inner * BYTES[row["dtype"]] / rates["copy_bytes_per_s"]
    multiply_adds = MULTIPLY_ADDS + BACKWARD_MULTIPLY_ADDS * backward
    exponentials, products = steps * (1 + backward) / rates["exp_per_s"], steps * multiply_adds / rates["fma_per_s"]
    return max(moved, exponentials, products) * 1e3


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
    """How well the cost model of packed attention chooses, on mixtures that its constants were not chosen on."""
    rows = [row for row in attention["mixtures"] if row["kind"] == "held out"]
    ways = {
        "the cost model": lambda row: row["grid_ms"] if row["takes_grid"] else row["one_by_one_ms"],
        "always a grid": lambda row: row["grid_ms"],
        "always one by one": lambda row: row["one_by_one_ms"],
    }
    sentences = []
    for hidden in sorted({row["hidden_size"] for row in rows}):
        costs = []
        for name, way in ways.items():
            lost = [
                way(row) / min(row["grid_ms"], row["one_by_one_ms"]) for row in rows if row["hidden_size"] == hidden
            ]
            costs.append(f"{name} {sum(lost) / len(lost):.2f} (at worst {max(lost):.1f})")
        sentences.append(f"hidden size {hidden}: {', '.join(costs)}")
    return (
        "Packed attention over mixtures of lengths that the cost model was not made on, time over that of the cheaper "
        f"way; {'; '.join(sentences)}."
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
    exponentials = FLOPS * rates["exp_per_s"] / 1e9
    ridge = matmul / bandwidth
    axes.plot(
        [intensity[0], ridge, intensity[1]],
        [intensity[0] * bandwidth, matmul, matmul],
        color="0.35",
        label="copy bandwidth, then torch's matrix product",
    )
    axes.axhline(exponentials, color="tab:red", linestyle="--", label="the forward's exponentials")
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
    axes.set_ylim(0.3, 2 * max(matmul, exponentials))
    axes.set_xlim(*intensity)
    axes.set_xlabel("operations a byte moved")
    axes.set_ylabel("billion operations a second")
    axes.set_title(f"Selective scan, L = {lengths[0]:,} (dark) to {lengths[-1]:,} (light)")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower left", fontsize=8)
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, dpi=130)
    pyplot.close(figure)
