"""What suite ``mlc`` runs in processes of its own: mlc_llm's compiler and its engine.

``python -m tvm_flashinfer.bench.mlc_process compile ours|tvm ARGUMENTS…`` is ``mlc_llm compile
ARGUMENTS…`` with our KV cache or TVM's; all else is the same. ``… engine FOLDER LIBRARY REQUESTS
TOKENS LENGTH…`` prints JSON: milliseconds a token, as MLCEngine reports them for requests of so
many tokens, by the length of the prompt.
"""

from __future__ import annotations

import json
import statistics
import sys

import tvm_flashinfer.mlc  # noqa: F401


def compile_model(cache: str, arguments: list[str]) -> None:
    from mlc_llm.cli import compile as compiler
    from mlc_llm.compiler_pass import dispatch_kv_cache_creation, pipeline

    if cache == "tvm":
        pipeline.DispatchKVCacheCreation = dispatch_kv_cache_creation.DispatchKVCacheCreation
    compiler.main(arguments)


def token_latency(
    folder: str, library: str, requests: int, tokens: int, lengths: list[int]
) -> dict[int, float]:
    from mlc_llm import MLCEngine
    from mlc_llm.serve import EngineConfig

    sizes = {"max_num_sequence": 1, "max_total_sequence_length": 4096, "prefill_chunk_size": 512}
    engine = MLCEngine(
        folder, device="cpu", model_lib=library, mode="server", engine_config=EngineConfig(**sizes)
    )
    whole = {"extra_body": {"debug_config": {"ignore_eos": True}}}
    found = {}
    for length in lengths:
        prompt = [1 + i % 100 for i in range(length)]
        times = []
        for _ in range(requests):  # all but the first find the prompt in the prefix cache
            done = engine.completions.create(
                prompt=prompt, max_tokens=tokens, temperature=0.0, **whole
            )
            times.append(1e3 / done.usage.extra["decode_tokens_per_s"])
        found[length] = statistics.median(times)
    engine.terminate()
    return found


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    if command == "compile":
        compile_model(rest[0], rest[1:])
    else:
        folder, library, *numbers = rest
        requests, tokens, *lengths = map(int, numbers)
        print(json.dumps(token_latency(folder, library, requests, tokens, lengths)))
