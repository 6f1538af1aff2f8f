"""`python -m twingpt` is `gpt`."""

from twingpt.cli import main

if __name__ == "__main__":  # not in the processes that it spawns
    main()
