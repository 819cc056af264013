"""Converts checkpoints between Hugging Face and Megatron-Core, and compares them: `megatron-sr1 convert`, as a script.

python tools/convert.py hf-to-megatron --hf DIR --out DIR
python tools/convert.py megatron-to-hf --megatron DIR --out DIR
python tools/convert.py verify A B [--logits --tp 2]
"""

from __future__ import annotations

import sys

from megatron_sr1.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
