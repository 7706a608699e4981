"""How prompts become tokens: a tokenizer, its chat template and the template's options. No weights are needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mechsafety.conversation import PromptLike
from mechsafety.errors import MechsafetyError
from mechsafety.inputs import prompt_text
from mechsafety.models.template import render
from mechsafety.prompts import Spans


@dataclass(frozen=True, slots=True, eq=False)
class ChatTokenizer:
    """Turns prompts into the token ids that a model reads.

    Attributes:
        name: The model's name.
        tokenizer: A Hugging Face tokenizer with a chat template.
        options: The template's options besides the prompt.
        opener_ids: Tokens of a reply's opener, which follow the template's tokens; see `LensModel.reading`.
    """

    name: str
    tokenizer: Any
    options: Mapping[str, Any]
    opener_ids: tuple[int, ...] = ()

    def render(self, prompt: PromptLike) -> tuple[str, int, int]:
        """The chat prompt as text, and where in it the instruction begins and ends (characters).

        The instruction is the user's turn: of a list of messages, the last one.
        """
        return render(self.tokenizer, prompt_text(prompt), self.options)

    def rows(self, prompts: Sequence[PromptLike]) -> tuple[list[list[int]], list[Spans]]:
        """Token ids of each chat prompt, and where the prompt's parts lie among them.

        Raises:
            MechsafetyError: A prompt is empty or no prompt, the template cannot take it, or it has no token.
        """
        if not prompts:
            return [], []
        rendered = [self.render(prompt) for prompt in prompts]
        texts = [text for text, _, _ in rendered]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        spans = []
        for prompt, (_, start, end), offsets in zip(prompts, rendered, encoded["offset_mapping"], strict=True):
            inside = [k for k, (a, b) in enumerate(offsets) if b > a and max(a, start) < min(b, end)]
            if not inside:
                raise MechsafetyError(f"the tokenizer gives no token to the prompt {prompt!r}")
            spans.append(Spans((inside[0], inside[-1] + 1), len(offsets) + len(self.opener_ids)))
        # append the opener as ids: as text, it could merge with the template's last token
        return [[*row, *self.opener_ids] for row in encoded["input_ids"]], spans

    def ids(self, prompt: PromptLike) -> list[int]:
        """Token ids of one chat prompt."""
        return [*self.tokenizer(self.render(prompt)[0], add_special_tokens=False)["input_ids"], *self.opener_ids]

    def spans(self, prompts: Sequence[PromptLike]) -> list[Spans]:
        """Where each chat prompt's parts lie in its token row."""
        return self.rows(prompts)[1]
