"""The one place that says which version this is; pyproject.toml and the files of runs read it here."""

__version__ = "0.2.0.dev0"
