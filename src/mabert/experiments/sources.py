"""What the experiments read: text to pretrain on, tasks to fine-tune on, sentences to pad; real or generated."""

import hashlib
import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from mabert.data import generated
from mabert.data.corpus import SUFFIXES, CorpusError, iter_documents
from mabert.data.formats import read_lines
from mabert.data.glue import glue_files, glue_paths, load_glue
from mabert.data.paraphrase import Pair, read_pairs
from mabert.data.shards import MANIFEST, prepare_shards
from mabert.data.tables import read_table
from mabert.data.tokenizer import load_tokenizer, tokenizer_hash, train_tokenizer
from mabert.experiments.architectures import Vocabulary
from mabert.experiments.cells import Cell
from mabert.experiments.scales import Scale
from mabert.files import atomic_folder, atomic_write, digest

GENERATED = "generated"
GENERATED_TASK = "acceptability"
GENERATED_SEED = 0
SPLITS = ("train", "valid")


@dataclass(frozen=True)
class Sources:
    """Text and tasks of an experiment.

    Args:
        scale: how much of it is taken.
        work: folder for what is made of it: the text as it was cut, the tokenizer, the token ids.
        data: folder with `text/*.train.txt*`, `text/*.valid.txt*`, `glue/<task>/` and, for some experiments,
            `paraphrase/*.tsv*`; without it, text, one task and paraphrases are generated.
    """

    scale: Scale
    work: Path
    data: Path | None = None

    @cached_property
    def folder(self) -> Path:
        """Where the prepared text is; other text, or more of it, has another folder."""
        choices = hashlib.sha256(json.dumps(self._choices()).encode()).hexdigest()
        return self.work / f"text-{choices[:8]}"

    def _choices(self) -> dict[str, Any]:
        return {
            "text": self._text_identity,
            "text_lines": self.scale.text_lines,
            "vocab_size": self.scale.vocab_size,
            "max_length": max(self.scale.stage_lengths),
        }

    @property
    def tokenizer(self) -> Path:
        """The common tokenizer of all models."""
        return self.folder / "tokenizer"

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks to fine-tune on."""
        return self.scale.tasks if self.data else (GENERATED_TASK,)

    @cached_property
    def _text_identity(self) -> dict[str, str]:
        if self.data is None:
            return generator()
        return digests(path for split in SPLITS for path in self._text_files(split))

    def cell(self) -> Cell:
        """Cuts the text, trains the tokenizer and tokenises: what every pretraining needs."""
        return Cell(
            name="text",
            config=self._choices(),
            run=self._prepare,
            artifact=self.shards / "valid" / MANIFEST,
        )

    @property
    def shards(self) -> Path:
        """Token ids of the text."""
        return self.folder / "shards"

    def texts(self, split: str) -> tuple[str, ...]:
        """The files of a split, as they were cut."""
        return tuple(sorted(str(path) for path in (self.folder / "raw").glob(f"*.{split}.txt")))

    def vocabulary(self) -> Vocabulary:
        """Of the prepared tokenizer."""
        tokenizer = load_tokenizer(self.tokenizer)
        return Vocabulary(len(tokenizer), tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id)

    def task_choices(self, task: str) -> dict[str, Any]:
        """The fields of `FinetuneConfig` that name a task."""
        if task != GENERATED_TASK:
            assert self.data is not None
            return {"task": task, "glue": self.data / "glue"}
        tables = self._tables()
        return {"train": tables / "train.tsv", "dev": tables / "dev.tsv", "text_column": "sentence"}

    def task_identity(self, task: str) -> dict[str, str]:
        """What a task's data are, for a cell's config: file names with digests of their content."""
        return self._task_identities[task]

    @cached_property
    def _task_identities(self) -> dict[str, dict[str, str]]:
        if self.data is None:
            return {GENERATED_TASK: generator()}
        return {task: digests(glue_files(self.data / "glue", task).values()) for task in self.tasks}

    def gold(self, task: str) -> dict[str, list[int]]:
        """The classes of every row of a task's dev sets."""
        if task == GENERATED_TASK:
            train, dev = (
                read_table(self._tables() / f"{split}.tsv", text_columns=["sentence"], label_column="label")
                for split in ("train", "dev")
            )
            assert train.label_names == dev.label_names
            tables = {"dev": dev}
        else:
            assert self.data is not None
            tables = {name: table for name, table in load_glue(self.data / "glue", task).items() if name != "train"}
        return {name: [int(label) for label in table.labels or ()] for name, table in tables.items()}

    def sentences(self) -> tuple[str, list[str]]:
        """What they are, and sentences whose drift under padding is measured; generated where the data have no CoLA."""
        rows = self.scale.drift_rows
        if self.data is None or not glue_paths(self.data / "glue", "CoLA")["dev"].exists():
            return "generated sentences", generated.sentences(rows or 1_000, GENERATED_SEED)
        return "CoLA dev", load_glue(self.data / "glue", "CoLA", splits=("dev",))["dev"].texts[:rows]

    def pairs(self) -> tuple[list[Pair], list[Pair]]:
        """Passages with their paraphrases, to train on, and held out, in a random order: every tenth, without those of
        which a text is trained on.

        Raises:
            CorpusError: the data have no paraphrases.
            TableError: a file of them cannot be read.
        """
        made = generated.paraphrases(1_000, GENERATED_SEED) if self.data is None else None
        pairs = made or read_pairs(self._pair_files())
        train = [pair for n, pair in enumerate(pairs) if n % 10]
        read = {text for pair in train for text in pair}
        held_out = [pair for pair in pairs[::10] if not read & set(pair)]
        return train, random.Random(GENERATED_SEED).sample(held_out, len(held_out))

    @property
    def has_pairs(self) -> bool:
        """Whether there are paraphrases, or they are generated."""
        return self.data is None or (self.data / "paraphrase").is_dir()

    def pairs_identity(self) -> dict[str, str]:
        """What the pairs are, for a cell's config."""
        return generator() if self.data is None else digests(self._pair_files())

    def _pair_files(self) -> list[Path]:
        assert self.data is not None
        endings = tuple(f".tsv{packed}" for packed in ("", ".gz", ".xz"))
        found = sorted(path for path in (self.data / "paraphrase").glob("*") if path.name.endswith(endings))
        if not found:
            raise CorpusError(
                f"{self.data}/paraphrase holds no .tsv (or .gz, .xz) of passages and paraphrases: put some there, or "
                "leave --data out to generate them"
            )
        return found

    def _text_files(self, split: str) -> list[Path]:
        assert self.data is not None
        endings = tuple(f".{split}{suffix}" for suffix in SUFFIXES if suffix.startswith(".txt"))
        found = sorted(path for path in (self.data / "text").glob("*") if path.name.endswith(endings))
        if not found:
            raise CorpusError(
                f"{self.data}/text holds no *.{split}.txt (or .gz, .xz): name the folder that has text/ and glue/, or "
                "leave it out to generate text"
            )
        return found

    def _tables(self) -> Path:
        folder = self.work / f"{GENERATED_TASK}-{generator()[GENERATED][:8]}"
        if not folder.exists():
            with atomic_folder(folder, replace=True) as temporary:
                generated.write_tables(temporary)
        return folder

    def _prepare(self) -> dict[str, Any]:
        if not (self.folder / "raw").exists():
            with atomic_folder(self.folder / "raw") as raw:
                if self.data is None:
                    generated.write_text(raw)
                    for split in SPLITS:
                        (raw / f"{split}.txt").rename(raw / f"{GENERATED}.{split}.txt")
                else:
                    for split in SPLITS:
                        for path in self._text_files(split):
                            self._cut(path, raw / f"{path.name.partition('.txt')[0]}.txt")
        if not self.tokenizer.exists():
            with atomic_folder(self.tokenizer) as folder:
                train_tokenizer(
                    iter_documents(self.texts("train")),
                    vocab_size=self.scale.vocab_size,
                    model_max_length=max(self.scale.stage_lengths),
                ).save_pretrained(folder)
        tokenizer = load_tokenizer(self.tokenizer)
        shards = {split: prepare_shards(self.texts(split), tokenizer, self.shards / split) for split in SPLITS}
        return {
            "vocab_size": len(tokenizer),
            "tokenizer_hash": tokenizer_hash(tokenizer),
            **{f"{split}_documents": found.n_documents for split, found in shards.items()},
            **{f"{split}_tokens": found.n_tokens for split, found in shards.items()},
        }

    def _cut(self, source: Path, target: Path) -> None:
        with source.open("rb") as file, atomic_write(target, "w") as written:
            lines = (line for _, line in read_lines(file, CorpusError))
            written.writelines(f"{line}\n" for line in islice(lines, self.scale.text_lines))


def digests(paths: Iterable[Path]) -> dict[str, str]:
    """Names of files, each with a digest of its content."""
    return {path.name: digest(path) for path in paths}


def generator() -> dict[str, str]:
    """What generated data are made by; other code may make other data."""
    return {GENERATED: digest(generated.__file__)}
