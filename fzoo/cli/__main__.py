"""`python -m fzoo.cli`."""

from fzoo.cli.main import main

if __name__ == "__main__":
    main()
