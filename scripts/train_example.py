"""Makes the example checkpoint: writes English, trains a small Llama on it, measures and saves it.

    python scripts/train_example.py                     # examples/storyteller, about ten minutes
    python scripts/train_example.py --smoke --out DIR   # the whole path in seconds, learns nothing

The parts are in ``scripts/storyteller``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from storyteller.card import CardFacts, model_card
from storyteller.checkpoint import model_config, save, train_tokenizer
from storyteller.dialogue import text_of, write_document
from storyteller.evaluation import (
    SAMPLE_PROMPTS,
    Score,
    general_questions,
    generate,
    held_out_questions,
    score,
)
from storyteller.training import EASY_SHARE, Batch, batches, train
from transformers import LlamaForCausalLM

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "examples" / "storyteller"
DEFAULT_STEPS = 2400
SMOOTHING = 0.98

console = Console()
app = typer.Typer(add_completion=False)


def _train_with_progress(model: LlamaForCausalLM, stream: Iterator[Batch], steps: int) -> None:
    """Trains behind a progress bar that shows the smoothed loss; one line per tenth in a log."""
    smoothed = float("nan")
    with Progress(
        TextColumn("training"),
        BarColumn(),
        TextColumn("step {task.completed}/{task.total}  loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        task = progress.add_task("training", total=steps, loss=smoothed)

        def report(step: int, loss: float) -> None:
            nonlocal smoothed
            first = step == 0
            smoothed = loss if first else SMOOTHING * smoothed + (1 - SMOOTHING) * loss
            progress.update(task, advance=1, loss=smoothed)
            if (step + 1) % max(1, steps // 10) == 0:
                progress.console.print(f"step {step + 1}: loss {smoothed:.4f}")

        train(model, stream, steps, report)


def _score_table(stories: Score, facts: Score) -> Table:
    table = Table(title="Exact greedy answers")
    table.add_column("kind of question")
    table.add_column("right", justify="right")
    table.add_column("asked", justify="right")
    for part in (stories, facts):
        for kind in sorted(part.total):
            table.add_row(kind, str(part.right[kind]), str(part.total[kind]))
        table.add_section()
    table.add_row("held-out stories", f"{stories.accuracy:.1%}", str(stories.total.total()))
    table.add_row("general", f"{facts.accuracy:.1%}", str(facts.total.total()))
    return table


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Directory to write.")] = DEFAULT_OUT,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = DEFAULT_STEPS,
    seed: Annotated[int, typer.Option(help="Fixes text, first weights and order.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    held_out: Annotated[int, typer.Option(min=1, help="Unseen stories to ask about.")] = 200,
    smoke: Annotated[bool, typer.Option(help="A few steps only, to try the path.")] = False,
) -> None:
    """Trains the storyteller and writes it as a Hugging Face directory with a model card."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    documents = 5000
    if smoke:
        documents, steps, held_out = 500, min(steps, 3), 1

    began = time.monotonic()
    rng = Random(seed)
    tokenizer = train_tokenizer(text_of(write_document(rng)) for _ in range(documents))
    model = LlamaForCausalLM(model_config(tokenizer))
    console.print(
        f"{model.num_parameters():,} parameters, {tokenizer.get_vocab_size()} tokens, "
        f"{steps} steps on {threads} threads"
    )
    _train_with_progress(model, batches(tokenizer, rng, int(EASY_SHARE * steps)), steps)
    minutes = (time.monotonic() - began) / 60
    save(model, tokenizer, out)

    with console.status("asking questions"):
        stories = score(model, tokenizer, held_out_questions(held_out))
        facts = score(model, tokenizer, general_questions())
        length = 8 if smoke else 200
        samples = [(p, generate(model, tokenizer, p, length)[0]) for p in SAMPLE_PROMPTS]
    console.print(_score_table(stories, facts))
    for prompt, text in samples:
        console.print(f"[bold]{prompt}[/bold]{text}\n", highlight=False)
    run = CardFacts(model.config, model.num_parameters(), steps, seed, threads, minutes)
    (out / "README.md").write_text(model_card(run, stories, facts, samples), encoding="utf-8")
    size = sum(file.stat().st_size for file in out.iterdir())
    console.print(f"{out}: {size / 1e6:.2f} MB, trained in {minutes:.1f} minutes")


if __name__ == "__main__":
    app()
