"""What a packed weight consists of: codes, matrices without their zeros, and whether a file of them is intact."""
