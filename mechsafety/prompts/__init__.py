"""Prompts: harmful/harmless pairs, single prompts, and the spans of a chat prompt."""

from mechsafety.conversation import Conversation, PromptLike
from mechsafety.prompts.distinct import distinct, first_of_each, unseen
from mechsafety.prompts.files import read_jsonl, read_rows
from mechsafety.prompts.pairs import Align, PromptPair, PromptPairs, omissions
from mechsafety.prompts.sets import Prompt, builtin_prompts, load_instructions
from mechsafety.prompts.spans import Spans, TokenPairs, TokenRow, Tokens, TokenTable

__all__ = [
    "Align",
    "Conversation",
    "Prompt",
    "PromptLike",
    "PromptPair",
    "PromptPairs",
    "Spans",
    "TokenPairs",
    "TokenRow",
    "TokenTable",
    "Tokens",
    "builtin_prompts",
    "distinct",
    "first_of_each",
    "load_instructions",
    "omissions",
    "read_jsonl",
    "read_rows",
    "unseen",
]
