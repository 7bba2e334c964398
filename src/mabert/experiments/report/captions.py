"""What every caption has to say: the scale, the seeds, and what was held equal."""

import json
from collections.abc import Iterable, Sequence

from mabert.experiments.report.collect import Results
from mabert.experiments.timing import BLOCK_SPARSE_ABOVE

UNMATCHED = {
    "ALBERT": "ALBERT's as if its layers shared nothing, so that it has the same width and fewer parameters",
    "Longformer": "Longformer's without those of global attention, which pretraining does not reach",
}
"""Models of which not everything is counted, and what is."""
NOT_COMPARABLE = "small-scale: not comparable with published scores"


def counted(counts: Iterable[int], what: str) -> str:
    """So many of them: "1 seed", "5 seeds", or "1 to 5 seeds" where they differ."""
    low, high = min(counts := list(counts), default=0), max(counts, default=0)
    return f"{low:,} {what}{'s' * (low != 1)}" if low == high else f"{low:,} to {high:,} {what}s"


def at_scale(results: Results) -> str:
    """The scale, and what has to be said of every one below base."""
    return f"Scale {results.scale.name}" + ("" if results.scale.name == "base" else f", {NOT_COMPARABLE}")


def pretraining_seeds(results: Results, models: Sequence[str]) -> str:
    """The scale and how many pretraining runs stand behind each number."""
    counts = _pretraining_counts(results, models)
    return f"{at_scale(results)}; {counted(counts, 'pretraining seed')}{_of_runs(max(counts, default=0))}."


def seeds(results: Results, models: Sequence[str]) -> str:
    """The scale and how many runs stand behind each number."""
    counts, finetuning = _pretraining_counts(results, models), len(results.finetuning_seeds())
    return (
        f"{at_scale(results)}; {counted(counts, 'pretraining seed')}, {counted([finetuning], 'fine-tuning seed')}"
        f"{_of_runs(max(counts, default=0) * finetuning)}."
    )


def trained_again(results: Results, names: Iterable[str]) -> list[str]:
    """A remark where cells started from other weights than those that their model's pretraining cell tells of."""
    models = []
    for name in names:
        _, model, seed, *_ = name.split("/")
        seed = seed if seed.isdigit() else "0"  # drift is measured on the first one
        pretraining = results.found([f"pretraining/{model.partition('~')[0]}/{seed}"])
        weights = {record.result.get("weights") for record in (*pretraining, *results.found([name]))} - {None}
        if len(weights) > 1 and model not in models:
            models.append(model)
    if not models:
        return []
    return [f"Pretrained again since, by the same choices: {', '.join(models)}. Its numbers are of several models."]


def full_attention(results: Results) -> str:
    """What has to be said of BigBird where no row is long enough for its own attention."""
    if max(results.scale.stage_lengths) > BLOCK_SPARSE_ABOVE:
        return ""
    return (
        f"BigBird attends to everything in rows of up to {BLOCK_SPARSE_ABOVE} tokens, longer ones than there are here."
    )


def _pretraining_counts(results: Results, models: Sequence[str]) -> list[int]:
    return [len(results.pretraining_seeds(model)) for model in models if results.is_measured(model)]


def _of_runs(runs: int) -> str:
    return ", mean ± sample standard deviation over the runs" if runs > 1 else ""


def matched(results: Results, models: Sequence[str]) -> str:
    """What the models have in common, as far as the cells of their pretraining tell."""
    found = [record for model in models for record in results.found(results.pretrainings(model))]
    if not found:
        return ""
    architectures = {record.config["architecture"] for record in found}
    but = "".join(f"; {remark}" for model, remark in UNMATCHED.items() if model in architectures)
    matching = f"parameters outside the embeddings (by the width of the FFN{but})"
    equal = [matching] if found[0].config["match_parameters"] else []
    unlike = []
    tokens = sorted({int(record.at("tokens")) for record in found})
    if len(tokens) == 1:
        equal.append(f"{tokens[0]:,} tokens")
    else:
        unlike.append(f"the tokens, {tokens[0]:,} to {tokens[-1]:,}")
    own = {"architecture", "seed"}
    recipes = {
        json.dumps({key: value for key, value in record.config.items() if key not in own}, sort_keys=True)
        for record in found
    }
    if len(recipes) == 1:
        equal += ["text", "tokenizer", "recipe"]
    else:
        unlike.append("the choices in the configs")
    return " ".join(
        [f"Matched: {', '.join(equal)}."] * bool(equal) + [f"Not matched: {'; '.join(unlike)}."] * bool(unlike)
    )
