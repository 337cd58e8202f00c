"""Makes the example checkpoint: writes English, trains a small Llama on it, measures and saves it.

    python scripts/train_example.py                     # 6 minutes with a GPU, hours without
    python scripts/train_example.py --smoke --out DIR   # the whole path in seconds, learns nothing

The parts are in ``scripts/storyteller``.
"""

from __future__ import annotations

import math
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
from storyteller.training import Batch, batches, train
from storyteller.writers import written_batches
from transformers import LlamaForCausalLM

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "examples" / "storyteller"
DEFAULT_STEPS = 12_000
DEFAULT_TOKENS = 6144
SMOOTHING = 0.8

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
            first = math.isnan(smoothed)
            smoothed = loss if first else SMOOTHING * smoothed + (1 - SMOOTHING) * loss
            progress.update(task, completed=step + 1, loss=smoothed)
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
    tokens: Annotated[int, typer.Option(min=64, help="Tokens of a step.")] = DEFAULT_TOKENS,
    writers: Annotated[int, typer.Option(min=0, help="Processes that write text; 0: none.")] = 10,
    device: Annotated[str, typer.Option(help="cpu or cuda; by default cuda if there is one.")] = "",
    held_out: Annotated[int, typer.Option(min=1, help="Unseen stories to ask about.")] = 200,
    smoke: Annotated[bool, typer.Option(help="A few steps only, to try the path.")] = False,
) -> None:
    """Trains the storyteller and writes it as a Hugging Face directory with a model card."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    documents = 5000
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if smoke:
        documents, steps, held_out, tokens, writers = 500, min(steps, 3), 1, 1024, 0

    began = time.perf_counter()
    rng = Random(seed)
    tokenizer = train_tokenizer(text_of(write_document(rng)) for _ in range(documents))
    model = LlamaForCausalLM(model_config(tokenizer)).to(device)
    console.print(
        f"{model.num_parameters():,} parameters, {tokenizer.get_vocab_size()} tokens, "
        f"{steps} steps of {tokens} tokens on {device}"
    )
    stream = (
        written_batches(tokenizer, seed, steps, tokens, writers)
        if writers
        else batches(tokenizer, rng, steps, tokens)
    )
    _train_with_progress(model, stream, steps)
    model = model.cpu()
    minutes = (time.perf_counter() - began) / 60
    save(model, tokenizer, out)

    with console.status("asking questions"):
        stories = score(model, tokenizer, held_out_questions(held_out))
        facts = score(model, tokenizer, general_questions())
        length = 8 if smoke else 200
        samples = [(p, generate(model, tokenizer, p, length)[0]) for p in SAMPLE_PROMPTS]
    console.print(_score_table(stories, facts))
    for prompt, text in samples:
        console.print(f"[bold]{prompt}[/bold]{text}\n", highlight=False)
    run = CardFacts(
        model.config, model.num_parameters(), steps, tokens, seed, writers, device, minutes
    )
    (out / "README.md").write_text(model_card(run, stories, facts, samples), encoding="utf-8")
    size = sum(file.stat().st_size for file in out.iterdir())
    console.print(f"{out}: {size / 1e6:.2f} MB, trained in {minutes:.1f} minutes")


if __name__ == "__main__":
    app()
