"""`python -m modelq` is the command line."""
import sys

from modelq.cli import main

sys.exit(main())
