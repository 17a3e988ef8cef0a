"""The pipeline of the methods that pack matrices."""
