"""`python -m pipeline` is the program `resnet-batch`."""

from pipeline.cli import main

main()
