"""``python -m eigenlens``: the command line, of the environment whose Python runs it."""

from eigenlens.cli import app

app()
