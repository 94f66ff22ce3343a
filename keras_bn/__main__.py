# PYTHON_ARGCOMPLETE_OK
"""`python -m keras_bn`: the command line."""

from keras_bn.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
