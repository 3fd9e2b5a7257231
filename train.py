"""`python train.py ...` is `blink train ...`, from a checkout that need not be installed. The story of a run is told in
training/loop.py.
"""

import sys

from blink.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
