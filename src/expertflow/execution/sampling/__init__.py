"""What changes or restricts the choice of a token, and how likely the chosen one was."""
