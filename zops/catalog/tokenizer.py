"""A small byte-level BPE tokenizer in the files that Qwen2Tokenizer reads, so that no tokenizer must be fetched."""

import json

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# A few merges, so that prompts take the path of merging and tokens are not simply bytes.
_MERGES = (
    ("t", "h"),
    ("th", "e"),
    ("i", "n"),
    ("Ġ", "the"),
    ("a", "n"),
    ("in", "g"),
    ("Ġ", "a"),
    ("o", "r"),
    ("e", "r"),
)

# How Qwen2 cuts text into words before merging; from transformers, models/qwen2/tokenization_qwen2.py.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)


def byte_alphabet() -> list[str]:
    """Return the character that stands for each of the 256 bytes in byte-level BPE, as GPT-2 defined it."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


def _vocabulary() -> dict[str, int]:
    return {token: i for i, token in enumerate([*byte_alphabet(), *(left + right for left, right in _MERGES)])}


SPECIAL_IDS = {token: len(_vocabulary()) + i for i, token in enumerate((END_OF_TEXT, START_OF_TURN, END_OF_TURN))}


def tokenizer_files() -> dict[str, str]:
    """Return name -> text of the tokenizer's four files; together they have 268 tokens."""
    config = {
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": _CHAT_TEMPLATE,
        "eos_token": END_OF_TURN,
        "model_max_length": 131072,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    return {
        "merges.txt": "".join(f"{left} {right}\n" for left, right in _MERGES),
        "tokenizer.json": json.dumps(_fast_tokenizer(), ensure_ascii=False, indent=2),
        "tokenizer_config.json": json.dumps(config, indent=4),
        "vocab.json": json.dumps(_vocabulary(), ensure_ascii=False),
    }


def _fast_tokenizer() -> dict[str, object]:
    """Build tokenizer.json, the serialised form of the `tokenizers` library."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for token, i in SPECIAL_IDS.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": _vocabulary(),
            "merges": [list(pair) for pair in _MERGES],
        },
    }
