"""`python -m hubforge` is `hubforge`."""

from hubforge.cli import main

main()
