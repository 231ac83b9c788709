"""`python -m latentvae ...` and `accelerate launch -m latentvae ...`: the same commands as `latentvae ...`."""

from latentvae.cli import main

if __name__ == "__main__":  # worker processes started by spawn import this module again
    main()
