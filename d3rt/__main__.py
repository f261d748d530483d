"""`python -m d3rt`: the same as the command `d3rt`."""

import sys
from pathlib import Path

from d3rt.cli import main

if __name__ == "__main__":
    # -m puts the current folder first on sys.path. In a checkout that is where kernels/ lies, which transformers would
    # take for Hugging Face's package of that name.
    if Path(sys.path[0], "kernels", "reference.py").is_file():
        del sys.path[0]
    main()
