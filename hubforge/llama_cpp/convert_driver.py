"""Runs llama.cpp's convert_hf_to_gguf.py, unchanged, in this process, with two of its decisions taken by us.

No code that came with a model is run, and an unknown pre-tokenizer gets the name that `pretokenizer` found, if any.
The first argument is JSON: {"tree": folder, "pre": name or null, "arguments": [...]}; the rest of the line is empty.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

from hubforge.processes import exit_with_parent

NAMED = "hubforge: pre-tokenizer named "
UNKNOWN = "hubforge: pre-tokenizer unknown"
REFUSED = "this model needs code that comes with it, and hubforge never runs such code"


def main() -> int:
    asked = json.loads(sys.argv[1])
    exit_with_parent()
    forbid_remote_code()
    sys.path.insert(0, asked["tree"])
    script = importlib.import_module("convert_hf_to_gguf")
    # Since 2026 the classes live in a package beside the script; before, in the script itself.
    homes = [script, sys.modules.get("conversion.base")]
    for name in ("TextModel", "Model"):
        for home in homes:
            if hasattr(kind := getattr(home, name, None), "get_vocab_base_pre"):
                name_unknown(kind, asked["pre"])
    sys.argv = [str(script.__file__), *asked["arguments"]]
    script.main()
    return 0


def forbid_remote_code() -> None:
    """Make Transformers refuse code of the checkpoint, though the converter passes trust_remote_code=True."""
    from transformers import AutoConfig, AutoTokenizer, dynamic_module_utils

    for kind in (AutoTokenizer, AutoConfig):
        kind.from_pretrained = staticmethod(_without_remote_code(kind.from_pretrained))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(REFUSED)

    # Where every other way in would execute it.
    dynamic_module_utils.get_class_in_module = refuse


def _without_remote_code(load: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        try:
            return load(*args, **{**kwargs, "trust_remote_code": False})
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise RuntimeError(REFUSED) from None  # Its own advice would be to trust the code.

    return from_pretrained


def name_unknown(kind: Any, pre: str | None) -> None:
    """Where the converter knows no name for a pre-tokenizer, let it take this one."""
    ask = kind.get_vocab_base_pre

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        try:
            return str(ask(self, tokenizer))
        except NotImplementedError:
            if pre is None:
                print(UNKNOWN, file=sys.stderr)  # noqa: T201 - the parent reads it
                raise
            print(NAMED + pre, file=sys.stderr)  # noqa: T201
            return pre

    kind.get_vocab_base_pre = get_vocab_base_pre


if __name__ == "__main__":
    sys.exit(main())
