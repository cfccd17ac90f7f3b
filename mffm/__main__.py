"""``python -m mffm``, as torchrun starts it: ``torchrun --nproc-per-node 2 -m mffm train recipe.yaml``."""

from mffm.cli import main

if __name__ == "__main__":
    main()
