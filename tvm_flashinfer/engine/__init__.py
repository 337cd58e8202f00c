"""The local engine: a compiled directory, its KV cache, and continuous batching over them.

``Engine.load(directory)``, then ``generate`` many prompts, ``stream`` one, or keep a ``session``.
It needs neither PyTorch nor transformers nor a compiler.
"""

from .conversation import Conversation
from .engine import Engine, EngineStats, Prompt, Session
from .request import Completion, Delta, FinishReason
from .sampler import SamplingParams
from .tokenizer import Message

__all__ = [
    "Completion",
    "Conversation",
    "Delta",
    "Engine",
    "EngineStats",
    "FinishReason",
    "Message",
    "Prompt",
    "SamplingParams",
    "Session",
]
