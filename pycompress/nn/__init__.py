"""The modules that compressed models are made of."""
