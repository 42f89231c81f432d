"""The server: a scheduler over the engine's slots, OpenAI's and SageMaker's interfaces, metrics, and a playground."""
