"""What models are made of: descriptions of their classes, and the channels of their blocks."""
