"""Generation on top of a session, with numpy only: settings, sampling, stopping, and the prefill and decode loop."""

from engines.generation.constraint import Constraint, ConstraintError
from engines.generation.generate import Generation, generate
from engines.generation.results import GenerationResult, TokenEvent, TokenLogprobs
from engines.generation.settings import GenerationConfig, GenerationError

__all__ = [
    "Constraint",
    "ConstraintError",
    "Generation",
    "GenerationConfig",
    "GenerationError",
    "GenerationResult",
    "TokenEvent",
    "TokenLogprobs",
    "generate",
]
