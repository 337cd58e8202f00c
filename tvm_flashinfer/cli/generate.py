"""``generate``: prompts in, answers out."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from ..engine import Completion, Delta, Engine, EngineStats, SamplingParams
from ..errors import UserError
from .output import errors, print_json, table

__all__ = ["run_generate", "sampling", "stats_rows"]


def run_generate(
    directory: Path,
    *,
    prompts: list[str],
    prompts_file: Path | None,
    max_tokens: int,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    stop: tuple[str, ...],
    use_template: bool,
    max_batch: int | None,
    kv_tokens: int | None,
    stats: bool,
    as_json: bool,
) -> None:
    """Answers every prompt; see ``tvm-flashinfer generate --help``."""
    texts = [*prompts, *(_read_prompts(prompts_file) if prompts_file is not None else [])]
    if not texts:
        raise UserError("No prompt was given; use --prompt TEXT or --prompts-file FILE.")
    engine = Engine.load(directory, kv_tokens=kv_tokens, max_batch=max_batch)
    params = sampling(engine, max_tokens, temperature, top_p, seed, stop)
    stream = len(texts) == 1 and not as_json
    completions = engine.generate(
        [_prompt(engine, text, use_template) for text in texts],
        params,
        on_delta=_print_delta if stream else None,
    )
    if as_json:
        print_json(_as_json(texts, completions, engine.stats))
    elif stream:
        print()
    else:
        for text, completion in zip(texts, completions, strict=True):
            print(f"[{completion.index + 1}] {text}\n{completion.text}\n")
    if stats:
        errors.print(table("Speed", ["what", "value"], stats_rows(engine, completions)))


def sampling(
    engine: Engine,
    max_tokens: int,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    stop: tuple[str, ...] = (),
) -> SamplingParams:
    """The options of the command line over the checkpoint's defaults."""
    params = dataclasses.replace(
        engine.default_params(), max_tokens=max_tokens, seed=seed, stop=stop
    )
    if temperature is not None:
        params = dataclasses.replace(params, temperature=temperature)
    if top_p is not None:
        params = dataclasses.replace(params, top_p=top_p)
    return params


def stats_rows(engine: Engine, completions: list[Completion]) -> list[list[str]]:
    """What there is to say about speed, as rows of a table."""
    stats = engine.stats
    rows = [
        ["prompt tokens", f"{stats.prefill_tokens}"],
        ["prefill, tokens/s", f"{stats.prefill_tokens_per_second:.1f}"],
        ["decode tokens", f"{stats.decode_tokens}"],
        ["decode, tokens/s", f"{stats.decode_tokens_per_second:.1f}"],
        ["decode step, ms", f"{stats.step_seconds * 1e3:.2f}"],
        ["requests at once", f"{stats.peak_batch}"],
        ["computed again", f"{stats.preemptions}"],
        ["free pages", f"{stats.free_pages} of {stats.total_pages}"],
    ]
    gaps = sorted(c.token_seconds for c in completions if c.token_seconds)
    if gaps:
        median = gaps[len(gaps) // 2]
        rows.insert(5, ["inter-token latency, ms", f"{median * 1e3:.2f}"])
    return rows


def _prompt(engine: Engine, text: str, use_template: bool) -> str | list[int]:
    if not use_template:
        return text
    written = engine.tokenizer.render([{"role": "user", "content": text}])
    return engine.tokenizer.encode(written, special=False)


def _print_delta(delta: Delta) -> None:
    sys.stdout.write(delta.text)
    sys.stdout.flush()


def _read_prompts(path: Path) -> list[str]:
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"The prompts file {path} can't be read: {reason}.") from error
    return [line for line in text.splitlines() if line.strip()]


def _as_json(texts: list[str], completions: list[Completion], stats: EngineStats) -> dict[str, Any]:
    numbers = dataclasses.asdict(stats)
    numbers["prefill_tokens_per_second"] = stats.prefill_tokens_per_second
    numbers["decode_tokens_per_second"] = stats.decode_tokens_per_second
    numbers["step_seconds"] = stats.step_seconds
    return {
        "completions": [
            {"prompt": text, **dataclasses.asdict(completion)}
            for text, completion in zip(texts, completions, strict=True)
        ],
        "stats": numbers,
    }
