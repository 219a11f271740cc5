"""Extensions of mlx-lm own commands: each named, guarded and reversible."""
