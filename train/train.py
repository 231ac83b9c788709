"""Train or fine-tune: the same arguments as `latentvae train`.

accelerate launch train/train.py --recipe train/recipes/f8c4_256.yaml --set data.source=IMAGES --out RUN
"""

import sys

from latentvae.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
