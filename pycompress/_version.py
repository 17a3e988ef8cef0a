"""The one place that says which version this is; pyproject.toml and the files of runs read it here."""

__version__ = "0.1.0"
