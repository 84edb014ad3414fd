"""Dead letters: every message that will not succeed by itself, kept once, understood and brought back."""
