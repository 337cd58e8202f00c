"""The typer application: options of every command, and what becomes of errors.

Commands are implemented in modules of their own, imported when they are called, so that
``--help`` and mistakes in options are answered without loading TVM.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from .. import __version__
from ..errors import UserError
from .output import errors

__all__ = ["app", "main"]

EXIT_DONE = 0
EXIT_OURS = 1
EXIT_USER = 2

app = typer.Typer(
    name="tvm-flashinfer",
    help="Compile a language model with TVM and our attention, and talk to it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    try:
        app(args=None if argv is None else list(argv), prog_name="tvm-flashinfer")
    except SystemExit as end:
        return EXIT_DONE if end.code is None else int(end.code)
    except Exception as error:
        if is_user_mistake(error):
            errors.print(f"[bold red]error:[/] {_escape(str(error))}", soft_wrap=True)
            return EXIT_USER
        traceback.print_exception(error, file=sys.stderr)
        errors.print(
            "[bold red]internal error:[/] this is a mistake of tvm-flashinfer's, not yours; "
            "please report the lines above.",
            soft_wrap=True,
        )
        return EXIT_OURS
    return EXIT_DONE


def is_user_mistake(error: Exception) -> bool:
    """Whether the message of ``error`` is a sentence for the user."""
    from .._library import LibraryError

    if isinstance(error, UserError | LibraryError):
        return True
    # Only what is loaded already can have raised: don't import the compiler to find out.
    names = {
        "tvm_flashinfer.jit": "CompilerError",
        "relax_passes.dispatch_kv_cache": "DispatchError",
        "relax_passes.explain": "ModuleError",
        "relax_passes.importer": "CheckpointError",
        "relax_passes.pipeline": "CompileError",
    }
    kinds = (getattr(sys.modules.get(module), name, None) for module, name in names.items())
    return any(isinstance(error, kind) for kind in kinds if kind is not None)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"tvm-flashinfer {__version__}")
        raise typer.Exit


Dtype = Literal["float32", "float16", "bfloat16"]
ModelDir = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="A directory made by `compile`.", show_default=False),
]
Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT", help="A local Hugging Face model directory.", show_default=False
    ),
]
KvTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Size of the KV pool in tokens.", show_default="as memory allows"),
]
Temperature = Annotated[
    float | None,
    typer.Option(min=0.0, help="0 is greedy.", show_default="the checkpoint's"),
]
TopP = Annotated[
    float | None,
    typer.Option(help="Sample from the likeliest tokens of this total probability."),
]
Seed = Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("compile")
def compile_command(
    checkpoint: Checkpoint,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where to write the model.")
    ],
    target: Annotated[
        str, typer.Option(help="A TVM target: llvm (this CPU), cuda, or a full target string.")
    ] = "llvm",
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Of weights and KV cache.", show_default="the checkpoint's"),
    ] = None,
    page_size: Annotated[int, typer.Option(min=1, help="Tokens of a KV page.")] = 16,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests computed at once.")] = 8,
    max_seq_len: Annotated[
        int | None,
        typer.Option(min=2, help="Longest context in tokens.", show_default="the model's, <= 4096"),
    ] = None,
    attention: Annotated[
        Literal["ours", "tir"], typer.Option(help="`tir` is TVM's own attention, as a baseline.")
    ] = "ours",
) -> None:
    """Compile a checkpoint into a directory that runs by itself."""
    from .compile import Options, compile_checkpoint
    from .output import Stages, print_report, screen

    options = Options(
        target=target,
        dtype=dtype,
        page_size=page_size,
        max_batch=max_batch,
        max_seq_len=max_seq_len,
        attention=attention,
    )
    with Stages() as stages:
        manifest = compile_checkpoint(checkpoint, output, options, stages)
    print_report(manifest.report, title=f"Attention in {checkpoint.name or checkpoint}")
    screen.print(
        f"[green]Compiled[/] {_escape(str(output))}: {manifest.dtype}, {_escape(manifest.target)}, "
        f"context {manifest.max_seq_len}, {stages.seconds:.1f} s. "
        f"Try: tvm-flashinfer chat {_escape(str(output))}",
        soft_wrap=True,
    )


@app.command()
def chat(
    directory: ModelDir,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    kv_tokens: KvTokens = None,
) -> None:
    """Talk to a compiled model: streaming, over one KV cache. /help lists the commands."""
    from .chat import run_chat

    run_chat(
        directory,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        system=system,
        kv_tokens=kv_tokens,
    )


@app.command()
def generate(
    directory: ModelDir,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; may be given several times.")
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="One prompt a line; - is standard input.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End an answer before this text; repeatable.")
    ] = None,
    use_template: Annotated[
        bool, typer.Option("--chat", help="Wrap each prompt in the model's chat template.")
    ] = False,
    max_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Requests computed at once.", show_default="as compiled"),
    ] = None,
    kv_tokens: KvTokens = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print a table of speeds.")] = False,
    as_json: Json = False,
) -> None:
    """Answer prompts, many at once by continuous batching."""
    from .generate import run_generate

    run_generate(
        directory,
        prompts=prompt or [],
        prompts_file=prompts_file,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
        use_template=use_template,
        max_batch=max_batch,
        kv_tokens=kv_tokens,
        stats=stats,
        as_json=as_json,
    )


@app.command()
def inspect(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A local Hugging Face model directory; or a .py file: a Relax module as "
            "TVMScript, or a script that leaves one in its variable mod.",
            show_default=False,
        ),
    ],
    dtype: Annotated[
        Dtype | None, typer.Option(help="To import it in.", show_default="the checkpoint's")
    ] = None,
    site: Annotated[
        int | None,
        typer.Option(min=0, help="Explain this one: its graph, its variant, its kernel's C++."),
    ] = None,
    svg: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the module (matplotlib).")
    ] = None,
    png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The same as a PNG file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what the pass finds in a model: one row per attention site."""
    from .inspect import run_inspect

    draw = [path.with_suffix(".svg") for path in (svg,) if path is not None]
    draw += [path.with_suffix(".png") for path in (png,) if path is not None]
    run_inspect(checkpoint, dtype=dtype, site=site, draw=draw, as_json=as_json)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def mlc(context: typer.Context) -> None:
    """mlc_llm with our attention: compile, convert_weight, gen_config, chat, serve, …"""
    from .mlc import run_mlc

    run_mlc(context.args)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine and this installation; exit code 1 if something needed is broken."""
    from .doctor import examine, print_findings
    from .output import print_json

    findings = examine()
    if as_json:
        print_json([finding.as_dict() for finding in findings])
    else:
        print_findings(findings)
    if any(finding.status == "broken" for finding in findings):
        raise typer.Exit(EXIT_OURS)


@app.command()
def bench(
    suite: Annotated[str, typer.Argument(help="What to measure.", show_default=False)],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.", show_default="all")
    ] = None,
    cases: Annotated[str, typer.Option(metavar="GLOB", help="Only cases of this name.")] = "*",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers here.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Draw PNG charts here (matplotlib).")
    ] = None,
) -> None:
    """Measure a suite against its peers and its floor: attention, kv-cache, generate, …"""
    from .bench import run_bench

    run_bench(suite, device=device, threads=threads, cases=cases, json_file=json_file, plot=plot)
