"""`python -m perl` is the command `perl-rl`."""

from perl.cli import main

if __name__ == "__main__":
    main()
