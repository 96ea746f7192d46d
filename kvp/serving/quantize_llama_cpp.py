"""Quantise a GGUF with llama.cpp and without kvp; a file to run, not to import.

python -I quantize_llama_cpp.py SOURCE TARGET TYPE: the type is llama.cpp's name of it, such as Q4_K_M.
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp


def main() -> None:
    """Write TARGET; exit code 1 if llama.cpp has no such type, or fails."""
    source, target, kind = sys.argv[1:]
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    failed = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
