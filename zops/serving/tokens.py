"""How many tokens the text encoder gets for a prompt, counted in the HTTP process, without torch.

It is the tokenizer's own file from the snapshot, read by the library that transformers itself uses underneath.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from zops.serving.messages import BUCKET_TOKENS, MAX_PROMPT_TOKENS

Template = tuple[str, str]
"""What the model's chat template puts before and behind a prompt (`Ready.template`)."""


class TokenCounter:
    """Counts tokens; safe to be called by several threads."""

    def __init__(self, snapshot: Path) -> None:
        """Begin to read the tokenizer, in a thread: the real one has 11 MB of JSON."""
        pool = ThreadPoolExecutor(1, "tokenizer")
        self._tokenizer = pool.submit(_read, snapshot / "tokenizer" / "tokenizer.json")
        pool.shutdown(wait=False)

    def count(self, prompt: str, template: Template) -> int:
        """Return the number of tokens of a prompt within its template.

        It takes a millisecond for a thousand words; long text is to be counted off the event loop.
        """
        before, behind = template
        # The call for many texts lets other threads run meanwhile, the one for a single text does not.
        [encoded] = self._tokenizer.result().encode_batch([before + prompt + behind])
        return len(encoded.ids)


def bucket(tokens: int) -> int:
    """Return the caption length that the transformer pads this many tokens to."""
    return -(-min(tokens, MAX_PROMPT_TOKENS) // BUCKET_TOKENS) * BUCKET_TOKENS


def _read(path: Path) -> Any:
    # Without it the library starts a thread a core, and warns at each process that is started afterwards.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer  # noqa: PLC0415 - spares the start of the server 30 ms before the socket answers

    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
