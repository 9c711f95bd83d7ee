"""The same trade through real processes over RabbitMQ, with faults on the way, and the proof that none mattered."""
