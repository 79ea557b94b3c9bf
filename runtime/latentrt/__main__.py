"""`python -m latentrt` is `latentrt`."""

from latentrt.cli.main import main

if __name__ == "__main__":
    main()
