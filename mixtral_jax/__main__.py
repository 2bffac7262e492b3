"""`python -m mixtral_jax VERB ...`."""

from mixtral_jax.cli.main import main

if __name__ == "__main__":
    main()
