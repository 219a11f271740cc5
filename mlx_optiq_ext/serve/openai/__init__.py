"""The OpenAI dialect: chat and legacy completions, models, embeddings."""
