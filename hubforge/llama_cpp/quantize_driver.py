"""Runs llama.cpp's quantizer in this process, by the prebuilt cyllama, else by llama-cpp-python.

The first argument is JSON: {"source", "target", "ftype", "threads"}. Prints which library did it.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec

from hubforge.processes import exit_with_parent


def main() -> int:
    asked = json.loads(sys.argv[1])
    exit_with_parent()
    source, target, ftype, threads = asked["source"], asked["target"], asked["ftype"], asked["threads"]
    try:
        if find_spec("cyllama") is not None:
            library = by_cyllama(source, target, ftype, threads)
        elif find_spec("llama_cpp") is not None:
            library = by_llama_cpp_python(source, target, ftype, threads)
        else:
            raise RuntimeError("neither cyllama nor llama-cpp-python is installed")
    except (RuntimeError, ValueError, OSError) as error:
        # No traceback: the lines before this one, which the C++ wrote, say what is wrong.
        print(error, file=sys.stderr)  # noqa: T201 - the parent reads it
        return 1
    print(library)  # noqa: T201
    return 0


def by_cyllama(source: str, target: str, ftype: int, threads: int) -> str:
    from cyllama.llama import llama_cpp as native

    from hubforge.llama_cpp.backends import cyllama_version

    native.llama_backend_init()
    params = native.LlamaModelQuantizeParams()
    params.ftype, params.nthread = ftype, threads
    native.model_quantize(source, target, params)
    return cyllama_version()


def by_llama_cpp_python(source: str, target: str, ftype: int, threads: int) -> str:
    import ctypes

    import llama_cpp as native

    native.llama_backend_init()
    params = native.llama_model_quantize_default_params()
    params.ftype, params.nthread = ftype, threads
    if code := native.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama_model_quantize returned {code}")
    return f"llama-cpp-python {native.__version__}"


if __name__ == "__main__":
    sys.exit(main())
