"""Compress a model's embedding 32 times, then bring its quality back by distillation, without a single label.

A text classifier is trained and its table compressed. ``vqrs.torch.distill`` then tunes the codebooks, and in a second
run the layer behind them too, until the outputs come back to those of the whole model: it needs texts, but not their
labels. All figures are of texts that neither training nor tuning has seen.

Run it:  python examples/04_distill.py
"""

import copy
import tempfile
from pathlib import Path

import torch
from torch import nn

import vqrs.torch

N_WORDS, DIM, N_CLASSES, WORDS = 6_000, 64, 40, 12
Texts = tuple[torch.Tensor, torch.Tensor]


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(N_WORDS, DIM)
        self.hidden = nn.Linear(DIM, 128)
        self.head = nn.Linear(128, N_CLASSES)

    def forward(self, texts: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.hidden(self.words(texts).mean(1))))


def make_texts(n_texts: int, generator: torch.Generator) -> Texts:
    """Texts of 12 words, a third of which speaks of the text's class; frequent words come first, as Zipf says."""
    labels = torch.randint(N_CLASSES, (n_texts,), generator=generator)
    words = (N_WORDS ** torch.rand(n_texts, WORDS, generator=generator)).long() - 1
    on_topic = words[:, : WORDS // 3] // N_CLASSES * N_CLASSES + labels[:, None]
    return torch.cat([on_topic.clamp(max=N_WORDS - 1), words[:, WORDS // 3 :]], 1), labels


def train(model: nn.Module, texts: Texts, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch, target in zip(texts[0].split(256), texts[1].split(256), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), target).backward()
            optimizer.step()


@torch.no_grad()
def report(step: str, model: Classifier, teacher: Classifier, test: Texts, nbytes: int) -> None:
    answers, whole = model(test[0]), teacher(test[0])
    accuracy = (answers.argmax(1) == test[1]).float().mean()
    agreement = (answers.argmax(1) == whole.argmax(1)).float().mean()
    distance = vqrs.torch.output_loss(answers, whole)
    print(
        f"{step:26} table {nbytes / 1024:6.0f} KiB   accuracy {accuracy:.1%}   "
        f"answers as the whole model {agreement:.1%}   distance of the outputs {distance:.3f}"
    )


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Classifier()
    train(model, make_texts(20_000, generator), epochs=4)
    test = make_texts(4_000, generator)
    unlabelled = list(make_texts(20_000, generator)[0].split(256))
    held_out = list(make_texts(2_000, generator)[0].split(256))

    # The whole model stays as the teacher; what is compressed is the model itself.
    teacher = copy.deepcopy(model)
    report("whole model", model, teacher, test, 4 * N_WORDS * DIM)
    model.words = vqrs.torch.Embedding.from_pretrained(model.words, ratio=32, random_state=0)
    report("compressed", model, teacher, test, model.words.to_table().nbytes)

    result = vqrs.torch.distill(model, teacher, unlabelled, validation=held_out, epochs=3)
    report("distilled: tables", model, teacher, test, model.words.to_table().nbytes)
    print(result)
    result = vqrs.torch.distill(model, teacher, unlabelled, validation=held_out, epochs=3, layers="hidden")
    report("distilled: tables, layer", model, teacher, test, model.words.to_table().nbytes)
    print(result)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "words.safetensors"
        model.words.to_table().save(path)
        model.words = vqrs.torch.Embedding.from_table(path)
        report("saved and mapped back", model, teacher, test, path.stat().st_size)


if __name__ == "__main__":
    main()
