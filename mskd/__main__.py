"""`python -m mskd` and `accelerate launch -m mskd`: the same as the command mskd."""

from mskd.cli import main

main()
