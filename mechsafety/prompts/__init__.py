"""Prompts: harmful/harmless pairs, single prompts, and the spans of a chat prompt."""

from mechsafety.prompts.files import read_jsonl, read_rows
from mechsafety.prompts.pairs import PromptPair, PromptPairs
from mechsafety.prompts.sets import Prompt, builtin_prompts, load_instructions
from mechsafety.prompts.spans import Spans, TokenPairs, TokenRow, Tokens, TokenTable

__all__ = [
    "Prompt",
    "PromptPair",
    "PromptPairs",
    "Spans",
    "TokenPairs",
    "TokenRow",
    "TokenTable",
    "Tokens",
    "builtin_prompts",
    "load_instructions",
    "read_jsonl",
    "read_rows",
]
