"""`python -m maxattn` is the command `maxattn`."""

from maxattn.cli import main

if __name__ == "__main__":
    main()
