"""The only package that changes the user's model."""
