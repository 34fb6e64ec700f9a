"""The command line in a checkout: `python main.py --help` explains it; `densenet-jax` is the same where installed."""

from densenet_jax.__main__ import main

if __name__ == "__main__":
    main()
