"""Floor 1: integer arithmetic that both sides must do alike. Pure functions, no secrets."""
