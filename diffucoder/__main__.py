"""`python -m diffucoder` is the command `diffucoder`."""

from diffucoder.cli import main

if __name__ == "__main__":
    main()
