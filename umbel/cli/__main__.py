"""`python -m umbel.cli` is `umbel`."""

from umbel.cli.main import app

app()
