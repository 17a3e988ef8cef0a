"""What any part asks of a language model: texts as windows of ids, its state, its head, its identity."""
