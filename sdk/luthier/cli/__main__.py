"""python -m luthier.cli: the same as `luthier`."""

from luthier.cli import main

main()
