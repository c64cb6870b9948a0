"""Train: `accelerate launch train_ldm.py CONFIG.yaml key.sub=value …`, the same as `ldm train`."""

import sys

from ldm.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["train"]
    main()
