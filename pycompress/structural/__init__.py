"""The pipelines of the methods that make dense matrices smaller."""
