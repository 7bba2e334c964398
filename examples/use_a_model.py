"""A pretrained or fine-tuned model through transformers' own doors: Auto classes and pipelines.

python examples/use_a_model.py demo/pretrained demo/classifier
"""

import sys

from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

import mabert  # noqa: F401  (makes the Auto classes know the model)


def main(pretrained: str, classifier: str) -> None:
    """Fill a mask, label two sentences, count parameters."""
    fill = pipeline("fill-mask", model=pretrained)
    for answer in fill("This [MASK] returns a string.", top_k=3):
        print(f"{answer['score']:.3f}  {answer['sequence']}")

    judge = pipeline("text-classification", model=classifier)
    for sentence in ("Each function returns a new list.", "Each functions return new a list."):
        print(sentence, judge(sentence)[0])

    model = AutoModelForMaskedLM.from_pretrained(pretrained)
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens, layers {model.config.pattern}")


if __name__ == "__main__":
    main(*sys.argv[1:])
