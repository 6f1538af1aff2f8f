"""`python -m twingpt` is `gpt`."""

from twingpt.cli import main

main()
