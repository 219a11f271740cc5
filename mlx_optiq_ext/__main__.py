"""Run the command line as ``python -m mlx_optiq_ext``."""

import sys

from mlx_optiq_ext.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
